"""What a branch needs from the engine that owns it, so that the tree imports nothing above it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from dendrite_engine.trace import Trace
    from dendrite_engine.tree.branch import Branch


class BranchHost(Protocol):
    """The part of `Engine` that branches call."""

    core: Any  # TreeCore, native or reference
    trace: Trace
    tokenizer: Any
    max_context: int
    grammars: Any  # GrammarService

    def _new_branch_id(self) -> int: ...

    def _register(self, branch: Branch) -> None: ...

    def _unregister(self, branch: Branch) -> bool: ...

    def _check_tokens(self, token_ids: Sequence[int], held: int) -> list[int]: ...
