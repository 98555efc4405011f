"""Benches run their peers side by side: launches interleaved A B C A B C, medians over rounds, ratios to a limit.

A *variant* is a set of processes that do the same work in one way. Each of its ranks leaves one result
(see ``workers/ranks.py``); a launch counts as its slowest rank, a variant as the median of its launches.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hvdscale.runtime.process import end_session

__all__ = [
    "BenchError",
    "Launch",
    "Process",
    "Results",
    "Target",
    "Variant",
    "arguments",
    "end_on_sigterm",
    "finish",
    "interleave",
    "launch",
    "run_once",
    "slowest",
]

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).resolve().parents[2]
# A launch starts from an environment free of an outer job's ranks and of the settings under test.
_PRIVATE = ("OMPI_", "PMIX_", "PMI_", "HOROVOD_", "MASTER_", "TF_CONFIG", "HVDSCALE_", "BENCH_")

Metrics = dict[str, float]


class BenchError(RuntimeError):
    """A launch failed, ran past its deadline, or left no result."""


@dataclass(frozen=True)
class Process:
    """One process of a launch: a command and what its environment has beyond the common one."""

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Variant:
    """One way to do the work. ``ranks`` is how many results a launch must leave; units are seconds throughout.

    ``fixed`` replaces the launch by known figures, such as a limit that follows from a formula. ``may_be_stopped`` is
    false for processes that take each other for dead when they are stopped for a few seconds.
    """

    name: str
    role: Literal["limit", "peer", "ours"]
    ranks: int = 1
    processes: tuple[Process, ...] = ()
    fixed: Mapping[str, float] | None = None
    may_be_stopped: bool = True

    def __post_init__(self) -> None:
        if (self.fixed is None) == (not self.processes):
            raise ValueError(f"Variant {self.name!r} needs either processes or fixed figures; it has both or neither.")


@dataclass(frozen=True)
class Target:
    """The other's figure over ours must be ``at_least`` this, in every one of ``metrics`` (``None``: in all)."""

    against: str
    at_least: float
    metrics: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Results:
    """``samples[variant][metric]`` with one value per round, and what may be asked of them.

    They are seconds, but for the metrics in ``bytes_metrics``.
    """

    variants: tuple[Variant, ...]
    samples: Mapping[str, Mapping[str, Sequence[float]]]
    bytes_metrics: frozenset[str] = frozenset()

    def unit(self, metric: str) -> str:
        return "bytes" if metric in self.bytes_metrics else "seconds"

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(m for by_metric in self.samples.values() for m in by_metric))

    def median(self, variant: str, metric: str) -> float:
        return statistics.median(self.samples[variant][metric])

    def ratio(self, metric: str, of: str, to: str) -> float:
        """``of`` over ``to``: above 1, ``to`` is the faster, or takes the less memory.

        The median of what each round gave: what slows the machine for a while slows both sides of a round. Of what was
        not measured once a round it is the ratio of medians.
        """
        above, below = self.samples[of][metric], self.samples[to][metric]
        if len(above) != len(below):
            return self.median(of, metric) / self.median(to, metric)
        return statistics.median(a / b for a, b in zip(above, below, strict=True))

    def ratio_to(self, role: str, metric: str, variant: str) -> float | None:
        """``variant``'s time over that of the first variant with this role; ``None`` where that one has no figure."""
        base = next((v.name for v in self.variants if v.role == role and metric in self.samples[v.name]), None)
        return None if base is None else self.ratio(metric, variant, base)

    def judged(self, targets: Sequence[Target]) -> list[dict[str, object]]:
        """Each target with the ratio that was reached, one row per metric."""
        ours = next(v.name for v in self.variants if v.role == "ours")
        rows = []
        for target in targets:
            for metric in self.metrics if target.metrics is None else target.metrics:
                reached = self.ratio(metric, of=target.against, to=ours)
                rows.append(
                    {
                        "metric": metric,
                        "against": target.against,
                        "reached": reached,
                        "at_least": target.at_least,
                        "met": reached >= target.at_least,
                    }
                )
        return rows


def run_once(variant: Variant, deadline_seconds: float) -> Metrics:
    """Launch the variant's processes together; the slowest rank's figure for each metric.

    Raises:
        BenchError: a process ended with an error or the deadline passed; all groups are killed by then.
    """
    if variant.fixed is not None:
        return dict(variant.fixed)
    with tempfile.TemporaryDirectory(prefix="hvdscale-bench-") as folder:
        left = launch(variant, Path(folder), deadline_seconds)
    return slowest(left)


def slowest(left: Sequence[Mapping[str, Metrics]]) -> Metrics:
    """Of what the ranks left: each metric's largest figure."""
    return {metric: max(result["seconds"][metric] for result in left) for metric in left[0]["seconds"]}


def launch(variant: Variant, folder: Path, deadline_seconds: float) -> list[dict[str, Any]]:
    """Start the variant's processes together, with ``BENCH_FOLDER`` naming ``folder``; what each rank left there.

    Raises:
        BenchError: as ``run_once``.
    """
    with Launch(variant, folder) as started:
        return started.finish(deadline_seconds)


class Launch:
    """The processes of a variant, started together. Leaving the context ends what is left of them.

    Args:
        variant: what to start.
        folder: where ranks leave their results (``BENCH_FOLDER``), and the processes what they print.
        env: what all of them have in their environment beyond it.
    """

    def __init__(self, variant: Variant, folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.variant = variant
        self.processes: list[subprocess.Popen[bytes]] = []
        self._folder = folder
        self._env = dict(env or {})

    def __enter__(self) -> Launch:
        common = {
            **{k: v for k, v in os.environ.items() if not k.startswith(_PRIVATE)},
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "BENCH_FOLDER": str(self._folder),
            **self._env,
        }
        try:
            for i, process in enumerate(self.variant.processes):
                with (self._folder / f"log-{i}").open("wb") as out:
                    self.processes.append(
                        subprocess.Popen(
                            process.command,
                            stdin=subprocess.DEVNULL,
                            stdout=out,
                            stderr=subprocess.STDOUT,
                            env={**common, **process.env},
                            cwd=REPOSITORY,
                            start_new_session=True,
                        )
                    )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            end_session(process)

    def finish(self, deadline_seconds: float) -> list[dict[str, Any]]:
        """Wait for all processes; what each rank left.

        Raises:
            BenchError: one ended with an error or not in time, or ranks ended with different weights.
        """
        end = time.monotonic() + deadline_seconds
        codes = [_wait(p, end) for p in self.processes]
        if None in codes:
            raise self.error(f"ran past its deadline of {deadline_seconds:.0f} s")
        if any(codes):
            raise self.error(f"ended with {codes}")
        left = [json.loads(p.read_text()) for p in sorted(self._folder.glob("result-*.json"))]
        if len(left) != self.variant.ranks:
            raise BenchError(f"{self.variant.name}: {len(left)} ranks left a result, {self.variant.ranks} must.")
        if len({result["same_everywhere"] for result in left}) > 1:
            raise BenchError(
                f"{self.variant.name}: its ranks ended with different weights, so it did not keep them in step."
            )
        return left

    def error(self, why: str) -> BenchError:
        """With what the processes printed; they are ended first, so that all of it is there."""
        self.__exit__()
        said = "\n".join(log.read_text(errors="replace")[-3000:] for log in sorted(self._folder.glob("log-*")))
        return BenchError(f"{self.variant.name} {why}. It said:\n{said}")


def _wait(process: subprocess.Popen[bytes], end: float) -> int | None:
    try:
        return process.wait(timeout=max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None


def end_on_sigterm() -> None:
    """A bench that is told to end leaves as by an exception, so that what it started is killed."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


def interleave(
    variants: Sequence[Variant],
    rounds: int,
    deadline_seconds: float,
    run: Callable[[Variant, float], Metrics] = run_once,
) -> Results:
    """Run all variants once, then all again, ``rounds`` times: a slow minute of the machine falls on all alike."""
    end_on_sigterm()
    samples: dict[str, dict[str, list[float]]] = {v.name: {} for v in variants}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=rounds * len(variants))
        for turn in range(rounds):
            for variant in variants:
                progress.update(bar, description=f"round {turn + 1} of {rounds}: {variant.name}")
                for metric, value in run(variant, deadline_seconds).items():
                    samples[variant.name].setdefault(metric, []).append(value)
                progress.advance(bar)
    return Results(tuple(variants), samples)


def arguments(about: str, rounds: int, steps: int, quick: tuple[int, int]) -> argparse.ArgumentParser:
    """The options all benches share. ``quick`` is the (rounds, steps) of ``--quick``."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)

    class Quick(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None):  # type: ignore[no-untyped-def]
            namespace.rounds, namespace.steps = quick
            namespace.quick = True

    parser.add_argument(
        "--quick", nargs=0, default=False, action=Quick, help=f"{quick[0]} round(s) of {quick[1]} steps"
    )
    parser.add_argument("--rounds", type=_positive, default=rounds, help="turns of each variant (%(default)s)")
    parser.add_argument("--steps", type=_positive, default=steps, help="timed steps in a turn (%(default)s)")
    parser.add_argument("--deadline", type=float, default=120, help="seconds a launch may take (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write samples, medians and ratios there")
    parser.add_argument("--strict", action="store_true", help="exit with 1 when a target is missed")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def finish(
    title: str, results: Results, targets: Sequence[Target], options: argparse.Namespace, notes: Sequence[str] = ()
) -> int:
    """Print the table and the targets, write the JSON; the exit code."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(_table(title, results))
    for note in notes:
        console.print(note, highlight=False)
    judged = results.judged(targets)
    for row in judged:
        verdict = "met" if row["met"] else "[bold red]missed[/]"
        console.print(
            f"{row['metric']}: {row['reached']:.2f} of {row['against']}, "
            f"target at least {row['at_least']:.2f}: {verdict}",
            highlight=False,
        )
    if options.json:
        options.json.write_text(json.dumps(as_json(title, results, judged, notes), indent=2) + "\n")
    return int(options.strict and not all(row["met"] for row in judged))


def as_json(
    title: str, results: Results, judged: Sequence[Mapping[str, object]], notes: Sequence[str]
) -> dict[str, object]:
    """Everything the table shows and the samples behind it."""
    rows = []
    for variant in results.variants:
        for metric, samples in results.samples[variant.name].items():
            rows.append(
                {
                    "variant": variant.name,
                    "role": variant.role,
                    "metric": metric,
                    f"samples_{results.unit(metric)}": list(samples),
                    f"median_{results.unit(metric)}": results.median(variant.name, metric),
                    "over_limit": results.ratio_to("limit", metric, variant.name),
                    "over_ours": results.ratio_to("ours", metric, variant.name),
                }
            )
    return {"title": title, "notes": list(notes), "results": rows, "targets": list(judged)}


def _table(title: str, results: Results) -> Table:
    table = Table(title=title)
    for name in ("", "variant"):
        table.add_column(name)
    for name in ("median", "min .. max", "limit / time", "time / limit", "time / ours"):
        table.add_column(name, justify="right")
    for metric in results.metrics:
        for i, variant in enumerate(v for v in results.variants if metric in results.samples[v.name]):
            samples = results.samples[variant.name][metric]
            over_limit = results.ratio_to("limit", metric, variant.name)
            over_ours = results.ratio_to("ours", metric, variant.name)
            shown = _megabytes if metric in results.bytes_metrics else _shown
            table.add_row(
                metric if i == 0 else "",
                f"[bold]{variant.name}[/]" if variant.role == "ours" else variant.name,
                shown(results.median(variant.name, metric)),
                f"{shown(min(samples))} .. {shown(max(samples))}",
                f"{1 / over_limit:.2f}" if over_limit else "",
                f"{over_limit:.2f}" if over_limit else "",
                f"{over_ours:.2f}" if over_ours else "",
            )
        table.add_section()
    return table


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def _shown(seconds: float) -> str:
    return (
        f"{seconds:.2f} s"
        if seconds >= 1
        else f"{seconds * 1e3:.1f} ms"
        if seconds >= 1e-3
        else f"{seconds * 1e6:.0f} us"
    )
