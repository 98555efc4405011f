"""Promises of a wait: it looks at once, sees what is done, and leaves the core when it lasts."""

from __future__ import annotations

import time

from hvdscale.runtime.waiting import pauses


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
