"""A tree as a graph of networkx or a table of pandas, both optional."""

from __future__ import annotations

import importlib
from dataclasses import asdict
from typing import Any

from dendrite_engine.errors import DendriteError
from dendrite_lab.trees.model import TreeData, lines_of


class MissingPackage(DendriteError, ImportError):
    """An optional package is not installed; the message says how to get it."""


def networkx_graph(tree: TreeData) -> Any:
    """A `networkx.DiGraph`: nodes by id with all their fields, edges from parents to children.

    Raises:
        MissingPackage: networkx is not installed.
    """
    graph = _optional("networkx").DiGraph(source=tree.source, model=tree.model)
    for node in tree.nodes:
        fields = asdict(node)
        graph.add_node(fields.pop("id"), **fields)
    graph.add_edges_from((parent.id, child.id) for parent, child in lines_of(tree))
    return graph


def data_frame(tree: TreeData) -> Any:
    """A `pandas.DataFrame` indexed by node id: the fields of `TreeNode`, `depth`, `tokens` (their
    number), and a column `extra.KEY` for each key of `extra`.

    Raises:
        MissingPackage: pandas is not installed.
    """
    pandas = _optional("pandas")
    depths: list[int] = []
    rows: list[dict[str, Any]] = []
    for node in tree.nodes:
        depths.append(depths[node.parent] + 1 if node.parent >= 0 else 0)
        row = asdict(node)
        extra = row.pop("extra")
        row |= {"depth": depths[-1], "tokens": len(node.token_ids)}
        rows.append(row | {f"extra.{key}": value for key, value in extra.items()})
    return pandas.DataFrame(rows).set_index("id")


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingPackage(
            f"{name} is not installed: pip install {name}, or dendrite-lab[analysis] for all of "
            "networkx and pandas"
        ) from error
