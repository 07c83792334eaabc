"""Finds the node that already stands for a path of tokens, however the path was cut into nodes."""

from __future__ import annotations

from collections.abc import Sequence

from dendrite_engine.search.tree import Node, Tree

_PRIME = (1 << 61) - 1
_BASE = 1_099_511_628_211


class PathTable:
    """Nodes of one tree by the tokens between its first root and their end.

    A path's key is a polynomial of its tokens modulo 2**61 - 1, so it does not depend on where the
    path is cut; a hit is compared token by token. The table holds nothing that the tree doesn't: it
    catches up with nodes made since it was last asked, and can be made anew at any time. Finding
    costs O(new tokens), and O(path) for a hit.
    """

    def __init__(self) -> None:
        self._keys: list[int] = []  # by node id
        self._nodes: dict[tuple[int, int], Node] = {}  # by end position and key

    def find(self, tree: Tree, parent: Node, token_ids: Sequence[int]) -> Node | None:
        """The oldest node whose path is that of `parent` and then these tokens."""
        self._catch_up(tree)
        key = _extended(self._keys[parent.id], token_ids)
        node = self._nodes.get((parent.span[1] + len(token_ids), key))
        if node is None or node.parent is parent:  # keys of siblings differ by their own tokens
            return node if node is not None and node.token_ids == tuple(token_ids) else None
        wanted = [*tree.tokens(parent), *token_ids]
        return node if tree.tokens(node) == wanted else None

    def _catch_up(self, tree: Tree) -> None:
        for node in tree.nodes[len(self._keys) :]:
            above = 0 if node.parent is None else self._keys[node.parent.id]
            key = _extended(above, node.token_ids)
            self._keys.append(key)
            self._nodes.setdefault((node.span[1], key), node)


def _extended(key: int, token_ids: Sequence[int]) -> int:
    for token in token_ids:
        key = (key * _BASE + token + 1) % _PRIME
    return key
