"""Joining and leaving the job: what every adapter's ``init()`` does around Horovod's own."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hvdscale.errors import WorldError
from hvdscale.runtime import timeline
from hvdscale.runtime.health import abort, end_job_on_error
from hvdscale.runtime.launch import Launch, read_launch
from hvdscale.runtime.settings import Setting, put_in_force
from hvdscale.runtime.transport import CollectiveTransport, Gather, MPITransport, RankSet, SoloTransport, Transport

__all__ = ["Membership", "Preparation", "World", "join", "prepare"]

_RELEASE_SECONDS = 1.0  # for ranks that shut down together


@dataclass(frozen=True)
class World:
    """The job as this rank sees it, from ``init()`` to ``shutdown()``."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    launch: Launch
    transport: Transport
    settings: tuple[Setting, ...]


class Membership:
    """An adapter's place in a job: the world from ``init()`` to ``shutdown()``, and what is asked of it."""

    def __init__(self) -> None:
        self._world: World | None = None

    def enter(self, world: World) -> None:
        self._world = world

    def leave(self) -> None:
        if self._world is not None:
            self._world.transport.close()
            self._world.transport.release(_RELEASE_SECONDS)
        self._world = None

    def world(self) -> World:
        """The world since ``init()``.

        Raises:
            WorldError: before ``init()`` or after ``shutdown()``.
        """
        if self._world is None:
            raise WorldError("hvdscale is not initialised. Call hvd.init() first.")
        return self._world

    def runtime_settings(self) -> tuple[Setting, ...]:
        """Every transport and thread setting ``init()`` looked at: name, value, reason and who chose it."""
        return self.world().settings

    def control(self, process_set: RankSet | None = None) -> Transport:
        """The transport of small control messages among ``process_set`` (default: all ranks)."""
        transport = self.world().transport
        return transport if process_set is None else transport.subset(process_set)


@dataclass(frozen=True)
class Preparation:
    """What was settled before Horovod starts. ``threads`` is how many cores this rank computes on (0: all)."""

    launch: Launch
    settings: tuple[Setting, ...]
    threads: int


def prepare() -> Preparation:
    """Read the launch, put defaults in force, and start MPI through mpi4py where there is MPI.

    mpi4py comes first and on the calling thread: it asks for THREAD_MULTIPLE, and Horovod then uses that MPI.

    Raises:
        WorldError: the launch variables do not fit together.
    """
    launch = read_launch()
    settled = put_in_force(launch, os.environ, mpi_running=_mpi_is_running())
    if launch.local_size == 0:
        why = (
            f"{launch.launcher} does not say how many ranks share this host; set OMP_NUM_THREADS and TF_NUM_* yourself"
        )
        settled = (*settled, Setting("thread counts", "as the frameworks choose", why))
    if launch.controller == "mpi":
        _import_mpi()
    threads = next((int(s.value) for s in settled if s.name == "OMP_NUM_THREADS" and s.value.isdigit()), 0)
    return Preparation(launch, settled, threads)


def join(
    preparation: Preparation,
    horovod: Any,
    gather: Gather,
    comm: Any = None,
) -> World:
    """The world after ``horovod.init(comm)``: sizes checked, control transport open, failures watched.

    Args:
        horovod: Horovod's module of the framework (``horovod.torch``, ...).
        gather: its all-gather over ``uint8`` vectors, ``gather(vector, process_set)``, used where there is no MPI.
        comm: what the user gave to ``init``: nothing, a list of ranks or an mpi4py communicator.

    Raises:
        WorldError: Horovod sees another world than the launcher or MPI made.
    """
    launch = preparation.launch
    rank, size = horovod.rank(), horovod.size()
    if not launch.elastic and (comm is None or (isinstance(comm, Sequence) and not comm)):
        _check_sizes(launch, size)
    transport: Transport
    if size == 1:
        transport = SoloTransport()
    elif launch.controller == "mpi":
        transport = _over_mpi(comm)
    else:
        transport = CollectiveTransport(rank, size, gather)
    if launch.size > 1:
        end_job_on_error(launch.rank, abort, transport.who_left)
        # A script may end, or sys.exit, without shutdown(). Runs before Horovod's own exit handler, made earlier.
        atexit.register(transport.close)
    timeline.start(transport)
    return World(rank, size, horovod.local_rank(), horovod.local_size(), launch, transport, preparation.settings)


def _mpi_is_running() -> bool:
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and mpi.Is_initialized()


def _import_mpi() -> Any:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise WorldError(
            "This job was started with mpirun, but mpi4py cannot be imported "
            f"({error}). Install it with `pip install 'hvdscale[mpi]'`, or use `horovodrun --gloo`."
        ) from error
    return MPI


def _over_mpi(comm: Any) -> MPITransport:
    mpi = _import_mpi()
    if comm is None or (isinstance(comm, Sequence) and not comm):
        return MPITransport(mpi.COMM_WORLD)
    if not isinstance(comm, Sequence):
        return MPITransport(comm)
    everyone = mpi.COMM_WORLD.Get_group()
    group = everyone.Incl(list(comm))
    made = mpi.COMM_WORLD.Create_group(group)
    transport = MPITransport(made)  # which has one of its own
    for ours in (made, group, everyone):
        ours.Free()
    return transport


def _check_sizes(launch: Launch, size: int) -> None:
    sizes = {f"the launcher ({launch.launcher})": launch.size, "Horovod": size}
    if launch.controller == "mpi":
        sizes["MPI"] = _import_mpi().COMM_WORLD.Get_size()
    if len(set(sizes.values())) > 1:
        seen = ", ".join(f"{who} {n}" for who, n in sizes.items())
        raise WorldError(
            f"All must see the same world size; {seen}. Usually mpirun, mpi4py and Horovod come from different "
            "MPI installations: run `hvdscale doctor`, and use the mpirun of the environment Horovod was built in."
        )
