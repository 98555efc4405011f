"""``--dp``, ``--pp``, ``--tp`` and what goes with them: how the command line spreads the model over the ranks."""

from __future__ import annotations

import argparse
from typing import Any

from hvdscale.errors import PlanError
from hvdscale.model import Mesh

__all__ = ["add_mesh_flags", "add_pipeline_flags", "mesh_of", "pipeline_of"]


def add_mesh_flags(parser: argparse.ArgumentParser) -> None:
    """The group "model sharding"."""
    group = parser.add_argument_group("model sharding")
    group.add_argument("--dp", type=int, help="copies of the model, on other data; left out: as many as there can be")
    group.add_argument("--tp", type=int, default=1, help="ranks that share the features of every layer")


def add_pipeline_flags(parser: argparse.ArgumentParser, pp: int = 1) -> None:
    """The group "pipeline"."""
    group = parser.add_argument_group("pipeline")
    group.add_argument("--pp", type=int, default=pp, help="stages; ranks beyond them are further copies of the model")
    group.add_argument("--microbatches", type=int, default=4, help="pieces of a batch")
    group.add_argument("--schedule", default="1f1b", help="gpipe, 1f1b, zb (PyTorch), or interleaved")
    group.add_argument("--recompute", action="store_true", help="keep only the inputs of stages")


def mesh_of(flags: argparse.Namespace, ranks: int) -> Mesh:
    """The mesh ``flags`` ask for; the ranks that are left take other data.

    Raises:
        PlanError: the ranks cannot be shared out so.
    """
    sharing = {name: getattr(flags, name) for name in ("pp", "tp") if hasattr(flags, name)}
    one = 1
    for name, length in sharing.items():
        if length < 1 or ranks % (one * length):
            raise PlanError(
                f"--{name} must be at least 1 and divide the number of ranks; it is {length} of {ranks} ranks."
            )
        one *= length
    mesh = Mesh(dp=getattr(flags, "dp", None) or ranks // one, **sharing)
    mesh.check(ranks)
    return mesh


def pipeline_of(flags: argparse.Namespace) -> dict[str, Any]:
    """How stages work, as ``shard_model`` takes it."""
    chunks = 2 if flags.schedule == "interleaved" else 1
    return {
        "microbatches": flags.microbatches,
        "schedule": flags.schedule,
        "chunks": chunks,
        "recompute": flags.recompute,
    }
