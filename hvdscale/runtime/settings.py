"""Transport and thread defaults that ``init()`` puts in force when the user has not chosen: each with its reason.

Measured on ranks that share cores, and on hosts joined by slow links; ``ci/bench`` repeats the measurements.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path

from hvdscale.runtime.launch import Launch

__all__ = ["FRONT", "Setting", "apply_settings", "choose_settings", "usable_cores"]

FRONT = "HVDSCALE_RUN_SETTINGS"
"""Variable in which ``hvdscale run`` lists the settings it has put in force: those are not the user's."""


@dataclass(frozen=True)
class Setting:
    """One setting in force: the variable, its value, why it has it, and who chose it.

    ``origin`` is ``"hvdscale"``, ``"user"`` (already set: it wins), or ``"late"`` (MPI was already
    running when ``init()`` came, so the value can no longer take effect).
    """

    name: str
    value: str
    reason: str
    origin: str = "hvdscale"


# Open MPI's dynamic rules: <number of collectives>, <collective id>, <communicator sizes>, then per size
# <message sizes> and one "<from bytes> <algorithm> <topology> <segment bytes>" line each.
# Collective 2 is all-reduce; algorithm 3 is recursive doubling (fewest messages), 4 the ring (fewest bytes).
_RING_FROM_BYTES = 64 * 1024
_RULES = f"1\n2\n1\n2\n2\n0 3 0 0\n{_RING_FROM_BYTES} 4 0 0\n"


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_settings(launch: Launch, cores: int) -> tuple[Setting, ...]:
    """The defaults for this launch on a host with ``cores`` cores, without looking at what the user set."""
    chosen: list[Setting] = []
    threads = max(1, cores // launch.local_size)
    if launch.local_size > 1:
        why = f"{launch.local_size} ranks share {cores} cores: each computes on {threads}"
        chosen.append(Setting("OMP_NUM_THREADS", str(threads), why))
        chosen.append(Setting("TF_NUM_INTRAOP_THREADS", str(threads), why))
        chosen.append(Setting("TF_NUM_INTEROP_THREADS", str(threads), why))
    if launch.controller == "single":
        why = "no launcher: Horovod must not start MPI by itself, which aborts outside mpirun"
        chosen.append(Setting("HOROVOD_CONTROLLER", "gloo", why))
        chosen.append(Setting("HOROVOD_CPU_OPERATIONS", "gloo", why))
    if launch.controller == "mpi" and launch.size > 1:
        chosen.append(
            Setting(
                "OMPI_MCA_mpi_yield_when_idle",
                "1",
                "a waiting rank gives its core to one that computes, instead of spinning on it",
            )
        )
    if launch.controller == "mpi" and launch.spans_hosts:
        why = (
            f"ranks on several hosts: all-reduces from {_RING_FROM_BYTES // 1024} KiB go round the ring, "
            "which sends the fewest bytes; smaller ones take the fewest messages"
        )
        chosen.append(Setting("OMPI_MCA_coll_tuned_use_dynamic_rules", "1", why))
        chosen.append(Setting("OMPI_MCA_coll_tuned_dynamic_rules_filename", str(_rules_path()), why))
    return tuple(chosen)


def apply_settings(
    chosen: tuple[Setting, ...], env: MutableMapping[str, str], mpi_running: bool
) -> tuple[Setting, ...]:
    """Write into ``env`` what the user has not set; return every setting as it is in force."""
    settled = tuple(_settle(setting, env, mpi_running) for setting in chosen)
    for setting in settled:
        env.setdefault(setting.name, setting.value)
    if any(s.name.endswith("rules_filename") and s.origin == "hvdscale" for s in settled):
        _write_rules()
    return settled


def _settle(setting: Setting, env: Mapping[str, str], mpi_running: bool) -> Setting:
    if setting.name in env:
        if setting.name in env.get(FRONT, "").split(","):
            return replace(setting, value=env[setting.name])
        return Setting(setting.name, env[setting.name], "set by you", "user")
    if mpi_running and setting.name.startswith("OMPI_MCA_"):
        why = f"MPI was already running when init() was called; call init() first. {setting.reason}"
        return Setting(setting.name, setting.value, why, "late")
    return setting


def _rules_path() -> Path:
    return Path(tempfile.gettempdir()) / f"hvdscale-allreduce-rules-{os.getuid()}.conf"


def _write_rules() -> None:
    path = _rules_path()
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(_RULES)
    fresh.replace(path)  # ranks of one host write the same bytes; none reads half a file
