"""How a saved search goes on; what `Engine.resume_search` calls."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dendrite_engine.errors import InvalidArgument, SnapshotRejected, UnknownName
from dendrite_engine.search import SEARCHES, checkpoint
from dendrite_engine.search.base import Search, State
from dendrite_engine.search.budget import Budget, Clock, Usage
from dendrite_engine.search.codec import TAG, Decoder, known_types
from dendrite_engine.search.evaluators import Evaluator, LogprobEvaluator
from dendrite_engine.search.handle import SearchHandle
from dendrite_engine.search.session import EventCallback, SearchSession
from dendrite_engine.snapshots.branches import check_engine, plant
from dendrite_engine.snapshots.container import Snapshot, read_snapshot
from dendrite_engine.tree.draws import Draws, set_draws

if TYPE_CHECKING:
    from dendrite_engine.engine import Engine


def resume_search(
    engine: Engine,
    path: str | os.PathLike[str],
    *,
    budget: Budget | None = None,
    evaluator: Evaluator | None = None,
    algorithm: type[Search[Any]] | None = None,
    namespace: str = "",
    paused: bool = False,
    on_event: EventCallback | None = None,
    clock: Clock = time.monotonic,
    **options: Any,
) -> SearchHandle:
    """Go on with a saved search, on a thread of its own, as if it had never been interrupted.

    The root and the branches that lived are made again from their tokens; `handle.root` is new, and
    the caller's to prune. With the same evaluator, budget and page formats the result is that of
    the uninterrupted search.

    Args:
        engine: runs the model that the search was saved with, with the same seed.
        path: what `SearchHandle.save` wrote.
        budget: new limits, in total; `None` keeps the saved ones. A search that ended because a
            limit was reached goes on with a larger one.
        evaluator: the evaluator, where it was code; the library's own without functions are kept.
        algorithm: the algorithm's class, where `SEARCHES` does not know it.
        namespace: of the root's prompt.
        paused: start paused.
        on_event: called with every event.
        clock: seconds from any origin, for `Budget.seconds`.
        **options: options that were code (functions), and changes to `live_options`.

    Raises:
        SnapshotRejected: the file is damaged, newer, or of another model, seed or algorithm; no
            page was touched.
        InvalidArgument: an evaluator or option that was code is missing.
        OutOfPages: the pool can't hold even the root.
    """
    snapshot = read_snapshot(path, checkpoint.KIND)
    check_engine(engine, snapshot.body.get("engine"))
    search = _algorithm(snapshot, algorithm, options)
    evaluator = _evaluator(snapshot, evaluator)
    limits = _decode(snapshot, "budget", Budget) if budget is None else budget
    usage = Usage(**_decode(snapshot, "usage", dict))
    ids = snapshot.array("root_tokens", "int32").tolist()
    logprobs = snapshot.array("root_logprobs", "float64").tolist()
    if not ids or len(ids) != len(logprobs):
        raise SnapshotRejected("root_logprobs", f"{len(logprobs)} for {len(ids)} tokens")
    stand_in: Any = SavedRoot(engine, ids)
    _fill(search.init(stand_in), search, snapshot)  # whatever is wrong shows before a page is taken
    root = plant(engine, ids, logprobs, namespace)
    session: SearchSession | None = None
    try:
        session = SearchSession(
            engine, root, search, budget=limits, evaluator=evaluator, clock=clock, resumed=True
        )
        _restore(session, snapshot, usage)
    except BaseException:
        if session is not None:
            session.abandon()
        root.prune()
        raise
    if on_event is not None:
        session.subscribe(on_event)
    return SearchHandle(session, paused=paused).start()


class SavedRoot:
    """Stands for the root while a file is checked: what an algorithm's `init` may ask of it."""

    parent = None
    depth = 0
    fork_position = 0
    label = ""
    is_alive = True
    children = ()

    def __init__(self, engine: Engine, token_ids: Sequence[int]) -> None:
        self.engine = engine
        self.id = 0
        self.token_ids = list(token_ids)
        self.logprobs: list[float | None] = [None] * len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that the root will hold."""
        return len(self.token_ids)

    @property
    def text(self) -> str:
        """Its text."""
        text: str = self.engine.tokenizer.decode(self.token_ids)
        return text


def _fill(state: State, search: Search[Any], snapshot: Snapshot) -> dict[int, Draws]:
    """Put everything of the file into a fresh state; returns draws by node."""
    types = checkpoint.state_types(search, state)
    checkpoint.read_tree(state.tree, snapshot, lambda nodes: Decoder(types, nodes))
    read = Decoder(types, state.tree.nodes)
    draws = checkpoint.read_draws(snapshot, read, len(state.tree))
    checkpoint.read_state(state, snapshot, read)
    return draws


def _restore(session: SearchSession, snapshot: Snapshot, usage: Usage) -> None:
    """Bring a fresh session to where the saved one was."""
    search, state, keeper = session.algorithm, session.state, session.keeper
    draws = _fill(state, search, snapshot)
    for node in state.tree.nodes:
        if node.id in draws and node is not state.tree.root:
            keeper.remake(state.tree, node, draws[node.id])
    for node in state.tree.nodes:  # only now: forking counts
        if node.id in draws and node.branch is not None and node.branch.is_alive:
            set_draws(node.branch, draws[node.id])
    # branches that the state itself names live only now
    checkpoint.read_state(
        state, snapshot, Decoder(checkpoint.state_types(search, state), state.tree.nodes)
    )
    counts = snapshot.body.get("counts", {})
    keeper.released, keeper.remade = counts.get("released", 0), counts.get("remade", 0)
    search.restored(state)
    session.meter.restore(usage)
    session.runner.recall(_decode(snapshot, "guard", dict, search))
    session.note_resumed(len(draws))


def _decode(snapshot: Snapshot, name: str, kind: type, search: Search[Any] | None = None) -> Any:
    types = known_types(Budget) if search is None else checkpoint.option_types(type(search))
    value = Decoder(types, ()).decode(snapshot.body.get(name), name)
    if not isinstance(value, kind):
        raise SnapshotRejected(name, f"is no {kind.__name__}: {value!r}")
    return value


def _algorithm(
    snapshot: Snapshot, kind: type[Search[Any]] | None, given: dict[str, Any]
) -> Search[Any]:
    written = snapshot.body.get("algorithm")
    if not isinstance(written, dict) or not isinstance(written.get("options"), dict):
        raise SnapshotRejected("algorithm", "is missing")
    name, stored = written.get("name"), written["options"]
    if kind is None:
        try:
            kind = SEARCHES.get(str(name))
        except UnknownName as error:
            raise InvalidArgument(
                f"the search {name!r} is not in SEARCHES; give its class as algorithm=..."
            ) from error
    if kind.name != name:
        raise SnapshotRejected("algorithm", f"the file is of {name!r}, not of {kind.name!r}")
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(stored) - known)
    if unknown:
        raise SnapshotRejected(f"options.{unknown[0]}", f"{name} has no such option")
    read = Decoder(checkpoint.option_types(kind), ())
    options = {
        option: read.decode(value, f"options.{option}")
        for option, value in stored.items()
        if value != checkpoint.EXTERNAL
    }
    code = [option for option, value in stored.items() if value == checkpoint.EXTERNAL]
    missing = [option for option in code if option not in given]
    if missing:
        raise InvalidArgument(
            f"{', '.join(missing)}: the saved search was given code here; give it again, as in "
            f"resume_search(path, {missing[0]}=...)"
        )
    options |= {option: given[option] for option in code}
    changes = {option: value for option, value in given.items() if option not in code}
    return kind(**options).with_options(**changes)


def _evaluator(snapshot: Snapshot, given: Evaluator | None) -> Evaluator | None:
    written = snapshot.body.get("evaluator")
    if given is not None:
        return given
    if isinstance(written, dict) and written.get(TAG) == "external":
        raise InvalidArgument(
            f"evaluator: the search was saved with {written.get('name')}, which is code; give it "
            "again"
        )
    found = Decoder(known_types(LogprobEvaluator), ()).decode(written, "evaluator")
    if found is not None and not callable(found):
        raise SnapshotRejected("evaluator", f"{found!r} can't be called")
    evaluator: Evaluator | None = found
    return evaluator
