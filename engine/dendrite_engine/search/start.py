"""How a search is started; what `Engine.search` calls."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from dendrite_engine.errors import InvalidArgument
from dendrite_engine.search import SEARCHES
from dendrite_engine.search.base import Search
from dendrite_engine.search.budget import Budget, Clock
from dendrite_engine.search.evaluators import Evaluator, mean_logprob
from dendrite_engine.search.handle import SearchHandle
from dendrite_engine.search.session import EventCallback, SearchSession

if TYPE_CHECKING:
    from dendrite_engine.engine import Engine
    from dendrite_engine.sampling_params import SamplingParams
    from dendrite_engine.tree.branch import Branch


def start_search(
    engine: Engine,
    root: Branch,
    algorithm: Search[Any] | type[Search[Any]] | str = "mcts",
    budget: Budget | None = None,
    *,
    evaluator: Evaluator | None = None,
    params: SamplingParams | None = None,
    paused: bool = False,
    on_event: EventCallback | None = None,
    clock: Clock = time.monotonic,
    **options: Any,
) -> SearchHandle:
    """Start a search on a thread of its own and return its handle at once.

    Args:
        engine: the engine of `root`.
        root: the branch to search from; it stays as it is.
        algorithm: a configured search, its class, or its name in `SEARCHES`.
        budget: limits; `None` takes the algorithm's default.
        evaluator: batched callable, see `evaluators`; `None` takes `mean_logprob()`.
        params: how tokens are sampled; the same as the algorithm's option `sampling`.
        paused: start paused.
        on_event: called with every event from the first on, on the search's thread.
        clock: seconds from any origin, for `Budget.seconds`.
        **options: options of the algorithm, such as `width=4`.

    Raises:
        InvalidArgument: an argument or option is bad; the message names it.
        UnknownName: no algorithm has this name.

    Example:
        >>> start_search(engine, root, "mcts", Budget(tokens=500), width=3)  # doctest: +SKIP
    """
    search = _configured(algorithm, params, options)
    if budget is not None and not isinstance(budget, Budget):
        raise InvalidArgument(f"budget must be a Budget, got {budget!r}")
    session = SearchSession(
        engine,
        root,
        search,
        budget=search.default_budget if budget is None else budget,
        evaluator=_evaluator(search, evaluator),
        clock=clock,
    )
    if on_event is not None:
        session.subscribe(on_event)
    return SearchHandle(session, paused=paused).start()


def _configured(
    algorithm: Search[Any] | type[Search[Any]] | str,
    params: SamplingParams | None,
    options: dict[str, Any],
) -> Search[Any]:
    kind = SEARCHES.get(algorithm) if isinstance(algorithm, str) else algorithm
    if not isinstance(kind, Search) and not (isinstance(kind, type) and issubclass(kind, Search)):
        raise InvalidArgument(
            f"algorithm must be a Search, its class or one of {', '.join(SEARCHES.names())}; "
            f"got {algorithm!r}"
        )
    known = {field.name for field in dataclasses.fields(kind)}
    if params is not None:
        if "sampling" not in known:
            raise InvalidArgument(f"params: {kind.name} does not sample")
        options = {**options, "sampling": params}
    unknown = sorted(set(options) - known)
    if unknown:
        raise InvalidArgument(
            f"{kind.name} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}"
        )
    return dataclasses.replace(kind, **options) if isinstance(kind, Search) else kind(**options)


def _evaluator(search: Search[Any], evaluator: Evaluator | None) -> Evaluator | None:
    if evaluator is None:
        return mean_logprob() if search.needs_values else None
    if not search.needs_values:
        raise InvalidArgument(f"evaluator: {search.name} ranks without one and would never ask it")
    if not callable(evaluator):
        raise InvalidArgument(f"evaluator must be callable, got {evaluator!r}")
    return evaluator
