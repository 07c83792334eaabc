"""The search tree: nodes hold statistics and branch handles, never text to be prefilled again.

A tree knows nothing of the engine. It records what ought to happen to branches (grow this node,
release that one) and the runner in `driver.py` makes it so after every batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch
    from dendrite_engine.types import TokenAlternative

Status = Literal["open", "expanded", "terminal", "pruned"]
STATUSES: tuple[Status, ...] = ("open", "expanded", "terminal", "pruned")


class Candidate(NamedTuple):
    """A run of tokens that a child may begin with.

    Attributes:
        token_ids: at least one.
        logprobs: the model's natural log-probabilities of them; NaN where it wasn't asked.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def logprob(self) -> float:
        """Log-probability of the whole run."""
        return math.fsum(self.logprobs)


@dataclass(slots=True, eq=False, repr=False)
class Node:
    """One run of tokens in the search tree, with its statistics.

    Attributes:
        id: position in `Tree.nodes`; parents come before children.
        parent: node above, `None` for the root.
        children: nodes below, oldest first.
        token_ids: tokens of this node alone; kept when its branch is pruned.
        logprobs: natural log-probabilities of `token_ids`; NaN for tokens that were forced.
        start: absolute position of the first token.
        depth: nodes between this one and the root, the root having 0.
        ordinal: which attempt of the parent made it (0-based): names the node by its path.
        branch: the engine's branch that ends where this node ends, `None` once it was released.
        branch_id: id of that branch, also after its release (0 when there never was one, or when a
            child took the branch over).
        visits: simulations that passed through.
        value_sum: sum of their values.
        prior: probability that the model gave to this node's tokens (1 for the root).
        status: `open` can be expanded, `expanded` has children, `terminal` ends its text, `pruned`
            was taken out by a person or lost its branch.
        finish_reason: why its text ended, for terminal nodes.
        score: value that the evaluator gave to this very node; `None` before it.
        bonus: added to the score by which the search picks, see `SearchHandle.boost`.
        pinned: its branch is never released by the search.
        attempts: children asked for, failed and merged ones included.
        in_flight: attempts not told yet.
        virtual: simulations under way at or below this node.
        exhausted: nothing is left to try at or below it.
        alternatives: most likely next tokens, when they were looked up.
        square_sum: sum of the squares of the values that make up `value_sum`.
        candidates: runs of tokens that children can begin with, likeliest first, where the search
            gave such runs; `None` before they are known.
    """

    id: int
    parent: Node | None = None
    children: list[Node] = field(default_factory=list)
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    start: int = 0
    depth: int = 0
    ordinal: int = 0
    branch: Branch | None = None
    branch_id: int = 0
    visits: int = 0
    value_sum: float = 0.0
    prior: float = 1.0
    status: Status = "open"
    finish_reason: str | None = None
    score: float | None = None
    bonus: float = 0.0
    pinned: bool = False
    attempts: int = 0
    in_flight: int = 0
    virtual: int = 0
    exhausted: bool = False
    alternatives: tuple[TokenAlternative, ...] = ()
    square_sum: float = 0.0
    candidates: tuple[Candidate, ...] | None = None

    @property
    def value(self) -> float:
        """Mean value of the simulations that passed through; 0 before the first."""
        return self.value_sum / self.visits if self.visits else 0.0

    @property
    def span(self) -> tuple[int, int]:
        """Absolute positions `[start, end)` of this node's tokens."""
        return self.start, self.start + len(self.token_ids)

    def path(self) -> list[Node]:
        """Nodes from the root down to this one. O(depth)."""
        nodes: list[Node] = []
        node: Node | None = self
        while node is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes

    def ordinals(self) -> tuple[int, ...]:
        """Path of attempt numbers from the root: the node's name, the same in every equal run."""
        return tuple(node.ordinal for node in self.path()[1:])

    def subtree(self) -> Iterator[Node]:
        """This node and all below it, parents first."""
        stack = [self]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(reversed(node.children))

    def __repr__(self) -> str:
        return (
            f"Node({self.id}, branch={self.branch_id}, {self.status}, depth={self.depth}, "
            f"visits={self.visits}, value={self.value:.3f})"
        )


class Tree:
    """Nodes of one search, and what is still to be done to their branches.

    Attributes:
        nodes: all nodes ever made, by id.
        root: the node of the branch that was searched from.
        by_branch: node by branch id; holds released branches too.
        planned: nodes whose tokens are known and whose branch is still to be made.
        released: nodes whose branch is to be pruned.
        orphans: branches that belong to no node (merged, failed or stale), to be pruned.
        dirty: ids of nodes whose statistics changed since a reader last drained the set.
    """

    __slots__ = ("by_branch", "dirty", "nodes", "orphans", "planned", "released", "root")

    def __init__(self, root: Branch) -> None:
        self.root = Node(0, branch=root, branch_id=root.id, start=0)
        self.root.start = root.num_tokens
        self.nodes = [self.root]
        self.by_branch = {root.id: self.root}
        self.planned: list[Node] = []
        self.released: list[Node] = []
        self.orphans: list[Branch] = []
        self.dirty: set[int] = {0}

    def __len__(self) -> int:
        return len(self.nodes)

    def add(
        self,
        parent: Node,
        token_ids: tuple[int, ...],
        logprobs: tuple[float, ...],
        *,
        branch: Branch | None = None,
        ordinal: int = 0,
    ) -> Node:
        """Hang a node under `parent`; without a `branch` it is grown at the next settle."""
        node = Node(
            len(self.nodes),
            parent,
            token_ids=token_ids,
            logprobs=logprobs,
            start=parent.span[1],
            depth=parent.depth + 1,
            ordinal=ordinal,
        )
        self.nodes.append(node)
        parent.children.append(node)
        if parent.status == "open":
            parent.status = "expanded"
        if branch is None:
            self.planned.append(node)
        else:
            self.attach(node, branch)
        self.dirty.update((node.id, parent.id))
        return node

    def attach(self, node: Node, branch: Branch) -> None:
        """Give a node its branch."""
        node.branch = branch
        node.branch_id = branch.id
        self.by_branch[branch.id] = node
        self.dirty.add(node.id)

    def hand_over(self, parent: Node, child: Node) -> None:
        """Let `child` continue on its parent's branch; the parent keeps none."""
        branch = parent.branch
        if branch is not None:
            parent.branch, parent.branch_id = None, 0
            self.attach(child, branch)
            self.dirty.add(parent.id)

    def release(self, node: Node) -> None:
        """Have a node's branch pruned at the next settle, or never made; not the root's."""
        if node.parent is None or node.pinned:
            return
        if node.branch is not None:
            self.released.append(node)
        elif node in self.planned:
            self.planned.remove(node)

    def orphan(self, branch: Branch | None) -> None:
        """Have a branch pruned that no node wants."""
        if branch is not None:
            self.orphans.append(branch)

    def take_unwanted(self) -> list[Branch]:
        """Branches to prune now: those of released nodes, and orphans that no node came to own."""
        unwanted: list[Branch] = []
        for node in self.released:
            if node.branch is not None:
                unwanted.append(node.branch)
                node.branch = None
                self.dirty.add(node.id)
        # looked up only now: an outcome told twice in one batch is orphaned before its node is made
        unwanted += [branch for branch in self.orphans if branch.id not in self.by_branch]
        self.released, self.orphans = [], []
        return unwanted

    def drop(self, node: Node) -> None:
        """Take a node and all below it out of the search; ancestors keep their statistics."""
        for below in node.subtree():
            below.status = "pruned"
            below.exhausted = True
            below.pinned = False
            self.release(below)
            self.dirty.add(below.id)
        self.planned = [n for n in self.planned if n.status != "pruned"]

    def touch(self, node: Node) -> None:
        """Note that a node's statistics changed, and with them the scores of its children."""
        self.dirty.add(node.id)
        self.dirty.update(child.id for child in node.children)

    def tokens(self, node: Node) -> list[int]:
        """Tokens from the root's end to the node's end: what the search wrote on this path."""
        return [token for step in node.path() for token in step.token_ids]
