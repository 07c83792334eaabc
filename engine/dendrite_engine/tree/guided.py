"""The part of a branch that is about its grammar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dendrite_engine.errors import InvalidArgument

if TYPE_CHECKING:
    import numpy as np
    from typing_extensions import Self


class GuidedBranch:
    """What `Branch` offers about its grammar; its state is a function of grammar and tokens.

    A fork shares it in O(1) and pays for a copy of the matcher when it generates its first token.
    """

    __slots__ = ()

    engine: Any
    id: int
    _guide: Any

    if TYPE_CHECKING:

        @property
        def num_tokens(self) -> int:
            """See Branch."""

        def _check_idle(self, verb: str) -> None: ...

        def _check_alive(self) -> None: ...

    def constrain(self, grammar: Any, *, at: int | None = None, engine: str = "llguidance") -> Self:
        """Make what this branch holds from here on satisfy a grammar; returns this branch.

        Forks made from now on inherit it. A branch whose grammar is complete ends with
        finish_reason "stop". A branch that is cut before the grammar's start (rollback, fork
        inside) keeps it, from the cut on.

        Args:
            grammar: JsonSchema, Regex, Lark or Choice of `dendrite_engine.grammar`, or None to lift
                the one that is there.
            at: position of the first token that the grammar reads, 1..num_tokens; default: the next
                token. Tokens that are there already have to satisfy it.
            engine: which constraint engine runs it, see `dendrite_engine.grammar.CONSTRAINTS`.

        Raises:
            StaleBranch: this branch was pruned.
            InvalidArgument: the branch is generating, or `at` is out of range.
            InvalidGrammar: the grammar was refused: malformed, unsatisfiable, too large, too slow.
            GrammarError: tokens from `at` on do not satisfy it. Whatever is raised, nothing has
                changed.

        Example:
            >>> from dendrite_engine.grammar import Choice
            >>> branch.constrain(Choice([" yes", " no"]))                      # doctest: +SKIP
        """
        self._check_idle("constrain")
        held = self.num_tokens
        if at is not None and (
            not isinstance(at, int) or isinstance(at, bool) or not 1 <= at <= held
        ):
            raise InvalidArgument(f"constrain: at must be a position in 1..{held}, got {at!r}")
        if grammar is None:
            self._guide = None
        else:
            self.engine.grammars.attach(self, grammar, held if at is None else at, engine)
        return self

    @property
    def grammar(self) -> Any:
        """The grammar of this branch, or None."""
        return None if self._guide is None else self._guide.grammar

    @property
    def grammar_start(self) -> int | None:
        """Position of the first token that its grammar reads; None without one. `constrain` with
        the same grammar and `at` restores the state.
        """
        return None if self._guide is None else int(self._guide.start)

    @property
    def accepting(self) -> bool:
        """Whether what its grammar has read satisfies it; True without a grammar.

        Raises:
            GrammarError: the branch holds tokens that its grammar does not allow.
        """
        self._check_alive()
        if self._guide is None:
            return True
        return bool(self.engine.grammars.guide(self).snapshot.is_accepting)

    @property
    def is_complete(self) -> bool:
        """Whether its grammar is satisfied and allows nothing more; False without a grammar."""
        self._check_alive()
        if self._guide is None:
            return False
        return bool(self.engine.grammars.guide(self).snapshot.is_finished)

    def allowed_tokens(self) -> np.ndarray:
        """Ids of the tokens that its grammar allows next, increasing, i32 [n]; end-of-turn tokens
        are among them where the text so far satisfies it. O(vocabulary).

        Raises:
            StaleBranch: this branch was pruned.
            InvalidArgument: it has no grammar.
            GrammarError: it holds tokens that its grammar does not allow, or the grammar failed.
        """
        self._check_alive()
        allowed: np.ndarray = self.engine.grammars.allowed(self)
        return allowed

    def alternatives(self, limit: int = 64) -> list[list[int]]:
        """The ways in which its grammar lets it go on, as lists of token ids: the expansion of a
        search node. Each ends where the next choice begins, or where the text is complete.

        For a `Choice` these are the options that are left, cut as the tokenizer cuts them; for
        other grammars each allowed token with the tokens that it forces.

        Args:
            limit: most alternatives.

        Raises:
            StaleBranch: this branch was pruned.
            InvalidArgument: it has no grammar, or there are more than `limit`.
            GrammarError: see `allowed_tokens`.
        """
        self._check_alive()
        found: list[list[int]] = self.engine.grammars.alternatives(self, limit)
        return found
