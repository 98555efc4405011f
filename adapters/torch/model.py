"""``shard_model``: one model over many ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hvdscale.errors import PlanError
from hvdscale.model.mesh import Mesh
from hvdscale.model.rules import Rules
from hvdscale.torch.features import shard_features
from hvdscale.torch.sharded import ShardedModel

__all__ = ["shard_model"]


def shard_model(
    model: nn.Module,
    mesh: Mesh,
    by: str = "layers",
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    rules: Rules = "auto",
) -> ShardedModel:
    """Spread ``model`` over the ranks of ``mesh``. Collective: every rank makes the same call.

    ``by="features"``: layers are split in place over the tensor ranks (``mesh.tp``), which take the same batches;
    the data ranks (``mesh.dp``) take different ones. Weights are first made those of rank 0. A model on the meta device
    gets its weights module by module, so that no rank ever holds all of it.

    Args:
        model: the whole model, the same on every rank.
        mesh: its size is the number of ranks.
        by: ``"features"``.
        loss: ``loss(outputs, targets)``, a mean over the batch, for ``train_step`` and ``eval_step``.
        rules: by features: ``"auto"``, or patterns of layer names and what becomes of the layers: ``"column"``
            (outputs split; left so where a ``"row"`` layer of the same module takes them, and only elementwise
            functions may stand between), ``"row"`` (inputs split), ``"heads"`` (outputs split by attention heads, which
            the module counts in an attribute), ``"vocab"`` (an embedding's rows; a linear layer's outputs,
            left split for ``parallel_cross_entropy``).

    Raises:
        PlanError: a mesh of another size, rules that match nothing, a layer that cannot be split so.
        DesyncError: ranks hold different models.
    """
    if not isinstance(mesh, Mesh):
        raise PlanError(f"mesh is a Mesh, such as hvd.Mesh(dp=2, tp=2); it is {mesh!r}.")
    if not isinstance(model, nn.Module):
        raise PlanError(f"model is an nn.Module; it is a {type(model).__name__}.")
    if by == "features":
        return shard_features(model, mesh, rules, loss)
    raise PlanError(f"by is 'features'; it is {by!r}.")
