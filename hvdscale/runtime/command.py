"""The command that starts a job: mpirun or horovodrun with the settings of ``settings.py``, nothing hidden."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from hvdscale.errors import WorldError
from hvdscale.runtime.launch import Launch
from hvdscale.runtime.process import Finished, stream
from hvdscale.runtime.settings import FRONT, Setting, apply_settings, choose_settings, usable_cores

__all__ = ["Command", "Host", "Job", "compose", "parse_hosts", "replace_process", "run_here"]

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
_RESOURCE_MANAGERS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "PE_HOSTFILE")
# What a rank on another host needs of this environment; ranks of this host inherit all of it.
_EXPORTED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONUNBUFFERED", "VIRTUAL_ENV", "CUDA_VISIBLE_DEVICES")
_EXPORTED_PREFIXES = ("HVDSCALE_", "HOROVOD_", "KERAS_", "TF_", "TORCH_", "OMP_", "GLOO_", "NCCL_")


@dataclass(frozen=True)
class Host:
    """One host of a job and how many ranks it may hold."""

    name: str
    slots: int = 1

    @property
    def is_here(self) -> bool:
        return self.name in ("localhost", "127.0.0.1", socket.gethostname(), socket.gethostname().split(".")[0])


@dataclass(frozen=True)
class Job:
    """What to start: ``program`` is what each rank's Python gets (a script or ``-m module``, then arguments).

    Without ``hosts`` all ranks run here, or where a resource manager (Slurm, PBS, ...) has made room.

    Raises:
        WorldError: fewer than one rank, or nothing to run.
    """

    ranks: int
    program: tuple[str, ...]
    hosts: tuple[Host, ...] = ()
    controller: Literal["mpi", "gloo"] = "mpi"

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise WorldError(f"A job has at least 1 rank; -np is {self.ranks}.")
        if not self.program:
            raise WorldError("Nothing to run: give a script, or -m and a module. Example: hvdscale run -np 2 train.py")

    @property
    def leaves_this_host(self) -> bool:
        return any(not host.is_here for host in self.hosts)


@dataclass(frozen=True)
class Command:
    """A launcher's full command line, and the variables added to the environment with the reason of each."""

    argv: tuple[str, ...]
    settings: tuple[Setting, ...]

    @property
    def variables(self) -> dict[str, str]:
        """What is added to the user's environment."""
        added = {setting.name: setting.value for setting in self.settings}
        return {**added, FRONT: ",".join(added)} if added else {}

    def __str__(self) -> str:
        """As one would type it in a shell."""
        assignments = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*assignments, shlex.join(self.argv)])


def parse_hosts(text: str) -> tuple[Host, ...]:
    """``"a:2,b"`` as hosts: names with the number of ranks each may hold (1 if not said).

    Raises:
        WorldError: a name or a number that cannot be, or a host named twice.
    """
    hosts = []
    for part in text.split(","):
        name, _, slots = part.strip().partition(":")
        if not _HOST.fullmatch(name) or (":" in part and not (slots.isdecimal() and int(slots) > 0)):
            raise WorldError(f"Bad host list {text!r} at {part!r}: write name:slots,name:slots with slots >= 1.")
        hosts.append(Host(name, int(slots or 1)))
    names = [host.name for host in hosts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise WorldError(f"Bad host list {text!r}: {', '.join(twice)} named twice; write {twice[0]}:slots once.")
    return tuple(hosts)


def compose(job: Job, env: Mapping[str, str] | None = None) -> Command:
    """The launcher's command line for ``job`` and the settings the user has not made.

    ``env`` is the user's environment (default: this process's).

    Raises:
        WorldError: the launcher is not installed, or this process is itself a rank of a job.
    """
    env = os.environ if env is None else env
    inside = [name for name in ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "HOROVOD_RANK") if name in env]
    if inside:
        raise WorldError(f"This process is a rank already ({inside[0]}={env[inside[0]]}); start jobs from outside.")
    settled = apply_settings(_settings(job, env), dict(env), mpi_running=False)
    settings = tuple(setting for setting in settled if setting.origin == "hvdscale")
    python = (sys.executable, *job.program)
    if job.controller == "gloo":
        return Command((*_horovodrun(job, env), *python), settings)
    return Command((*_mpirun(job, env, settings), *python), settings)


def _settings(job: Job, env: Mapping[str, str]) -> tuple[Setting, ...]:
    """What ``init()`` would choose. Other hosts have other cores: there each rank settles its threads itself."""
    local = min(job.ranks, max((host.slots for host in job.hosts), default=job.ranks))
    name = "mpirun (Open MPI)" if job.controller == "mpi" else "horovodrun --gloo"
    chosen = choose_settings(Launch(name, job.controller, 0, job.ranks, 0, local), usable_cores())
    if job.controller == "gloo":
        why = "horovodrun itself imports TensorFlow, whose start-up notices would stand on the screen"
        chosen = (*chosen, Setting("TF_CPP_MIN_LOG_LEVEL", "1", why))
    if job.leaves_this_host or _resource_manager(env):
        return tuple(setting for setting in chosen if "_THREADS" not in setting.name)
    return chosen


def _mpirun(job: Job, env: Mapping[str, str], settings: tuple[Setting, ...]) -> tuple[str, ...]:
    # By its absolute path, because mpirun then starts its daemons on other hosts from the same folder.
    words = [_launcher("mpirun", env, "pip install 'hvdscale[mpi]'"), "-np", str(job.ranks)]
    # Without its closing notice, a failing rank's own traceback is the last thing on the screen.
    words += ["--quiet", "--bind-to", "none"]
    if os.geteuid() == 0:
        words.append("--allow-run-as-root")
    if job.hosts:
        words += ["-H", ",".join(f"{host.name}:{host.slots}" for host in job.hosts)]
    if _exceeds_slots(job, env):
        words.append("--oversubscribe")
    if job.leaves_this_host:
        names = {*env, *(setting.name for setting in settings), *([FRONT] if settings else [])}
        for name in sorted(n for n in names if n in _EXPORTED or n.startswith(_EXPORTED_PREFIXES)):
            words += ["-x", name]
    return tuple(words)


def _horovodrun(job: Job, env: Mapping[str, str]) -> tuple[str, ...]:
    words = [_launcher("horovodrun", env, "hvdscale build-horovod --install"), "--gloo", "-np", str(job.ranks)]
    if job.hosts:
        words += ["-H", ",".join(f"{host.name}:{host.slots}" for host in job.hosts)]
    return tuple(words)


def _launcher(name: str, env: Mapping[str, str], remedy: str) -> str:
    """The launcher beside this Python first: it belongs to the MPI and the Horovod installed there."""
    path = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        raise WorldError(f"{name} is neither beside {sys.executable} nor on PATH; install it: {remedy}")
    return found


def _exceeds_slots(job: Job, env: Mapping[str, str]) -> bool:
    if job.hosts:
        return job.ranks > sum(host.slots for host in job.hosts)
    return _resource_manager(env) is None and job.ranks > _physical_cores()


def _resource_manager(env: Mapping[str, str]) -> str | None:
    return next((name for name in _RESOURCE_MANAGERS if name in env), None)


def _physical_cores() -> int:
    """Cores without their second hardware threads, which is what mpirun counts as slots."""
    siblings = set()
    for cpu in os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1):
        listed = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(listed.read_text() if listed.is_file() else str(cpu))
    return len(siblings)


def run_here(command: Command, extra: Mapping[str, str], deadline_seconds: float) -> Finished:
    """Run the job to its end or the deadline, with ``extra`` variables; nothing of it outlives the call."""
    environment = {**os.environ, **command.variables, **extra}
    return stream(command.argv, env=environment, deadline_seconds=deadline_seconds)


def replace_process(command: Command) -> NoReturn:
    """Become the launcher: signals and the exit code are then its own.

    Raises:
        OSError: the launcher cannot be started.
    """
    os.execve(command.argv[0], command.argv, {**os.environ, **command.variables})
