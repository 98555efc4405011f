"""Variants that stay alive and take turns of a few steps each, seconds apart.

Launches one after the other, as ``harness.interleave`` makes them, are most of a minute apart, and on a machine shared
with others one minute differs from the next by more than what is to be measured. Here every variant is launched once.
A variant whose turn is over is stopped (SIGSTOP), so that it takes nothing from the one that runs.
"""

from __future__ import annotations

import itertools
import json
import signal
import socket
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import Progress

from ci.bench.harness import BenchError, Launch, Results, Variant, end_on_sigterm
from hvdscale.runtime.process import signal_session

__all__ = ["take_turns"]


def take_turns(
    variants: Sequence[Variant], rounds: int, steps: int, deadline_seconds: float, failures: list[str] | None = None
) -> Results:
    """``rounds`` rounds in which each variant trains ``steps`` steps; one sample per round, its slowest rank's median.

    Workers time with ``ranks.median_seconds``, once, or with ``ranks.medians_of``: then variants take turns for each
    metric. ``deadline_seconds`` is for the start, and for each turn. With ``failures``, a peer that does not start is
    left out, and what it said is appended there.

    Raises:
        BenchError: a process ended before it was told to, or a deadline passed; all are ended by then.
    """
    end_on_sigterm()
    with ExitStack() as stack, Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=None)
        players = []
        for variant in variants:
            progress.update(bar, description=f"starting {variant.name}")
            try:
                players.append(stack.enter_context(_Player(variant, deadline_seconds)))
            except BenchError as error:
                if failures is None or variant.role != "peer":
                    raise
                failures.append(str(error))
            progress.advance(bar)
        metrics = list(dict.fromkeys(metric for player in players for metric in player.metrics))
        progress.update(bar, total=len(variants) + rounds * sum(len(player.metrics) for player in players))
        for turn, metric in itertools.product(range(rounds), metrics):
            for player in (p for p in players if metric in p.metrics):
                progress.update(bar, description=f"round {turn + 1} of {rounds}: {player.variant.name} {metric}")
                player.play(metric, steps)
                progress.advance(bar)
        return Results(
            tuple(player.variant for player in players), {player.variant.name: player.end() for player in players}
        )


class _Player:
    """One variant, launched and stopped until its turn.

    Attributes:
        metrics: what it can be timed by, as its first rank says; one without a name where there is no choice.
    """

    def __init__(self, variant: Variant, deadline_seconds: float) -> None:
        self.variant = variant
        self.metrics: list[str] = []
        self._samples: dict[str, list[float]] = {}
        self._deadline_seconds = deadline_seconds
        self._lines: list[TextIO] = []
        self._stack = ExitStack()

    def __enter__(self) -> _Player:
        with self._stack as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hvdscale-bench-")))
            door = stack.enter_context(socket.socket(socket.AF_UNIX))
            door.bind(str(folder / "turns"))
            door.listen()
            door.settimeout(0.2)
            self._launch = stack.enter_context(Launch(self.variant, folder, {"BENCH_TURNS": str(folder / "turns")}))
            end = time.monotonic() + self._deadline_seconds
            while len(self._lines) < self.variant.ranks:
                self._lines += self._come_in(stack, door)
                if time.monotonic() > end:
                    raise self._launch.error(f"was not ready within {self._deadline_seconds:.0f} s")
                if any(process.poll() is not None for process in self._launch.processes):
                    raise self._launch.error("ended before its first turn")
            told = [json.loads(lines.readline()) for lines in self._lines]  # the same by all
            self.metrics = told[0]
            self._samples = {metric: [] for metric in self.metrics}
            self._signal(signal.SIGSTOP)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def play(self, metric: str, steps: int) -> None:
        """Note the seconds of one step: the slowest rank's median."""
        self._signal(signal.SIGCONT)
        self._say(self.metrics.index(metric), steps)
        try:
            answers = [lines.readline() for lines in self._lines]
        except TimeoutError:
            raise self._launch.error(f"took over {self._deadline_seconds:.0f} s for {steps} steps") from None
        if "" in answers:
            self._wait_for_an_end(10)  # what it has to say comes after its connection is closed
            raise self._launch.error("ended in the middle of a turn")
        self._signal(signal.SIGSTOP)
        self._samples[metric].append(max(map(float, answers)))

    def end(self) -> dict[str, list[float]]:
        """Let the ranks leave their results, and check them. The samples by metric, named as in the results.

        Facts beside them, which are no times, hold for the whole run: the largest of any rank, in each round.
        """
        self._signal(signal.SIGCONT)
        self._say(0, 0)
        left = self._launch.finish(self._deadline_seconds)
        timed = dict(zip(left[0]["seconds"], self._samples.values(), strict=True))
        rounds = max(map(len, timed.values()))
        facts = {name: [max(rank["facts"][name] for rank in left)] * rounds for name in left[0]["facts"]}
        return timed | facts

    def _come_in(self, stack: ExitStack, door: socket.socket) -> list[TextIO]:
        try:
            connection = stack.enter_context(door.accept()[0])
        except TimeoutError:
            return []
        connection.settimeout(self._deadline_seconds)
        return [stack.enter_context(connection.makefile("rw"))]

    def _say(self, way: int, steps: int) -> None:
        for lines in self._lines:
            lines.write(f"{way} {steps}\n")
            lines.flush()

    def _wait_for_an_end(self, seconds: float) -> None:
        """Wait until one of the processes has ended, ``seconds`` at most."""
        end = time.monotonic() + seconds
        while all(process.poll() is None for process in self._launch.processes) and time.monotonic() < end:
            time.sleep(0.01)

    def _signal(self, number: signal.Signals) -> None:
        for process in self._launch.processes if self.variant.may_be_stopped else ():
            signal_session(process, number)
