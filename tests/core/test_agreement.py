"""Ranks that are about to do different things are told so, all of them, with the first difference."""

from __future__ import annotations

from typing import Any

import pytest

from hvdscale.errors import DesyncError
from hvdscale.runtime.agreement import Fingerprint, agree
from hvdscale.runtime.transport import Transport, run_loopback

BASE = [("w", (3, 4), "float32"), ("b", (4,), "float32")]


def told(fingerprints: list[Fingerprint]) -> list[Any]:
    def body(transport: Transport) -> None:
        agree(fingerprints[transport.rank], transport, "the model")

    return run_loopback(len(fingerprints), body, timeout_seconds=10)


def test_equal_ranks_pass() -> None:
    assert told([Fingerprint.of(BASE, {"optimizer": "SGD"})] * 3) == [None] * 3


@pytest.mark.parametrize(
    ("odd", "lines"),
    [
        (
            Fingerprint.of([BASE[0], ("b", (5,), "float32")]),
            ["ranks 0, 2: parameter 1 = b float32[4]", "rank 1: parameter 1 = b float32[5]"],
        ),
        (
            Fingerprint.of([("w", (3, 4), "float16"), BASE[1]]),
            ["rank 1: parameter 0 = w float16[3, 4]"],
        ),
        (Fingerprint.of(BASE[::-1]), ["rank 1: parameter 0 = b float32[4]"]),
        (Fingerprint.of(BASE[:1]), ["ranks 0, 2: number of parameters = 2", "rank 1: number of parameters = 1"]),
        (Fingerprint.of(BASE, {"optimizer": "Adam"}), ["rank 1: optimizer = Adam"]),
    ],
    ids=["shape", "dtype", "order", "number", "fact"],
)
def test_the_odd_one_is_named_on_every_rank(odd: Fingerprint, lines: list[str]) -> None:
    results = told([Fingerprint.of(BASE), odd, Fingerprint.of(BASE)])
    assert all(isinstance(error, DesyncError) for error in results)
    texts = {str(error) for error in results}
    assert len(texts) == 1
    text = texts.pop()
    assert "Ranks disagree about the model: rank 1 differs from rank 0" in text
    for line in lines:
        assert line in text


def test_ranks_of_a_process_set_go_by_their_global_numbers() -> None:
    class LastTwo:
        ranks = (2, 3)

    def body(transport: Transport) -> None:
        if transport.rank >= 2:
            shape = (transport.rank,)
            agree(Fingerprint.of([("w", shape, "float32")]), transport.subset(LastTwo()), "the model")  # type: ignore[arg-type]

    text = str(run_loopback(4, body, timeout_seconds=10)[3])
    assert "rank 3 differs from rank 2" in text
    assert "rank 2: parameter 0 = w float32[2]" in text


def test_several_odd_ones() -> None:
    shapes = [4, 5, 4, 6]
    results = told([Fingerprint.of([("w", (n,), "float32")]) for n in shapes])
    text = str(results[0])
    assert "ranks 1, 3 differ from rank 0" in text
    for line in ("ranks 0, 2: parameter 0 = w float32[4]", "rank 1: parameter 0 = w float32[5]", "rank 3: "):
        assert line in text


def test_fingerprints_survive_the_way() -> None:
    fingerprint = Fingerprint.of([('odd "name"\n', (), "float32")], {"plan": "é"})
    assert Fingerprint.decode(fingerprint.encode()) == fingerprint
    assert Fingerprint.decode(fingerprint.encode()).digest() == fingerprint.digest()
    assert len(fingerprint.digest()) == 16


def test_digests_tell_neighbouring_texts_apart() -> None:
    """Facts are kept apart: what moves from one to the next changes the digest."""
    a = Fingerprint((("x", "12"), ("y", "3")))
    b = Fingerprint((("x", "1"), ("y", "23")))
    assert a.digest() != b.digest()
