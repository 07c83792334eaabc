"""Trees as data: from a search, live branches, a file or llm-reasoners; to text, tables and graphs.

>>> from dendrite_lab import trees
>>> print(trees.export(handle).to_mermaid())                   # doctest: +SKIP
>>> trees.read("tree.json").to_pandas().sort_values("value")   # doctest: +SKIP
"""

from __future__ import annotations

from dendrite_lab.trees.model import TreeData, TreeNode
from dendrite_lab.trees.reading import from_json, from_treelog, read
from dendrite_lab.trees.sources import export

__all__ = ["TreeData", "TreeNode", "export", "from_json", "from_treelog", "read"]
