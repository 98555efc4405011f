"""Values between ranks arrive as they were: type and value, without pickle; what cannot is refused by name."""

from __future__ import annotations

import math
from collections import OrderedDict
from enum import IntFlag
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdscale.errors import StateError
from hvdscale.runtime.transport import SoloTransport, Transport, run_loopback
from hvdscale.runtime.values import ExactValues, broadcast_value, decode, encode

hashable = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=6,
)
values = st.recursive(
    hashable | st.sets(hashable, max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(hashable, inner, max_size=3),
    max_leaves=12,
)


def types(value: Any) -> Any:
    """The types of a value and of all in it that has an order."""
    if isinstance(value, (list, tuple)):
        return type(value), [types(v) for v in value]
    if isinstance(value, dict):
        return type(value), [(types(k), types(v)) for k, v in value.items()]
    return type(value)


@given(values)
def test_plain_values_arrive_as_they_were(value: Any) -> None:
    there = decode(encode(value))
    assert there == value
    assert types(there) == types(value)


@pytest.mark.parametrize(
    "value",
    [2**200, -(2**63), 5e-324, math.inf, -math.inf, "\ud800", "\0", {"bytes": 3}, {"list": [1]}, {(1, "a"): b"x"}],
    ids=repr,
)
def test_the_odd_ones_too(value: Any) -> None:
    assert decode(encode(value)) == value


def test_not_a_number_and_minus_zero() -> None:
    nan, zero = decode(encode([math.nan, -0.0]))
    assert math.isnan(nan)
    assert math.copysign(1.0, zero) == -1.0


def test_a_dictionary_keeps_its_order() -> None:
    assert list(decode(encode({"b": 1, "a": 2, 0: 3}))) == ["b", "a", 0]


@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int16", "int64", "uint64", "float16", "float32", "float64", "complex64"]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3)])
def test_arrays_of_numbers(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    there = decode(encode(array))
    assert (type(there), there.dtype, there.shape) == (np.ndarray, array.dtype, array.shape)
    np.testing.assert_array_equal(there, array)
    there[...] = 0  # its own memory, to write to


@pytest.mark.parametrize("scalar", [np.float32(0.1), np.int8(-3), np.bool_(True), np.float64(math.pi)], ids=repr)
def test_numpy_scalars_stay_numpy_scalars(scalar: Any) -> None:
    there = decode(encode(scalar))
    assert type(there) is type(scalar)
    assert there == scalar


def test_an_array_that_is_not_contiguous() -> None:
    array = np.arange(12).reshape(3, 4).T[::2]
    np.testing.assert_array_equal(decode(encode(array)), array)


def test_bytes_and_arrays_do_not_mix() -> None:
    value = [b"abc", np.arange(3), (b"", {"k": np.float32(2)}), b"z"]
    there = decode(encode(value))
    assert (there[0], there[1].tolist(), there[2], there[3]) == (b"abc", [0, 1, 2], (b"", {"k": 2.0}), b"z")


class Level(IntFlag):
    ONE = 1


class Text(str):
    """Not the type that would come out."""


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (object(), "state is a builtins.object"),
        ({"a": [1, object()]}, "state['a'][1] is a builtins.object"),
        ({object(): 1}, "a key of state is a builtins.object"),
        (Text("x"), "Text: 'x'"),
        (OrderedDict(a=1), "OrderedDict"),
        (Level.ONE, "Level"),
        (1j, "builtins.complex"),
        (np.array(["text"]), "numpy.ndarray"),
        (np.array([object()]), "numpy.ndarray"),
        (np.arange(3).astype(">i4"), "numpy.ndarray"),
        (np.zeros(1, [("a", int)]), "numpy.ndarray"),
        (np.ma.masked_array([1]), "MaskedArray"),
        (lambda: None, "function"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_arrive_as_it_is_is_refused_by_name(value: Any, where: str) -> None:
    with pytest.raises(StateError) as refused:
        encode(value, "state")
    assert where in str(refused.value)
    assert "Keep it outside the state" in str(refused.value)


def test_bytes_left_over_are_an_error() -> None:
    with pytest.raises(StateError, match="2 bytes are left over"):
        decode(encode([b"abc"]) + b"xy")


def test_the_first_rank_s_value_on_every_rank() -> None:
    def body(transport: Transport) -> Any:
        own = {"epoch": 3, "rates": (0.1, 0.2)} if transport.rank == 0 else object()  # others' are not looked at
        return broadcast_value(transport, own)

    assert run_loopback(3, body, timeout_seconds=10) == [{"epoch": 3, "rates": (0.1, 0.2)}] * 3


class HorovodState:
    """The part of Horovod's ``ObjectState`` that values meet."""

    def __init__(self, bcast_object: Any, get_rank: Any, **kwargs: Any) -> None:
        self._bcast_object = bcast_object
        vars(self).update(kwargs)

    def sync(self) -> None:
        self._saved_state = self._bcast_object(self._saved_state)
        vars(self).update(self._saved_state)


class State(ExactValues, HorovodState):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(SoloTransport, lambda: 0, **kwargs)


def test_what_was_committed_stays_as_it_was() -> None:
    state: Any = State(seen=[1], rate=0.5)
    state.seen.append(2)
    state.restore()
    assert state.seen == [1]
    state.seen.append(3)
    state.rate = 0.25
    state.save()
    state.seen.append(4)
    state.restore()
    assert (state.seen, state.rate) == ([1, 3], 0.25)


def test_after_a_sync_too() -> None:
    state: Any = State(seen=[1])
    state.sync()
    state.seen.append(2)
    state.restore()
    assert state.seen == [1]


def test_values_are_checked_when_given_and_when_committed() -> None:
    with pytest.raises(StateError, match=r"state\.model is a builtins\.object"):
        State(model=object())
    state: Any = State(epoch=0)
    state.epoch = object()
    with pytest.raises(StateError, match=r"state\.epoch is a builtins\.object"):
        state.save()
