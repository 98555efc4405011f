"""mpirun and mpi4py belong together: every rank sees the world that mpirun made."""

from __future__ import annotations

import json

from hvdscale.errors import WorldError
from hvdscale.runtime.launch import read_launch

__all__ = ["main"]


def main() -> None:
    """Compare the launcher's world with MPI's.

    Raises:
        WorldError: they differ: mpi4py loaded another MPI than mpirun belongs to.
    """
    from mpi4py import MPI

    launch, world = read_launch(), MPI.COMM_WORLD
    library = MPI.Get_library_version().split(",")[0].strip()
    if (launch.rank, launch.size) != (world.rank, world.size):
        raise WorldError(
            f"mpirun started rank {launch.rank} of {launch.size}, but mpi4py sees rank {world.rank} of {world.size} "
            f"in {library}: they come from different MPI installations. Install both into this environment: "
            "pip install --force-reinstall 'hvdscale[mpi]'"
        )
    if world.rank == 0:
        print(json.dumps({"says": f"mpi4py runs in {library}, {world.size} ranks"}), flush=True)


if __name__ == "__main__":
    main()
