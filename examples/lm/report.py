"""Losses and speed of the language model examples: progress, TensorBoard scalars, the plot."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass
class Report:
    """Losses and speed of a run: shown on rank 0 as they come, and written at the end.

    ``mean`` averages a float64 vector over the ranks; every rank calls ``evaluated`` and ``finish``.
    """

    rank: int
    ranks: int
    steps: int
    tokens_per_step: int  # of one rank
    mean: Callable[[np.ndarray], np.ndarray]
    logdir: str | None = None
    train: list[float] = field(default_factory=list)  # one a step: this rank's, once averaged all ranks'
    held_out: dict[int, float] = field(default_factory=dict)  # by the number of steps taken
    agreement: Callable[[], Mapping[str, float]] = dict  # running figures of the plan, by name

    def __post_init__(self) -> None:
        self._averaged = 0
        self._seconds = 0.0
        self._timed_steps = 0
        self._since: float | None = None
        self._bar = _Bar(self.steps) if self.rank == 0 else None
        self._scalars = Scalars(self.logdir) if self.rank == 0 and self.logdir else None

    def say(self, line: str) -> None:
        if self._bar:
            self._bar.say(line)

    def step(self, loss: float) -> None:
        """Take the loss of this rank's step. The first step after a pause compiles or warms up: it is not timed."""
        now = time.perf_counter()
        if self._since is not None:
            self._seconds += now - self._since
            self._timed_steps += 1
        self._since = now
        self.train.append(float(loss))
        if self._bar:
            self._bar.step(len(self.train), float(loss), self.tokens_per_second)

    def evaluated(self, loss: float, tokens: int) -> None:
        """Take the mean held-out ``loss`` over this rank's ``tokens``; ranks with more tokens weigh more."""
        total, count = self.mean(np.array([loss * tokens, tokens], np.float64))
        fresh = np.array(self.train[self._averaged :], np.float64)
        if fresh.size:
            self.train[self._averaged :] = self.mean(fresh).tolist()
        step = len(self.train)
        self.held_out[step] = float(total / max(count, 1))
        self.say(f"step {step:>5}  held-out loss {self.held_out[step]:.4f}")
        if self._scalars:
            for i in range(self._averaged, step):
                self._scalars.write("loss/train", self.train[i], i + 1)
            self._scalars.write("loss/held-out", self.held_out[step], step)
            self._scalars.write("tokens per second", self.tokens_per_second * self.ranks, step)
            for name, value in self.agreement().items():
                self._scalars.write(f"sync/{name}", value, step)
        self._averaged = step
        self._since = None

    @property
    def tokens_per_second(self) -> float:
        """Of this rank, evaluations left out."""
        return self.tokens_per_step * self._timed_steps / self._seconds if self._seconds else 0.0

    def finish(self, plot: str | None = None, record: str | None = None) -> None:
        """The summary, and the files asked for. The last ``evaluated`` came after the last ``step``."""
        mine = self.tokens_per_second
        everyone = float(self.mean(np.array([mine]))[0]) * self.ranks
        if not self._bar:
            return
        self._bar.close()
        before, after = self.held_out[min(self.held_out)], self.held_out[max(self.held_out)]
        say(f"speed          {everyone / self.ranks:,.0f} tokens/s per rank, {everyone:,.0f} tokens/s in all")
        agreed = self.agreement()
        if agreed:
            say(f"agreement      {agreed['rounds']:.0f} rounds, {agreed['bytes_sent'] / 1e6:,.1f} MB sent by rank 0")
        say(f"held-out loss  {before:.4f} before, {after:.4f} after {len(self.train)} steps")
        if self._scalars:
            self._scalars.close()
        if record:
            losses = {"train": self.train, "held_out": {str(k): v for k, v in self.held_out.items()}}
            Path(record).write_text(json.dumps(losses))
        if plot:
            _plot(plot, self.train, self.held_out)


def say(line: str) -> None:
    """A line in one piece: ``print`` hands over its end apart, and a launcher then marks that as a line of its own."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


class _Bar:
    """A progress bar on a terminal; a plain line for every tenth of the run elsewhere."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._steps = steps
        self._console = Console()
        self._drawn = _on_screen()
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        self._progress = Progress(*columns, console=self._console)
        self._task = self._progress.add_task("", total=steps)
        if self._drawn:
            self._progress.start()

    def step(self, step: int, loss: float, tokens_per_second: float) -> None:
        text = f"loss {loss:.4f}" + (f"  {tokens_per_second:,.0f} tokens/s" if tokens_per_second else "")
        if self._drawn:
            self._progress.update(self._task, completed=step, description=f"{text} (rank 0)")
        elif step % max(1, self._steps // 10) == 0:
            self.say(f"step {step:>5}  {text} (rank 0)")

    def say(self, line: str) -> None:
        if self._drawn:
            self._progress.print(line, highlight=False)
        else:
            say(line)

    def close(self) -> None:
        if self._drawn:
            self._progress.stop()


def _on_screen() -> bool:
    """Whether a terminal shows our output. Open MPI gives each rank one of its own: mpirun's output is what counts."""
    if not sys.stdout.isatty() or "OMPI_COMM_WORLD_RANK" not in os.environ:
        return sys.stdout.isatty()
    try:
        return os.readlink(f"/proc/{os.getppid()}/fd/1").startswith(("/dev/pts/", "/dev/tty"))
    except OSError:  # no such file system, or mpirun is someone else's process
        return False


class Scalars:
    """TensorBoard scalars through TensorBoard's own record format: needs neither TensorFlow nor torch."""

    def __init__(self, folder: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        Path(folder).mkdir(parents=True, exist_ok=True)
        path = Path(folder) / f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
        self._records = RecordWriter(path.open("wb"))
        self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def write(self, tag: str, value: float, step: int) -> None:
        summary = self._summary(value=[self._summary.Value(tag=tag, simple_value=value)])
        event = self._event(wall_time=time.time(), step=step, summary=summary)
        self._records.write(event.SerializeToString())
        self._records.flush()

    def close(self) -> None:
        self._records.close()


def _plot(path: str, train: Sequence[float], held_out: dict[int, float]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(range(1, len(train) + 1), train, linewidth=1, label="training, mean of ranks")
    axes.plot(list(held_out), list(held_out.values()), "o-", label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
