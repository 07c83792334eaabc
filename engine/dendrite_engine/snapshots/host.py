"""The part of `Engine` that saves branches and makes them again."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dendrite_engine.models.fingerprint import fingerprint
from dendrite_engine.snapshots.branches import load_branches, save_branches

if TYPE_CHECKING:
    from dendrite_engine.tree.branch import Branch


class SavesBranches:
    """Base of `Engine` with `save`, `load` and `fingerprint`."""

    @cached_property
    def fingerprint(self) -> str:
        """Short name of the weights: 32 hexadecimal digits; see `models.fingerprint`."""
        engine: Any = self
        return fingerprint(engine.model_path)

    def save(
        self, path: str | os.PathLike[str], branches: Branch | Sequence[Branch]
    ) -> dict[str, int]:
        """Write live branches to one file: token ids, log-probabilities, keys, labels; no K/V.

        A crash while saving leaves the old file whole. See docs/search/checkpoints.md.

        Args:
            path: the file, replaced where it exists.
            branches: one or more live branches, each at most once.

        Returns:
            `bytes` written, `branches`, and `tokens` stored (those of shared prefixes once).

        Raises:
            StaleBranch: a branch was pruned or belongs to another engine.
            InvalidArgument: there is none, or one is listed twice.

        Example:
            >>> engine.save("tree.safetensors", [a, b])    # doctest: +SKIP
            >>> a, b = engine.load("tree.safetensors")     # doctest: +SKIP
        """
        engine: Any = self
        targets = list(branches) if isinstance(branches, Sequence) else [branches]
        for branch in targets:
            engine._check_own(branch)
        return save_branches(engine, path, targets)

    def load(self, path: str | os.PathLike[str], *, namespace: str = "") -> list[Branch]:
        """Make the branches that `save` wrote again, in the order in which they were given to it.

        They share pages as far as their tokens agree and are prefilled in one job, common prefixes
        once. Each goes on with the tokens that the saved one would have drawn.

        Args:
            path: the file.
            namespace: of their prompts, see `prompt`.

        Raises:
            SnapshotRejected: the file is damaged, newer, or of another model; no page was touched.
            OutOfPages: the pool can't hold them; nothing is left of them.
        """
        engine: Any = self
        branches, made = load_branches(engine, path, namespace)
        try:
            engine._compute(made)
        except BaseException:
            for branch in reversed(made):
                branch.prune()
            raise
        return branches
