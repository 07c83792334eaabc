"""Search states and options as JSON and back, by what the values are; no code is ever stored.

Numbers, strings, lists, tuples, dicts with any keys, sets, deques, numpy arrays, random generators
and nodes of the tree come back as what they were. Dataclasses, NamedTuples and enums do where their
class is known: those in the modules of the algorithm, of its bases and of its state are, and what
`Search.saved_types` adds. A file names classes, it never makes them be imported.

Two fields that hold the same list hold two equal lists afterwards; nodes keep their identity.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import random
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from dendrite_engine.errors import SearchError, SnapshotRejected
from dendrite_engine.search.tree import Node

TAG = "$"
_PLAIN = (bool, int, str, type(None))
_FACTORIES: dict[str, type] = {t.__name__: t for t in (int, float, list, dict, set, tuple, str)}
_GENERATORS: dict[str, type] = {
    t.__name__: t for t in (np.random.PCG64, np.random.PCG64DXSM, np.random.Philox, np.random.SFC64)
}


def known_types(*roots: type) -> dict[str, type]:
    """Classes that may be made from a file: data classes in the modules of `roots` and bases.

    Returns:
        Class by `module.qualname`.
    """
    found: dict[str, type] = {}
    for cls in dict.fromkeys(base for root in roots for base in root.__mro__):
        if cls.__module__ in ("builtins", "abc", "typing"):
            continue
        module = sys.modules.get(cls.__module__)
        for value in (cls, *vars(module).values()) if module is not None else (cls,):
            if isinstance(value, type) and _is_data(value):
                found[_name(value)] = value
    return found


def _is_data(cls: type) -> bool:
    named_tuple = issubclass(cls, tuple) and hasattr(cls, "_fields")
    return dataclasses.is_dataclass(cls) or named_tuple or issubclass(cls, enum.Enum)


def _name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class Encoder:
    """Makes JSON of values.

    Args:
        types: classes that the reader will know, see `known_types`.
        branches: id of the node that owns a branch, by branch id.
    """

    def __init__(self, types: Mapping[str, type], branches: Mapping[int, int]) -> None:
        self._types = types
        self._branches = branches

    def encode(self, value: Any, where: str) -> Any:
        """`value` as JSON.

        Args:
            value: what to write.
            where: its name, for errors.

        Raises:
            SearchError: it holds something that can't be written; the message says where.
        """
        if type(value) in _PLAIN:
            return value
        if isinstance(value, float) and type(value) in (float, np.float64):
            return float(value) if math.isfinite(value) else _tagged("float", str(float(value)))
        if type(value) is list:
            return [self.encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
        if isinstance(value, Node):
            return _tagged("node", value.id)
        for kind, test in _CONTAINERS.items():
            if type(value) is test:
                return self._container(kind, value, where)
        if isinstance(value, (np.ndarray, np.generic, np.random.Generator, random.Random)):
            return self._numeric(value, where)
        if _is_data(type(value)) and _name(type(value)) in self._types:
            return self._object(value, where)
        if hasattr(value, "fork_position"):
            return self._branch(value, where)
        raise SearchError(
            f"{where} holds a {type(value).__name__}, which a checkpoint can't store: keep plain "
            "values, nodes, dataclasses of the algorithm's module (or of `saved_types`), or mark "
            'the field with metadata={"checkpoint": False} and rebuild it in `restored`'
        )

    def _container(self, kind: str, value: Any, where: str) -> Any:
        def each(items: Iterable[Any]) -> list[Any]:
            return [self.encode(item, f"{where}[{i}]") for i, item in enumerate(items)]

        if kind in ("dict", "defaultdict"):
            pairs = [
                [self.encode(k, f"{where} key"), self.encode(v, f"{where}[{k!r}]")]
                for k, v in value.items()
            ]
            if kind == "dict":
                return _tagged(kind, pairs)
            factory = getattr(value.default_factory, "__name__", None)
            if factory not in _FACTORIES:
                raise SearchError(f"{where}: a defaultdict of {factory} can't be stored")
            return _tagged(kind, [factory, pairs])
        if kind == "deque":
            return _tagged(kind, [value.maxlen, each(value)])
        if kind in ("set", "frozenset"):
            try:
                return _tagged(kind, each(sorted(value)))
            except TypeError:
                return _tagged(kind, each(value))
        return _tagged(kind, each(value))

    def _numeric(self, value: Any, where: str) -> Any:
        if isinstance(value, random.Random):
            if type(value) is not random.Random:
                raise SearchError(f"{where}: only plain random.Random can be stored")
            return _tagged("random", self.encode(value.getstate(), where))
        if isinstance(value, np.random.Generator):
            state = value.bit_generator.state
            if state["bit_generator"] not in _GENERATORS:
                raise SearchError(f"{where}: {state['bit_generator']} can't be stored")
            return _tagged("generator", self.encode(dict(state), where))
        if value.dtype.hasobject:
            raise SearchError(f"{where}: an array of objects can't be stored")
        flat = self.encode(np.ravel(value).tolist(), where)
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return _tagged(kind, [value.dtype.str, list(value.shape), flat])

    def _object(self, value: Any, where: str) -> Any:
        if isinstance(value, enum.Enum):
            return _tagged("enum", [_name(type(value)), value.name])
        names = (
            [f.name for f in dataclasses.fields(value) if f.init]
            if dataclasses.is_dataclass(value)
            else value._fields
        )
        fields = {n: self.encode(getattr(value, n), f"{where}.{n}") for n in names}
        return _tagged("object", [_name(type(value)), fields])

    def _branch(self, branch: Any, where: str) -> Any:
        owner = self._branches.get(branch.id)
        if owner is None:
            raise SearchError(f"{where} holds branch {branch.id}, which no node of the tree owns")
        return _tagged("branch", owner)


class Decoder:
    """Makes values of JSON that `Encoder` wrote.

    Args:
        types: classes that may be made, see `known_types`.
        nodes: nodes of the tree by id.
    """

    def __init__(self, types: Mapping[str, type], nodes: Sequence[Node]) -> None:
        self._types = types
        self._nodes = nodes
        self._makers: dict[str, Callable[[Any, str], Any]] = {
            "float": lambda v, _: float(v),
            "tuple": lambda v, w: tuple(self._all(v, w)),
            "set": lambda v, w: set(self._all(v, w)),
            "frozenset": lambda v, w: frozenset(self._all(v, w)),
            "deque": lambda v, w: deque(self._all(v[1], w), v[0]),
            "dict": lambda v, w: dict(self._pairs(v, w)),
            "defaultdict": lambda v, w: defaultdict(_FACTORIES[v[0]], self._pairs(v[1], w)),
            "node": lambda v, _: self._nodes[_index(v, len(self._nodes))],
            "branch": lambda v, _: self._nodes[_index(v, len(self._nodes))].branch,
            "array": lambda v, w: np.array(self._all(v[2], w), np.dtype(v[0])).reshape(v[1]),
            "scalar": lambda v, w: np.dtype(v[0]).type(self._all(v[2], w)[0]),
            "random": self._random,
            "generator": self._generator,
            "enum": lambda v, _: self._types[v[0]][v[1]],  # type: ignore[index]
            "object": self._object,
        }

    def decode(self, value: Any, where: str) -> Any:
        """The value that `where` held.

        Raises:
            SnapshotRejected: it isn't one, or is of an unknown class; `field` says where.
        """
        if type(value) in _PLAIN or type(value) is float:
            return value
        if isinstance(value, list):
            return self._all(value, where)
        if (
            not isinstance(value, dict)
            or set(value) != {TAG, "v"}
            or value[TAG] not in self._makers
        ):
            raise SnapshotRejected(where, f"can't be read: {str(value)[:80]}")
        try:
            return self._makers[value[TAG]](value["v"], where)
        except SnapshotRejected:
            raise
        except KeyError as error:
            raise SnapshotRejected(
                where, f"{error.args[0]!r} is not known here; import or name the algorithm's class"
            ) from error
        except Exception as error:  # whatever a class says about values that it refuses
            raise SnapshotRejected(where, f"can't be made: {error}") from error

    def _all(self, values: Any, where: str) -> list[Any]:
        return [self.decode(value, f"{where}[{i}]") for i, value in enumerate(values)]

    def _pairs(self, pairs: Any, where: str) -> list[tuple[Any, Any]]:
        return [(self.decode(k, f"{where} key"), self.decode(v, where)) for k, v in pairs]

    def _object(self, value: Any, where: str) -> Any:
        fields = {name: self.decode(v, f"{where}.{name}") for name, v in value[1].items()}
        return self._types[value[0]](**fields)

    def _random(self, value: Any, where: str) -> random.Random:
        made = random.Random()  # noqa: S311 a search's draws, not a secret
        made.setstate(self.decode(value, where))
        return made

    def _generator(self, value: Any, where: str) -> np.random.Generator:
        state = self.decode(value, where)
        bits = _GENERATORS[state["bit_generator"]]()
        bits.state = state
        return np.random.Generator(bits)


_CONTAINERS: dict[str, type] = {
    t.__name__: t for t in (tuple, dict, defaultdict, set, frozenset, deque)
}


def _tagged(kind: str, value: Any) -> dict[str, Any]:
    return {TAG: kind, "v": value}


def _index(value: Any, size: int) -> int:
    if type(value) is not int or not 0 <= value < size:
        raise ValueError(f"there is no node {value!r}")
    return value
