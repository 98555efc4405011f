"""Promises of a wait: it looks at once, sees what is done, and leaves the core when it lasts."""

from __future__ import annotations

import time

import pytest

from hvdscale.runtime.waiting import Stall, pauses


def test_what_is_done_is_not_waited_for() -> None:
    assert list(pauses(lambda: True)) == []


def test_a_wait_that_lasts_pauses_and_counts_the_pauses() -> None:
    looks, until = 0, time.monotonic() + 0.05

    def done() -> bool:
        nonlocal looks
        looks += 1
        return time.monotonic() > until

    cpu = time.thread_time()
    numbers = list(pauses(done))
    assert numbers == list(range(1, len(numbers) + 1))
    assert 0 < len(numbers) <= 300  # of 50 microseconds each there would be 1000: pauses grow
    assert looks > len(numbers)  # it began without pauses
    assert time.thread_time() - cpu < 0.04


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"TIME_SECONDS": "0.01"}, 1),
        ({}, 0),
        ({"TIME_SECONDS": "0.01", "DISABLE": "1"}, 0),
        ({"TIME_SECONDS": "soon"}, 0),
    ],
    ids=str,
)
def test_a_wait_that_lasts_is_told_once_by_horovods_settings(
    env: dict[str, str], said: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("TIME_SECONDS", "DISABLE"):
        monkeypatch.delenv(f"HOROVOD_STALL_CHECK_{name}", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(f"HOROVOD_STALL_CHECK_{name}", value)
    stall = Stall(3)
    for _ in range(3):
        time.sleep(0.02)
        stall.look()
    assert capsys.readouterr().err.count("Rank 3 has waited") == said
