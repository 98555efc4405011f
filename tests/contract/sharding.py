"""What the tests of sharded models share: the meshes of the ranks there are, and plans along the data axis."""

from __future__ import annotations

from hvdscale.model import Mesh
from hvdscale.runtime.launch import read_launch
from hvdscale.sync import LocalPlan, LocalSGD

__all__ = ["ALONG_DATA", "meshes"]

# In which copies of a sharded model meet, by a word for the test's name.
ALONG_DATA: dict[str, LocalPlan] = {
    "LocalSGD": LocalSGD(2),
    "warm-up, overlap": LocalSGD(3, warmup=2, fragments=2, overlap=1),
}


def meshes(*axes: str, split: bool = False) -> list[Mesh]:
    """Every mesh over these axes that takes all ranks of this job; ``split``: those that split the model, if any."""
    size = read_launch().size
    found = []
    for dp in range(1, size + 1):
        for pp in range(1, size + 1):
            for tp in range(1, size + 1):
                mesh = Mesh(dp, pp, tp)
                used = {axis for axis in ("dp", "pp", "tp") if getattr(mesh, axis) > 1}
                if mesh.size == size and used <= set(axes) and (not split or mesh.dp < max(size, 2)):
                    found.append(mesh)
    return found
