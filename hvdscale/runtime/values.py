"""Plain Python values between ranks, exactly as they were: JSON for their shape, raw bytes for arrays, no pickle."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from enum import IntFlag
from typing import Any

import numpy as np

from hvdscale.errors import StateError
from hvdscale.runtime.transport import Transport, broadcast

__all__ = ["ExactValues", "broadcast_value", "decode", "encode"]

_AS_IT_IS = (type(None), bool, int, float, str)
_CONTAINERS: dict[type, str] = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset"}
_MAKERS: dict[str, Callable[[Any], Any]] = {name: kind for kind, name in _CONTAINERS.items()}
_HEAD_BYTES = 8


def encode(value: Any, name: str = "the value") -> bytes:
    """``value`` as bytes, from which ``decode`` makes an equal one of the same types.

    It may hold ``None``, booleans, numbers, strings, bytes, lists, tuples, sets, dictionaries with any of these as
    keys, and NumPy arrays and scalars of numbers. ``name`` says in errors where the value stands.

    Raises:
        StateError: anything else is in it.
    """
    parts: list[bytes] = []
    head = json.dumps(_describe(value, name, parts)).encode()
    return b"".join([len(head).to_bytes(_HEAD_BYTES, "little"), head, *parts])


def decode(data: bytes) -> Any:
    """The value that ``encode`` was given."""
    start = _HEAD_BYTES + int.from_bytes(data[:_HEAD_BYTES], "little")
    return _build(json.loads(data[_HEAD_BYTES:start]), memoryview(data)[start:])


def broadcast_value(transport: Transport, value: Any, name: str = "the value") -> Any:
    """``value`` of the first rank of ``transport``, on every rank.

    Raises:
        StateError: what ``encode`` refuses, on the first rank.
    """
    return decode(broadcast(transport, encode(value, name) if transport.rank == 0 else b""))


class ExactValues:
    """Mixed into Horovod's ``ObjectState``: its values travel exactly, and what was committed stays as it was.

    Values are checked when they are given and at every commit, not only when ranks come together.

    Raises:
        StateError: a value that ``encode`` refuses.
    """

    _saved_state: dict[str, Any]

    def __init__(self, transport: Callable[[], Transport], get_rank: Callable[[], int], /, **values: Any) -> None:
        _check(values)
        state: Any = super()
        state.__init__(bcast_object=lambda value: _share(transport(), value), get_rank=get_rank, **values)
        self._saved_state = copy.deepcopy(values)

    def save(self) -> None:
        values = {name: getattr(self, name) for name in self._saved_state}
        _check(values)
        self._saved_state = copy.deepcopy(values)

    def restore(self) -> None:
        for name, value in copy.deepcopy(self._saved_state).items():
            setattr(self, name, value)

    def sync(self) -> None:
        state: Any = super()
        state.sync()
        self._saved_state = copy.deepcopy(self._saved_state)  # other ranks have just been given these very objects


def _share(transport: Transport, value: Any) -> Any:
    if isinstance(value, tuple):  # Horovod's word on hosts that came or went: two times and a flag, which is a number
        value = tuple(int(v) if isinstance(v, IntFlag) else v for v in value)
    return broadcast_value(transport, value, "state")


def _check(values: dict[str, Any]) -> None:
    for name, value in values.items():
        _describe(value, f"state.{name}", [])


def _describe(value: Any, where: str, parts: list[bytes]) -> Any:
    """``value`` in JSON: plain values as they are, all others as ``{kind: content}``; bytes go to ``parts``."""
    kind = type(value)
    if kind in _AS_IT_IS:
        return value
    if kind in _CONTAINERS:
        return {_CONTAINERS[kind]: [_describe(v, f"{where}[{i}]", parts) for i, v in enumerate(value)]}
    if kind is dict:
        keys = [_describe(k, f"a key of {where}", parts) for k in value]
        members = [_describe(v, f"{where}[{k!r}]", parts) for k, v in value.items()]
        return {"dict": [keys, members]}
    if kind is bytes:
        parts.append(value)
        return {"bytes": len(value)}
    if (kind is np.ndarray or isinstance(value, np.generic)) and _is_of_numbers(value.dtype):
        parts.append(value.tobytes())
        return {"array" if kind is np.ndarray else "scalar": [value.dtype.name, list(value.shape)]}
    raise StateError(
        "A state holds None, numbers, strings, bytes, lists, tuples, sets, dictionaries and NumPy arrays of numbers; "
        f"{where} is a {kind.__module__}.{kind.__qualname__}: {value!r:.200}. Keep it outside the state, or keep plain "
        "values it can be made of again."
    )


def _is_of_numbers(dtype: np.dtype[Any]) -> bool:
    """Whether the name says all there is to know: not so for objects, text, records and other byte orders."""
    try:
        return not dtype.hasobject and dtype.kind != "U" and np.dtype(dtype.name) == dtype
    except TypeError:
        return False


def _build(node: Any, data: memoryview) -> Any:
    value, rest = _read(node, data)
    if len(rest):
        raise StateError(f"{len(rest)} bytes are left over behind a value: it was cut or joined on its way.")
    return value


def _read(node: Any, data: memoryview) -> tuple[Any, memoryview]:
    if not isinstance(node, dict):
        return node, data
    ((kind, content),) = node.items()
    if kind == "bytes":
        return bytes(data[:content]), data[content:]
    if kind in ("array", "scalar"):
        dtype, shape = np.dtype(content[0]), tuple(content[1])
        end = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        array = np.frombuffer(data[:end], np.uint8).copy().view(dtype).reshape(shape)
        return (array if kind == "array" else array[()]), data[end:]
    if kind == "dict":
        keys, data = _read_all(content[0], data)
        members, data = _read_all(content[1], data)
        return dict(zip(keys, members, strict=True)), data
    members, data = _read_all(content, data)
    return _MAKERS[kind](members), data


def _read_all(nodes: list[Any], data: memoryview) -> tuple[list[Any], memoryview]:
    values = []
    for node in nodes:
        value, data = _read(node, data)
        values.append(value)
    return values, data
