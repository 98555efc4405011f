"""Transport and thread defaults that ``init()`` puts in force when the user has not chosen: each with its reason.

Measured on ranks that share cores, and on hosts joined by slow links; ``ci/bench`` repeats the measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path

from hvdscale.runtime import memory, rules
from hvdscale.runtime.cores import bound_by_default, own_cores, release_binding, usable_cores
from hvdscale.runtime.launch import Launch

__all__ = [
    "FRONT",
    "Setting",
    "apply_settings",
    "choose_settings",
    "put_in_force",
    "usable_cores",
    "user_mca_parameters",
]

FRONT = "HVDSCALE_RUN_SETTINGS"
"""Variable that lists the settings hvdscale itself has put in force: those are not the user's."""

_MCA = "OMPI_MCA_"
# Open MPI asks a rules file before it asks for a forced algorithm: who forced one must not meet our file.
_ALLREDUCE_CHOICE = (f"{_MCA}coll_tuned_use_dynamic_rules", f"{_MCA}coll_tuned_dynamic_rules_filename")
_FORCED_CHOICE = f"{_MCA}coll_tuned_allreduce_"


@dataclass(frozen=True)
class Setting:
    """One setting in force: the variable, its value, why it has it, and who chose it.

    ``origin`` is ``"hvdscale"``, ``"user"`` (already set: it wins), ``"late"`` (MPI was already
    running when ``init()`` came, so the value can no longer take effect), or ``"failed"``.
    """

    name: str
    value: str
    reason: str
    origin: str = "hvdscale"


def put_in_force(launch: Launch, env: MutableMapping[str, str], mpi_running: bool) -> tuple[Setting, ...]:
    """Choose for this launch and apply to this process what the user has not set; every setting as it is in force."""
    bound = launch.controller == "mpi" and launch.local_size > 1 and bound_by_default(env)
    released = (_release(env),) if bound else ()
    chosen = choose_settings(launch, usable_cores(), own_cores())
    return (*released, *_with_rules(apply_settings(chosen, env, mpi_running), env), *_keep_memory(env))


def _release(env: Mapping[str, str]) -> Setting:
    cores = release_binding(env)
    why = (
        "mpirun binds each rank of a small job to one core unless it is told how to bind, and a rank's compute threads "
        "then share it with Horovod's; give mpirun --bind-to to choose yourself"
    )
    return Setting("CPU binding", f"none ({len(cores)} cores)", why)


def _keep_memory(env: Mapping[str, str]) -> tuple[Setting, ...]:
    """In force at once, unlike variables, which ``malloc`` reads as a process starts."""
    users = memory.set_by_user(env)
    return tuple(_keep(tuned, users) for tuned in memory.TUNED) if memory.uses_glibc() else ()


def _keep(tuned: memory.Tuned, users: Mapping[str, str]) -> Setting:
    setting = _settle(Setting(tuned.variable, str(tuned.value_bytes), tuned.reason), users, too_late=False)
    if setting.origin == "hvdscale" and not memory.keep_freed_memory(tuned):
        return replace(setting, origin="failed")
    return setting


def choose_settings(launch: Launch, cores: int, own: int | None = None) -> tuple[Setting, ...]:
    """The defaults for this launch, without looking at what the user set.

    ``cores`` is how many the ranks of this host share, ``own`` how many of them this rank may run on (``None``: all).
    """
    chosen: list[Setting] = []
    if launch.local_size > 1:
        threads = max(1, min(cores if own is None else own, cores // launch.local_size))
        why = f"{launch.local_size} ranks share {cores} cores: each computes on {threads}"
        for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
            chosen.append(Setting(name, str(threads), why))
    if launch.controller == "single":
        why = "no launcher: Horovod must not start MPI by itself, which aborts outside mpirun"
        chosen.append(Setting("HOROVOD_CONTROLLER", "gloo", why))
        chosen.append(Setting("HOROVOD_CPU_OPERATIONS", "gloo", why))
    if launch.controller == "mpi" and launch.size > 1:
        why = "a waiting rank gives its core to one that computes, instead of spinning on it"
        chosen.append(Setting(f"{_MCA}mpi_yield_when_idle", "1", why))
        why = (
            "Horovod's threads sleep from when they last met, the longer the longer nobody had work, and those that "
            "wait for a late one sleep, too (Horovod as hvdscale builds it)"
        )
        chosen.append(Setting("HVDSCALE_CYCLES", "together", why))
        why = (
            f"all-reduces from {rules.ring_from_bytes(launch.size) // 1024} KiB go round the ring, which sends the "
            "fewest bytes and loads every link alike; smaller ones take fewer messages"
        )
        for name, value in zip(_ALLREDUCE_CHOICE, ("1", str(rules.rules_path())), strict=True):
            chosen.append(Setting(name, value, why))
    return tuple(chosen)


def apply_settings(
    chosen: tuple[Setting, ...], env: MutableMapping[str, str], mpi_running: bool
) -> tuple[Setting, ...]:
    """Write into ``env`` what the user has not set; return every setting as it is in force.

    The user sets an Open MPI parameter in the environment, on mpirun's command line, or in ``mca-params.conf``.
    """
    ours = {name for name in env.get(FRONT, "").split(",") if name}
    for name in ours - {setting.name for setting in chosen}:
        env.pop(name, None)  # from a launch of another kind, whose environment this process inherited
        ours.remove(name)
    set_somewhere = {**{f"{_MCA}{name}": value for name, value in user_mca_parameters(env).items()}, **env}
    users = {name: value for name, value in set_somewhere.items() if name not in ours}
    theirs = [name for name in users if name.startswith((*_ALLREDUCE_CHOICE, _FORCED_CHOICE))]
    if theirs:
        chosen = tuple(s for s in chosen if s.name not in _ALLREDUCE_CHOICE or s.name in theirs)
    settled = tuple(_settle(setting, users, mpi_running and setting.name not in ours) for setting in chosen)
    for setting in settled:
        if setting.origin == "hvdscale":
            env[setting.name] = setting.value
            ours.add(setting.name)
    env[FRONT] = ",".join(sorted(ours))  # a second init(), and processes started from here, know whose they are
    return settled


def _with_rules(settled: tuple[Setting, ...], env: MutableMapping[str, str]) -> tuple[Setting, ...]:
    """Write the rules file where it is in force; on a full or read-only disk Open MPI is left to choose."""
    names = {setting.name: setting for setting in settled if setting.origin == "hvdscale"}
    if _ALLREDUCE_CHOICE[1] not in names:
        return settled
    path = Path(names[_ALLREDUCE_CHOICE[1]].value)
    try:
        rules.write_rules(path)
    except OSError as error:
        for name in _ALLREDUCE_CHOICE:
            env.pop(name, None)
        env[FRONT] = ",".join(name for name in env[FRONT].split(",") if name not in _ALLREDUCE_CHOICE)
        why = f"{path} could not be written ({error.strerror}), so Open MPI chooses"
        return tuple(replace(s, reason=why, origin="failed") if s.name in _ALLREDUCE_CHOICE else s for s in settled)
    return settled


def _settle(setting: Setting, users: Mapping[str, str], too_late: bool) -> Setting:
    if setting.name in users:
        return replace(setting, value=users[setting.name], reason="set by you", origin="user")
    if too_late and setting.name.startswith(_MCA):
        why = f"MPI was already running when init() was called; call init() first. {setting.reason}"
        return replace(setting, reason=why, origin="late")
    return setting


def user_mca_parameters(env: Mapping[str, str]) -> dict[str, str]:
    """What ``~/.openmpi/mca-params.conf`` sets: an environment variable of ours would silently override it."""
    try:
        text = (Path(env["HOME"]) / ".openmpi" / "mca-params.conf").read_text()
    except (KeyError, OSError):
        return {}
    pairs = (line.split("#")[0].partition("=") for line in text.splitlines())
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}
