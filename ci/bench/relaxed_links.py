"""Four hosts on slow links train a 3 M-parameter GPT: what does a step take when ranks meet seldom, and what travels?

    python -m ci.bench.relaxed_links [--quick] [--json FILE]       (root, Linux: see ``python -m ci.rig check``)
    python -m ci.bench.relaxed_links --rates 25 --ways "every step" --record FILE     a part now, the rest another time

A step's seconds are a mean over whole periods, rounds included. Together with the recorded curves
(``ci.bench.relaxed_curves``) they give the time to the loss that synchronous training has after 300 steps: steps
needed, by the curve, times measured seconds of a step.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ci.bench.harness import Process, Variant, arguments, end_on_sigterm, launch, slowest
from ci.bench.local import MPIRUN, thread_env
from ci.bench.relaxed_curves import STEPS, SYNCHRONOUS, Curve, read_curves
from ci.bench.relaxed_plans import BEST, DDP, IN_THE_WAY, INDEPENDENT, PLANS, POST_LOCAL, SELDOM, SOONEST, sent_bytes
from ci.bench.workers.torch_step import WIDTH
from ci.rig import HEADER_BYTES, Rig, RigError
from hvdscale.sync import EveryStep

HOSTS = 4
WAYS = (
    INDEPENDENT,
    DDP,
    POST_LOCAL,
    "every step",
    "local SGD, 1",
    "local SGD, 32",
    "DiLoCo, 32",
    IN_THE_WAY,
    SELDOM,
    SOONEST,
    BEST,
)
# The least of the step without communication over the way's step, by rate in Mbit/s.
OF_LIMIT = {100: {"local SGD, 32": 0.9, "DiLoCo, 32": 0.9, SELDOM: 0.9}, 25: {SELDOM: 0.9}}
SOONER_THAN_DDP = {100: 2.5, 25: 7.0}
HIDDEN = 0.8  # of what training waits for a transfer, by overlap, where the steps meanwhile take longer
BYTES_WITHIN = 0.05
EVERY_ONE_WITHIN = 1.05


@dataclass
class Measured:
    """Samples of one way at one rate: seconds of a step, and bytes a host sent, by who counted them."""

    seconds: list[float] = field(default_factory=list)
    wire_bytes: float = 0.0  # by the network interface, headers of packets and acknowledgements included
    data_bytes: float = 0.0  # the same without headers
    counted_bytes: float = 0.0
    waited_seconds: float = 0.0  # of the training thread, in rounds

    @property
    def step(self) -> float:
        return statistics.median(self.seconds)


def steps_of(way: str, steps: int) -> int:
    """Steps of ways that meet often take seconds each: fewer say as much."""
    plan = PLANS.get(way)
    if isinstance(plan, EveryStep) and plan.coded:
        return max(2, steps // 4)
    if way == DDP or isinstance(plan, EveryStep) or getattr(plan, "every", 0) == 1:
        return max(2, steps // 16)
    return max(8, steps // 2) if way == POST_LOCAL else steps


def worker(way: str, steps: int) -> tuple[str, ...]:
    module = "ci.bench.workers.relaxed_step"
    return (sys.executable, "-m", module, "--way", way, "--steps", str(steps_of(way, steps)))


def read_record(path: Path | None) -> dict[float | None, dict[str, Measured]]:
    """What earlier calls left there, by rate and way."""
    recorded = json.loads(path.read_text()) if path and path.exists() else {}
    return {
        None if rate == "unshaped" else float(rate): {way: Measured(**one) for way, one in by_way.items()}
        for rate, by_way in recorded.items()
    }


def write_record(path: Path | None, measured: Mapping[float | None, Mapping[str, Measured]]) -> None:
    if path:
        rates = {"unshaped" if rate is None else f"{rate:g}": by_way for rate, by_way in measured.items()}
        ways = {
            rate: {way: asdict(one) for way, one in by_way.items() if one.seconds} for rate, by_way in rates.items()
        }
        path.write_text(json.dumps(ways, indent=1) + "\n")


def measure(rig: Rig | None, ways: Sequence[str], options: Any) -> Iterator[tuple[str, Measured]]:
    """All ways in turn, ``options.rounds`` times: each way with its samples so far, after each launch."""
    found = {way: Measured() for way in ways}
    for _ in range(options.rounds):
        for way in ways:
            command: tuple[str, ...] = worker(way, options.steps)
            env = {**thread_env(1), "GLOO_SOCKET_IFNAME": "eth0" if rig else "lo"}
            if rig:
                command, env = rig.mpirun(HOSTS, command, env, forward=("BENCH_FOLDER",))
            else:
                command = (*MPIRUN, "--oversubscribe", "-np", str(HOSTS), *command)
            variant = Variant(way, "ours", HOSTS, (Process(command, env),))
            with tempfile.TemporaryDirectory(prefix="hvdscale-bench-") as folder:
                left = launch(variant, Path(folder), options.deadline)
            found[way].seconds.append(slowest(left)["step"])
            for name in ("wire_bytes", "data_bytes", "counted_bytes", "waited_seconds"):
                setattr(found[way], name, statistics.mean(rank["facts"][name] for rank in left))
            print(f"{way}: {found[way].seconds[-1]:.3f} s a step", file=sys.stderr, flush=True)  # minutes lie between
            yield way, found[way]


def step_table(measured: Mapping[float | None, Mapping[str, Measured]]) -> Table:
    shown = Table(title="Seconds of a step, and the part of it that is left without communication")
    shown.add_column("way")
    for rate in measured:
        shown.add_column("unshaped" if rate is None else f"{rate:g} Mbit/s", justify="right")
    for way in dict.fromkeys(way for by_way in measured.values() for way in by_way):
        cells = []
        for by_way in measured.values():
            limit = by_way[INDEPENDENT].step
            cells.append(f"{by_way[way].step:.3f} s  {limit / by_way[way].step:.2f}" if way in by_way else "")
        shown.add_row(way, *cells)
    return shown


def bytes_table(measured: Mapping[float | None, Mapping[str, Measured]], steps: int) -> Table:
    shown = Table(
        title="MB a host sent while timed: by its network interface, the same without the packets' headers "
        f"({HEADER_BYTES} bytes each), by metrics(), by the formula"
    )
    for name in ("rate", "way", "interface", "data", "metrics()", "formula", "interface / formula", "data / formula"):
        shown.add_column(name, justify="left" if name == "way" else "right")
    for rate, by_way in measured.items():
        for way, one in by_way.items():
            if way in PLANS:
                told = sent_bytes(PLANS[way], HOSTS, steps_of(way, steps))
                counts = (one.wire_bytes, one.data_bytes, one.counted_bytes, told)
                sent = [f"{b / 1e6:.2f}" if b else "" for b in counts]
                ratios = [f"{b / told:.3f}" if b else "" for b in counts[:2]]
                shown.add_row("unshaped" if rate is None else f"{rate:g}", way, *sent, *ratios)
    return shown


def sooner(curves: Mapping[str, Curve], by_way: Mapping[str, Measured]) -> dict[str, tuple[float, float]]:
    """By way: seconds to the loss of synchronous training after 300 steps, and how many times sooner than DDP."""
    goal = curves[SYNCHRONOUS].at(STEPS)
    until_ddp = STEPS * by_way[DDP].step
    found = {DDP: (until_ddp, 1.0)}
    for way, curve in curves.items():
        needed = curve.reaches(goal)
        if way in by_way and needed is not None:
            found[way] = (needed * by_way[way].step, until_ddp / (needed * by_way[way].step))
    return found


def time_table(curves: Mapping[str, Curve], measured: Mapping[float | None, Mapping[str, Measured]]) -> Table:
    shown = Table(title=f"Seconds to the loss of {STEPS} synchronous steps (steps needed x seconds of a step)")
    shown.add_column("way")
    for rate in measured:
        shown.add_column(f"{rate:g} Mbit/s", justify="right")
    by_rate = [sooner(curves, by_way) for by_way in measured.values()]
    for way in dict.fromkeys(way for found in by_rate for way in found):
        shown.add_row(way, *(f"{f[way][0]:,.0f} s  {f[way][1]:.2f}x DDP" if way in f else "" for f in by_rate))
    return shown


def judged(
    measured: Mapping[float | None, Mapping[str, Measured]], curves: Mapping[str, Curve], steps: int
) -> list[tuple[str, float, float, bool]]:
    """(what, reached, target, met) of every target that was measured."""
    rows = []
    for rate, by_way in measured.items():
        at = "unshaped" if rate is None else f"{rate:g} Mbit/s"
        for way, least in OF_LIMIT.get(rate, {}).items() if rate else ():
            if way in by_way:
                reached = by_way[INDEPENDENT].step / by_way[way].step
                rows.append((f"{at}: {way}, of the step without communication", reached, least, reached >= least))
        if rate in SOONER_THAN_DDP and DDP in by_way and SYNCHRONOUS in curves:
            best = max((ratio for way, (_, ratio) in sooner(curves, by_way).items() if way in PLANS), default=0.0)
            least = SOONER_THAN_DDP[rate]
            rows.append((f"{at}: best plan, times sooner than DDP at its loss", best, least, best >= least))
        if {"every step", "local SGD, 1"} <= set(by_way):
            reached = by_way["local SGD, 1"].step / by_way["every step"].step
            rows.append((f"{at}: every=1 over every step", reached, EVERY_ONE_WITHIN, reached <= EVERY_ONE_WITHIN))
        if {SELDOM, IN_THE_WAY} <= set(by_way):
            reached = 1 - by_way[SELDOM].waited_seconds / by_way[IN_THE_WAY].waited_seconds
            rows.append((f"{at}: hidden by overlap, of the seconds in rounds", reached, HIDDEN, reached >= HIDDEN))
        for way, one in by_way.items():
            counts = {"bytes on the wire": one.wire_bytes, "without headers": one.data_bytes}
            for what, sent in counts.items() if way in PLANS else ():
                if sent:
                    reached = sent / sent_bytes(PLANS[way], HOSTS, steps_of(way, steps))
                    met = abs(reached - 1) <= BYTES_WITHIN
                    rows.append((f"{at}: {way}, {what} over the formula", reached, 1.0, met))
    return rows


def main() -> int:
    parser = arguments(__doc__ or "", rounds=1, steps=32, quick=(1, 8))
    parser.add_argument("--rates", default="200,100,25", help="Mbit/s, with commas between; none: no rig (%(default)s)")
    parser.add_argument("--mtu", type=int, default=1500, help="bytes of a packet, 9000 for jumbo frames (%(default)s)")
    parser.add_argument("--ways", help=f"only these, with ; between: {'; '.join(WAYS)}")
    parser.add_argument("--record", type=Path, help="a JSON that each launch is added to; what it holds is shown, too")
    options = parser.parse_args()
    ways = tuple(way.strip() for way in options.ways.split(";")) if options.ways else WAYS
    rates = [None] if options.rates == "none" else [float(rate) for rate in options.rates.split(",")]
    ways = tuple(dict.fromkeys((INDEPENDENT, *ways)))
    measured = read_record(options.record)
    end_on_sigterm()  # before there is a rig to remove
    try:
        for rate in rates:
            with nullcontext() if rate is None else Rig(HOSTS, rate, options.mtu) as rig:
                for way, one in measure(rig, ways, options):
                    measured.setdefault(rate, {})[way] = one
                    write_record(options.record, measured)
    except RigError as error:
        print(f"Nothing was measured. {error}", file=sys.stderr)
        return 0
    curves = read_curves()
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(step_table(measured))
    shaped = {rate: by_way for rate, by_way in measured.items() if rate is not None}
    if shaped:
        console.print(bytes_table(shaped, options.steps))
        if SYNCHRONOUS in curves and all(DDP in by_way for by_way in shaped.values()):
            console.print(time_table(curves, shaped))
    rows = judged(measured, curves, options.steps)
    for what, reached, target, met in rows:
        verdict = "met" if met else "[bold red]missed[/]"
        console.print(f"{what}: {reached:.3f}, target {target:g}: {verdict}", highlight=False)
    if options.json:
        seconds = {str(rate): {way: one.seconds for way, one in by_way.items()} for rate, by_way in measured.items()}
        options.json.write_text(json.dumps({"width": WIDTH, "seconds": seconds, "targets": rows}, indent=2) + "\n")
    return int(options.strict and not all(met for *_, met in rows))


if __name__ == "__main__":
    raise SystemExit(main())
