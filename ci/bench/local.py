"""Variants of a bench on this host: plain processes for the frameworks' own ways, mpirun for Horovod's."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

from ci.bench.harness import BIN, Process, Variant

__all__ = ["MPIRUN", "free_ports", "local_variants", "settings_to_try", "thread_env"]

# No binding: bound ranks would share their one core with Horovod's own thread, for stock and for us alike.
MPIRUN = (str(BIN / "mpirun"), "--bind-to", "none")
_MPI_WAYS = ("horovod", "hvdscale", "local", "sharded", "central", "1f1b", "zb")


def settings_to_try(text: str) -> dict[str, str]:
    """``NAME=VALUE,NAME=VALUE`` of the option ``--also``."""
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(name and equals for name, equals, _ in pairs):
        raise argparse.ArgumentTypeError(f"must read NAME=VALUE,NAME=VALUE, not {text!r}")
    return {name: value for name, _, value in pairs}


def thread_env(threads: int) -> dict[str, str]:
    """The same number of compute threads in every framework."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")
    return dict.fromkeys(names, str(threads))


def local_variants(
    worker: str,
    ranks: int,
    roles: Mapping[str, str],
    names: Mapping[str, str],
    steps: int,
    also: Sequence[Mapping[str, str]] = (),
    more: Sequence[str] = (),
) -> tuple[tuple[Variant, ...], str]:
    """One variant per way, all with the same threads per rank; and the sentence that says so.

    Each environment in ``also`` makes one more variant of hvdscale, for trying settings; ``more`` goes to every worker.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    variants = []
    trials = [("hvdscale", "peer", " ".join(f"{k}={v}" for k, v in extra.items()), extra) for extra in also]
    for way, role, name, extra in [*((way, role, names[way], {}) for way, role in roles.items()), *trials]:
        command = (sys.executable, "-m", worker, "--way", way, "--steps", str(steps), *more)
        env = {**thread_env(threads), **extra}
        if way in _MPI_WAYS:
            processes = (Process((*MPIRUN, "-np", str(ranks), *command), env),)
        else:
            env |= {"BENCH_RANKS": str(ranks), "BENCH_PORTS": ",".join(map(str, free_ports(ranks)))}
            processes = tuple(Process(command, {**env, "BENCH_RANK": str(rank)}) for rank in range(ranks))
        alive = way != "strategy"  # TensorFlow's ranks send each other heartbeats
        variants.append(Variant(name, role, ranks, processes, may_be_stopped=alive))  # type: ignore[arg-type]
    return tuple(variants), f"Every rank of every variant computes on {threads} thread(s)."


def free_ports(count: int) -> list[int]:
    """Ports of this host that nobody listens on now, all different."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
