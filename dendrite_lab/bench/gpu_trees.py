"""Trees for the attention benchmark: from a short text to a plan of the engine's own core.

    "1,16,64; 1024,256,32"      1 node of 1,024 tokens, 16 of 256 below it, 64 of 32 below those
    "1,2,4,8; 16 each"          four levels of 16 tokens
    "random 7"                  a random tree
    "prompt 1024 after 3072"    one branch of 4,096 tokens of which the last 1,024 are queries

Nodes of a level are spread evenly over those of the level above. Every leaf is one query: its last
token, which sees itself and everything above.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dendrite_engine.cache import make_core
from dendrite_engine.errors import InvalidArgument

# FastTree's kernel benchmark (MLSys 2025), kernel_bench/run_benchmark.sh
FASTTREE = (
    "1,2,64; 8,256,32",
    "1,4,8,256; 8,256,256,32",
    "1,256; 256,32",
    "1,16,64; 1024,256,32",
    "1,4,16,64,256,1024; 256,8,256,64,32,256",
    "1,10; 4000,400",
    "1,2,4,8,16,32,64,128,1024; 16 each",
    "1,8,16,32,64,128,1024; 256,128,64,16,16,16,16",
)
SHARED_PREFIX = (
    "1; 4096",
    "1; 32768",
    "1,6; 4096,128",
    "1,64; 4096,128",
    "1,64; 32768,128",
    "1,256; 4096,64",
)
PROMPTS = ("prompt 4096 after 0", "prompt 1024 after 3072", "prompt 256 after 32512")
RANDOM = ("random 1", "random 2", "random 3", "random 4")
SUITES = {
    "fasttree": FASTTREE,
    "shared": SHARED_PREFIX,
    "random": RANDOM,
    "prompts": PROMPTS,
    "all": (*FASTTREE, *SHARED_PREFIX, *RANDOM),
}


@dataclass(frozen=True, slots=True)
class Tree:
    """A tree of runs of tokens; parents come before their children.

    Attributes:
        name: the text it was made from.
        parents: of each node, -1 for a root.
        lengths: tokens of each node.
        queries_a_leaf: of a leaf's last tokens so many are queries.
    """

    name: str
    parents: tuple[int, ...]
    lengths: tuple[int, ...]
    queries_a_leaf: int = 1

    @property
    def leaves(self) -> tuple[int, ...]:
        """Nodes without children, in order."""
        inner = set(self.parents)
        return tuple(node for node in range(len(self.parents)) if node not in inner)

    @property
    def unique_tokens(self) -> int:
        """Tokens of all nodes."""
        return sum(self.lengths)

    @property
    def contexts(self) -> tuple[int, ...]:
        """Tokens that each query sees."""
        ends: list[int] = []
        for parent, length in zip(self.parents, self.lengths, strict=True):
            ends.append(length + (ends[parent] if parent >= 0 else 0))
        back = range(self.queries_a_leaf - 1, -1, -1)
        return tuple(ends[leaf] - before for leaf in self.leaves for before in back)


def parse_tree(text: str) -> Tree:
    """The tree that a text describes; see the module's first lines.

    Raises:
        InvalidArgument: the text is not of that form.
    """
    name = " ".join(text.split())
    if name.startswith("random "):
        return random_tree(int(name.removeprefix("random ")))
    if prompt := re.fullmatch(r"prompt ([1-9]\d*) after (\d+)", name):
        new, before = int(prompt[1]), int(prompt[2])
        return Tree(name, (-1,), (before + new,), new)
    nodes_text, _, tokens_text = name.partition(";")
    try:
        counts = [int(part) for part in nodes_text.split(",")]
        if tokens_text.strip().endswith(" each"):
            tokens = [int(tokens_text.strip().removesuffix(" each"))] * len(counts)
        else:
            tokens = [int(part) for part in tokens_text.split(",")]
    except ValueError:
        counts, tokens = [], []
    if not counts or len(counts) != len(tokens) or min(*counts, *tokens) < 1:
        raise InvalidArgument(
            f"not a tree: {text!r}; write nodes of each level; tokens of a node of each level, "
            'for example "1,16,64; 1024,256,32"'
        )
    return _levels(name, counts, tokens)


def _levels(name: str, counts: Sequence[int], tokens: Sequence[int]) -> Tree:
    parents: list[int] = []
    lengths: list[int] = []
    first = 0  # of the level above
    for level, (count, length) in enumerate(zip(counts, tokens, strict=True)):
        begin = len(parents)
        for node in range(count):
            parents.append(first + node * counts[level - 1] // count if level else -1)
            lengths.append(length)
        first = begin
    return Tree(name, tuple(parents), tuple(lengths))


def random_tree(seed: int) -> Tree:
    """Up to 256 leaves, up to 8 levels, lengths from 1 to 4,000 tokens; many at page edges."""
    rng = np.random.default_rng(seed)
    parents, lengths, depths = [-1], [int(rng.integers(1, 4000))], [0]
    target = int(rng.integers(2, 257))
    while len(parents) - len(set(parents)) + 1 < target:
        # Recent nodes more often, so that trees get deep as well as wide.
        age = int(rng.geometric(min(0.5, 3.0 / len(parents))))
        parent = max(0, len(parents) - age)
        if depths[parent] >= 7:
            continue
        edge = rng.random() < 0.4
        length = rng.choice([1, 15, 16, 17, 48]) if edge else rng.geometric(1 / 200)
        parents.append(parent)
        lengths.append(int(min(length, 4000)))
        depths.append(depths[parent] + 1)
    return Tree(f"random {seed}", tuple(parents), tuple(lengths))


@dataclass(frozen=True, slots=True)
class Planned:
    """A tree in the engine's core.

    Attributes:
        tree: the tree.
        plan: the plan of one decode step: a row for each leaf.
        num_pages: pages of the pool.
        page_size: tokens of a page.
        core: keeps the plan alive.
    """

    tree: Tree
    plan: Any
    num_pages: int
    page_size: int
    core: Any


def plan_tree(tree: Tree, page_size: int = 16) -> Planned:
    """Lay the tree out as the engine would, and plan the step that computes the leaves' tokens.

    Nothing is computed: what is in the pages is the caller's.
    """
    num_pages = sum(-(-length // page_size) + 1 for length in tree.lengths) + 1
    core = make_core(num_pages, page_size, prefix_cache=False)
    if tree.queries_a_leaf > 1:
        return _plan_prompt(tree, page_size, num_pages, core)
    leaves = set(tree.leaves)
    handles: list[int] = []
    for node, (parent, length) in enumerate(zip(tree.parents, tree.lengths, strict=True)):
        tokens = np.zeros(length - (node in leaves and length > 1), np.int32)
        if parent < 0:
            handles.append(core.create(tokens)[0])
            _compute(core, handles[-1:])
            continue
        handles.append(core.fork(handles[parent]))
        if node not in leaves:
            core.append(handles[-1], tokens)
            _compute(core, handles[-1:])
        elif length > 1:
            core.append(handles[-1], tokens)
    last = [handles[leaf] for leaf in tree.leaves]
    _compute(core, [h for h, leaf in zip(last, tree.leaves, strict=True) if _waits(tree, leaf)])
    for handle, leaf in zip(last, tree.leaves, strict=True):
        if tree.lengths[leaf] > 1 or tree.parents[leaf] >= 0:
            core.append(handle, np.zeros(1, np.int32))
    plan = core.plan(np.array(last, np.int64), np.ones(len(last), np.int32))
    return Planned(tree, plan, num_pages, page_size, core)


def _plan_prompt(tree: Tree, page_size: int, num_pages: int, core: Any) -> Planned:
    """One branch, of which the last tokens are computed in one step."""
    before, new = tree.lengths[0] - tree.queries_a_leaf, tree.queries_a_leaf
    handle = core.create(np.zeros(before or new, np.int32))[0]
    if before:
        _compute(core, [handle])
        core.append(handle, np.zeros(new, np.int32))
    plan = core.plan(np.array([handle], np.int64), np.array([new], np.int32))
    return Planned(tree, plan, num_pages, page_size, core)


def _waits(tree: Tree, leaf: int) -> bool:
    """Whether the leaf holds tokens before its last one."""
    return tree.lengths[leaf] > 1


def _compute(core: Any, handles: Sequence[int]) -> None:
    """Mark all tokens of these branches as computed."""
    if handles:
        quotas = np.full(len(handles), 1 << 30, np.int32)
        core.plan(np.array(handles, np.int64), quotas).commit()
