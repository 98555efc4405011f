"""Promises of the wire formats: sizes as said, errors bounded, and nothing lost for good."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hvdscale.errors import PlanError
from hvdscale.runtime.channel import TransportChannel
from hvdscale.runtime.transport import Transport, run_loopback
from hvdscale.sync.exchange import Mean
from hvdscale.sync.fragments import Fragment
from hvdscale.sync.wire import parse_wire

WIRES = ["fp32", "fp16", "bf16", "int8", "int4", "topk:0.1"]
LENGTHS = [1, 2, 255, 256, 257, 5000]


def encode(wire: str, values: np.ndarray) -> np.ndarray:
    codec = parse_wire(wire)
    out = np.empty(codec.size(values.size), np.uint8)
    codec.take(values.copy(), None, out)
    return out


def normal(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n).astype(np.float32)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize(
    ("wire", "bound"),  # of the error, relative to the largest value
    [("fp32", 0), ("fp16", 2**-11), ("bf16", 2**-8), ("int8", 0.5 / 127), ("int4", 0.5 / 7), ("topk:0.1", 1)],
)
def test_a_code_has_the_size_said_and_loses_no_more_than_its_bits(wire: str, bound: float, n: int) -> None:
    codec, values, back = parse_wire(wire), normal(n), np.empty(n, np.float32)
    sent = encode(wire, values)
    codec.decode(sent, back)
    assert np.abs(back - values).max() <= bound * np.abs(values).max() * (1 + 1e-6)


@pytest.mark.parametrize("n", [*LENGTHS, 70_000])
@pytest.mark.parametrize("wire", WIRES)
def test_what_a_code_leaves_is_what_it_does_not_say(wire: str, n: int) -> None:
    codec, kept, more = parse_wire(wire), normal(n), normal(n, 1)
    room = n + 3 * codec.unit if codec.way == "scatter" else n  # of a share that is longer
    out, back, total = np.full(codec.size(room), 7, np.uint8), np.empty(room, np.float32), normal(n, 2)
    expected = kept + more
    codec.take(kept, more, out)
    codec.decode(out, back)
    np.testing.assert_array_equal(kept, expected - back[:n])
    assert not back[n:].any()
    codec.add(out, np.float32(0.3), total)
    np.testing.assert_allclose(total, normal(n, 2) + np.float32(0.3) * back[:n], rtol=1e-6)


@pytest.mark.parametrize(
    ("wire", "bytes_a_value"), [("int8", 1.016), ("int4", 0.516), ("bf16", 2.0), ("topk:0.01", 0.08)]
)
def test_bytes_a_value(wire: str, bytes_a_value: float) -> None:
    assert parse_wire(wire).size(1 << 20) / (1 << 20) == pytest.approx(bytes_a_value, rel=0.01)


@pytest.mark.parametrize("wire", WIRES)
@pytest.mark.parametrize("value", [0.0, 1e-40, -3e38, 7e4])
def test_extreme_values_stay_finite(wire: str, value: float) -> None:
    codec, values = parse_wire(wire), np.full(300, value, np.float32)
    back = np.empty_like(values)
    codec.decode(encode(wire, values), back)
    assert np.isfinite(back).all()


def test_bfloat16_rounds_to_nearest_and_ties_to_even() -> None:
    codec = parse_wire("bf16")
    bits = np.array([0x3F808000, 0x3F818000, 0x3F80C000, 0x3F804000, 0xBF80C000], np.uint32)
    back = np.empty(5, np.float32)
    codec.decode(encode("bf16", bits.view(np.float32)), back)
    assert [hex(word) for word in back.view(np.uint32)] == [
        *("0x3f800000", "0x3f820000", "0x3f810000", "0x3f800000", "0xbf810000")
    ]


def exchanged(wire: str, rounds: int, ranks: int = 3, n: int = 1000, exact: int = 10) -> list[np.ndarray]:
    """Per rank: the sum of the means of ``rounds`` rounds in which every rank sends the same values again."""

    def body(transport: Transport) -> np.ndarray:
        codec = parse_wire(wire)
        coded = 0 if codec.way == "allreduce" else n - exact
        exchange = Mean(Fragment((0,), coded, n), codec, TransportChannel(transport))
        total = np.zeros(n)
        for _ in range(rounds):
            values = normal(n, transport.rank)
            exchange.add(values, np.array([0.5, 0.3, 0.2]))
            total += values
        return total

    results: list[Any] = run_loopback(ranks, body)
    return results


@pytest.mark.parametrize("wire", WIRES)
def test_the_mean_is_the_same_on_every_rank(wire: str) -> None:
    first, *others = exchanged(wire, 1)
    assert all(np.array_equal(first, other) for other in others)


@pytest.mark.parametrize("wire", WIRES)
def test_what_the_wire_loses_is_sent_later(wire: str) -> None:
    """After many rounds the total is off by about one round's loss, not by the sum of them."""
    expected = sum(share * normal(1000, rank) for rank, share in enumerate((0.5, 0.3, 0.2)))
    lost_once = np.abs(exchanged(wire, 1)[0] - expected).max()
    lost_in_40 = np.abs(exchanged(wire, 40)[0] - 40 * expected).max()
    assert lost_in_40 <= max(12 * lost_once if wire.startswith("topk") else 3 * lost_once, 1e-4)


def test_a_rank_without_a_vote_keeps_what_it_has_to_say() -> None:
    def body(transport: Transport) -> tuple[np.ndarray, np.ndarray]:
        exchange = Mean(Fragment((0,), 600, 600), parse_wire("int4"), TransportChannel(transport))
        exchange.residual[:] = 0.25
        values = np.full(600, 1.0 + 6 * transport.rank, np.float32)
        exchange.add(values, np.array([1.0, 0.0]))
        return values, exchange.residual

    (mean, _), (_, kept) = run_loopback(2, body)  # type: ignore[misc]
    np.testing.assert_allclose(mean, 1.25, rtol=1e-6)
    np.testing.assert_array_equal(kept, np.full(600, 0.25, np.float32))


@pytest.mark.parametrize("wire", ["int7", "topk", "topk:0", "topk:1.5", "topk:x", "fp32:2", "", None, 8])
def test_an_unknown_wire_is_refused_with_those_there_are(wire: Any) -> None:
    with pytest.raises(PlanError, match="wire is one of fp32, fp16, bf16, int8, int4, or topk:f"):
        parse_wire(wire)
