"""Prompt lookup: what followed the last time the branch said this."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.speculation.base import DraftRequest, Proposer, Speculation, check_int

_MAX_NGRAM = 16
_PLACES = 4  # of one n-gram that are remembered for each text, the latest ones


@dataclass(frozen=True)
class PromptLookup(Speculation):
    """Guesses by looking the last tokens up in the branch's own text (prompt lookup, Saxena 2023,
    https://github.com/apoorvumang/prompt-lookup-decoding).

    The longest n-gram at the end of the text that occurred before is continued as it was continued
    then, latest occurrence first. Needs no model; good where a text repeats itself or its prompt:
    editing, code, extraction, summaries. A lookup costs microseconds.

    Attributes:
        tokens: length of a guess at most.
        longest: tokens of the n-grams that are looked up first.
        shortest: tokens of the n-grams that are looked up last.
        width: different continuations to try at once; more than 1 makes a tree.
        siblings: look in the texts of all branches of the job, not only in the branch's own.
        adaptive: shorten guesses, down to none, where they are seldom right.

    Raises:
        InvalidArgument: a value is out of range.

    Example:
        >>> PromptLookup(tokens=4, width=2).longest
        4
    """

    tokens: int = 10
    longest: int = 4
    shortest: int = 2
    width: int = 1
    siblings: bool = False
    adaptive: bool = True

    def __post_init__(self) -> None:
        self._check_sizes()
        check_int("PromptLookup", "shortest", self.shortest, 1, _MAX_NGRAM)
        check_int("PromptLookup", "longest", self.longest, 1, _MAX_NGRAM)
        if self.shortest > self.longest:
            raise InvalidArgument(
                f"PromptLookup.shortest is {self.shortest}, more than longest, {self.longest}"
            )

    def start(self) -> Proposer:
        """See Speculation.start."""
        return _Lookups(self)


class _Lookups:
    """One index for each branch, or one for all."""

    def __init__(self, settings: PromptLookup) -> None:
        self._settings = settings
        self._indices: dict[int, NgramIndex] = {}

    def propose(self, requests: Sequence[DraftRequest]) -> list[list[list[int]]]:
        """See Proposer.propose."""
        for request in requests:  # all first: with siblings each sees what the others just said
            self._index(request.key).update(request.key, request.tokens)
        width = self._settings.width
        return [
            self._index(request.key).continuations(request.key, request.limit, width)
            for request in requests
        ]

    def forget(self, key: int) -> None:
        """See Proposer.forget; with `siblings` its text stays of use to the others."""
        self._indices.pop(key, None)

    def _index(self, key: int) -> NgramIndex:
        settings = self._settings
        place = -1 if settings.siblings else key
        found = self._indices.get(place)
        if found is None:
            found = self._indices[place] = NgramIndex(settings.longest, settings.shortest)
        return found


class NgramIndex:
    """Where every n-gram of some growing texts occurred last.

    Args:
        longest: tokens of the longest n-grams.
        shortest: tokens of the shortest.

    Example:
        >>> index = NgramIndex(3, 2)
        >>> index.update(0, [1, 2, 3, 4, 1, 2])
        >>> index.continuations(0, 3, 1)
        [[3, 4, 1]]
    """

    def __init__(self, longest: int, shortest: int) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._texts: dict[int, Sequence[int]] = {}
        self._seen: dict[int, int] = {}
        self._places: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    def update(self, key: int, tokens: Sequence[int]) -> None:
        """Take in what a text has got since the last call: texts only grow. O(new tokens)."""
        self._texts[key] = tokens
        for end in range(self._seen.get(key, 0) + 1, len(tokens) + 1):
            for size in self._sizes:
                if end >= size:
                    places = self._places.setdefault(tuple(tokens[end - size : end]), [])
                    places.append((key, end))
                    if len(places) > _PLACES * len(self._texts):
                        del places[0]
        self._seen[key] = len(tokens)

    def continuations(self, key: int, limit: int, width: int) -> list[list[int]]:
        """Up to `width` continuations of a text with different first tokens: those of longer
        n-grams first, then the latest.
        """
        found: dict[int, list[int]] = {}
        for text, start in self._matches(key):
            tokens = _copy(self._texts[text], start, limit)
            found.setdefault(tokens[0], tokens)
            if len(found) == width:
                break
        return list(found.values())

    def _matches(self, key: int) -> Iterator[tuple[int, int]]:
        """(text, position after the n-gram), the best first."""
        tokens = self._texts[key]
        for size in self._sizes:
            if len(tokens) < size:
                continue
            places = self._places.get(tuple(tokens[-size:]), ())
            for text, end in reversed(places):
                if end < len(self._texts[text]):
                    yield text, end


def _copy(tokens: Sequence[int], start: int, limit: int) -> list[int]:
    """`limit` tokens from `start` on; where the text ends before, it is taken to go on in the same
    way (the overlapping copies of LZ77), which is right for anything periodic.
    """
    out = list(tokens[start : start + limit])
    period = len(tokens) - start
    while len(out) < limit:
        out.append(out[len(out) - period])
    return out
