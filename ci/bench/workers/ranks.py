"""What every bench worker does: meet its peers before timing, time steps, leave its result for the harness."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

__all__ = ["digest", "in_step", "leave_result", "mean_seconds", "median_seconds", "medians_of", "meet"]

_FOLDER = "BENCH_FOLDER"
_TURNS = "BENCH_TURNS"


def meet(rank: int, ranks: int, timeout_seconds: float = 60) -> None:
    """Wait until all ranks came here, without a word over the network: independent ranks must overlap in time."""
    folder = Path(os.environ[_FOLDER])
    (folder / f"here-{rank}").touch()
    end = time.monotonic() + timeout_seconds
    while not all((folder / f"here-{r}").exists() for r in range(ranks)):
        if time.monotonic() > end:
            raise TimeoutError(f"rank {rank}: not all of {ranks} ranks started within {timeout_seconds:.0f} s")
        time.sleep(0.002)


def in_step(step: Callable[[], object], rank: int, ranks: int) -> Callable[[], None]:
    """``step`` after which every rank waits for the slowest, as all do that keep ranks in step, and sends nothing.

    What such steps take beyond independent ones is the unevenness of the machine, and no way of training saves it.
    """
    path = str(Path(os.environ[_FOLDER]) / "in-step")
    with socket.socket(socket.AF_UNIX) as door:
        if rank == 0:
            door.bind(path)
            door.listen()
        meet(rank, ranks)
        others = [door.accept()[0] for _ in range(1, ranks)] if rank == 0 else [socket.socket(socket.AF_UNIX)]
    if rank > 0:
        others[0].connect(path)

    def together() -> None:
        step()
        if rank > 0:
            others[0].send(b".")
        for other in others:
            other.recv(1)
        if rank == 0:
            for other in others:
                other.send(b".")

    return together


def median_seconds(step: Callable[[], object], steps: int, warmup: int) -> float:
    """Median time of one call, after ``warmup`` calls that do not count.

    Where variants take turns (``turns.py``), the harness says when to call, and how often.
    """
    return medians_of({"": step}, steps, warmup)[""]


def medians_of(ways: Mapping[str, Callable[[], object]], steps: int, warmup: int) -> dict[str, float]:
    """``median_seconds`` of each of ``ways``, whose names are the metrics of the variant.

    Where variants take turns, a way has a turn of its own.
    """
    for step in ways.values():
        for _ in range(warmup):
            step()
    if _TURNS in os.environ:
        took = _in_turns(ways, os.environ[_TURNS])
    else:
        took = {name: _times(step, steps) for name, step in ways.items()}
    return {name: statistics.median(times) for name, times in took.items()}


def _times(step: Callable[[], object], steps: int) -> list[float]:
    took = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        took.append(time.perf_counter() - start)
    return took


def _in_turns(ways: Mapping[str, Callable[[], object]], path: str) -> dict[str, list[float]]:
    """Line by line: this rank says which ways it has; the harness sends the number of one of them and of steps, 0 at
    the end; this rank answers with their median."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        with connection.makefile("rw") as lines:
            lines.write(json.dumps(list(ways)) + "\n")
            lines.flush()
            while True:
                number, steps = map(int, lines.readline().split())
                if not steps:
                    return took
                name = list(ways)[number]
                times = _times(ways[name], steps)
                lines.write(f"{statistics.median(times)}\n")
                lines.flush()
                took[name] += times


def digest(arrays: Iterable[np.ndarray]) -> str:
    """The bits of a model's weights in short: ranks that were kept in step have the same."""
    hashed = hashlib.blake2b(digest_size=16)
    for array in arrays:
        hashed.update(np.ascontiguousarray(array).data)
    return hashed.hexdigest()


def mean_seconds(step: Callable[[], object], steps: int) -> float:
    """Mean time of one of ``steps`` calls: for calls of which some cost more than others."""
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def leave_result(
    rank: int, same_everywhere: str | None = None, facts: Mapping[str, float] | None = None, **seconds: float
) -> None:
    """Write this rank's figures where the harness looks for them, and what must be the same on all ranks.

    ``facts`` are figures that are no times.
    """
    result = {"same_everywhere": same_everywhere, "seconds": seconds, "facts": dict(facts or {})}
    (Path(os.environ[_FOLDER]) / f"result-{rank}.json").write_text(json.dumps(result))
