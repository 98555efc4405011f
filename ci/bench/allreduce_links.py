"""Four hosts on shaped links: how near the link's limit does an all-reduce come, and what does a small one take?

    python -m ci.bench.allreduce_links [--quick] [--json FILE]       (root, Linux: see ``python -m ci.rig check``)

The limit of n hosts is 2(n-1)/n * bytes / rate, which no all-reduce can beat; TCP's and IP's own headers
take another 4.7 % of the link (iperf3 carries 191 of 200 Mbit/s). A small message has no limit here: it is
compared with stock Horovod.
"""

from __future__ import annotations

import sys

from ci.bench.harness import Process, Target, Variant, arguments, end_on_sigterm, finish, interleave
from ci.bench.local import thread_env
from ci.rig import Rig, RigError

HOSTS, RATE_MBIT = 4, 200
LIMIT, STOCK, OURS = f"limit of a {RATE_MBIT} Mbit/s link", "stock Horovod", "hvdscale"
SMALL = {"4 B": 4, "1 KiB": 1024, "4 KiB": 4096, "16 KiB": 16384, "64 KiB": 65536}
LARGE = {"1 MB": 10**6, "10 MB": 10**7, "100 MB": 10**8}


def limit_seconds(size_bytes: int, hosts: int = HOSTS, rate_mbit: float = RATE_MBIT) -> float:
    """Every host must send and receive 2(n-1)/n of the bytes."""
    return 2 * (hosts - 1) / hosts * size_bytes * 8 / (rate_mbit * 1e6)


def sizes_and_repeats(steps: int, quick: bool) -> dict[str, tuple[int, int]]:
    """Name -> (bytes, calls timed in a launch): fewer calls the longer one takes."""
    table = {name: (size, 2 * steps) for name, size in SMALL.items()}
    table |= {"1 MB": (LARGE["1 MB"], max(3, steps // 4)), "10 MB": (LARGE["10 MB"], max(3, steps // 6))}
    if not quick:
        table["100 MB"] = (LARGE["100 MB"], 1)
    return table


def main() -> int:
    parser = arguments(__doc__ or "", rounds=3, steps=20, quick=(1, 12))
    parser.add_argument("--sizes", help="only these, as in the table: '10 MB,64 KiB'")
    options = parser.parse_args()
    sizes = sizes_and_repeats(options.steps, options.quick)
    if options.sizes:
        sizes = {name: sizes[name] for name in options.sizes.split(",")}
    work = [f"{name}:{size}:{repeats}" for name, (size, repeats) in sizes.items()]
    limits = {name: limit_seconds(size) for name, (size, _) in sizes.items() if name in LARGE}
    end_on_sigterm()  # before there is a rig to remove
    try:
        with Rig(HOSTS, RATE_MBIT) as rig:
            variants = [Variant(LIMIT, "limit", fixed=limits)] if limits else []
            for name, role, way in ((STOCK, "peer", "horovod"), (OURS, "ours", "hvdscale")):
                worker = (sys.executable, "-m", "ci.bench.workers.allreduce", "--way", way, *work)
                command, env = rig.mpirun(HOSTS, worker, thread_env(1), forward=("BENCH_FOLDER",))
                variants.append(Variant(name, role, HOSTS, (Process(command, env),)))  # type: ignore[arg-type]
            results = interleave(variants, options.rounds, options.deadline)
    except RigError as error:
        print(f"Nothing was measured. {error}", file=sys.stderr)
        return 0
    targets = [Target(LIMIT, 1 / 1.15, ("10 MB",))] if "10 MB" in limits else []
    targets.append(Target(STOCK, 1.0, tuple(name for name in sizes if name in SMALL)))
    note = f"{HOSTS} hosts, {RATE_MBIT} Mbit/s each way, one rank per host; 1 MB is 10^6 bytes."
    return finish("All-reduce of float32 over shaped links", results, targets, options, [note])


if __name__ == "__main__":
    raise SystemExit(main())
