"""``--tp`` and what goes with it: how the command line spreads the model over the ranks."""

from __future__ import annotations

import argparse

from hvdscale.errors import PlanError
from hvdscale.model import Mesh

__all__ = ["add_mesh_flags", "mesh_of"]


def add_mesh_flags(parser: argparse.ArgumentParser) -> None:
    """The group "model sharding"."""
    group = parser.add_argument_group("model sharding")
    group.add_argument("--tp", type=int, default=1, help="ranks that share the features of every layer")


def mesh_of(flags: argparse.Namespace, ranks: int) -> Mesh:
    """The mesh ``flags`` ask for; the ranks that are left take other data.

    Raises:
        PlanError: the ranks cannot be shared out so.
    """
    if flags.tp < 1 or ranks % flags.tp:
        raise PlanError(f"--tp must be at least 1 and divide the number of ranks; it is {flags.tp} of {ranks} ranks.")
    return Mesh(dp=ranks // flags.tp, tp=flags.tp)
