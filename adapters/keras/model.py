"""``shard_model``: one Keras model over many ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from hvdscale.errors import PlanError
from hvdscale.keras.features import shard_features
from hvdscale.keras.sharded import ShardedModel
from hvdscale.model.mesh import Mesh
from hvdscale.model.rules import Rules

__all__ = ["shard_model"]


def shard_model(
    model: Any,
    mesh: Mesh,
    by: str = "layers",
    *,
    loss: Callable[[Any, Any], Any] | None = None,
    rules: Rules = "auto",
) -> ShardedModel:
    """Spread ``model`` over the ranks of ``mesh``. Collective: every rank makes the same call.

    ``by="features"``: layers are split in place over the tensor ranks (``mesh.tp``), which take the same batches;
    the data ranks (``mesh.dp``) take different ones. ``model.compile`` and ``model.fit`` work as before, with
    ``DistributedOptimizer(optimizer, model=sharded)``. Weights are first made those of rank 0. A model made under
    ``keras.StatelessScope(initialize_variables=False)`` gets its weights one by one, so that no rank ever holds all.

    Args:
        model: the whole model, built, and the same on every rank.
        mesh: its size is the number of ranks.
        by: ``"features"``.
        loss: ``loss(outputs, targets)``, a mean over the batch, for ``train_step`` and ``eval_step``.
        rules: by features: ``"auto"``, or patterns of layer paths and what becomes of the layers: ``"column"``
            (outputs split; left so where a ``"row"`` layer takes them through elementwise functions alone), ``"row"``
            (inputs split), ``"heads"`` (a ``MultiHeadAttention``), ``"vocab"`` (an embedding's rows; a dense layer's
            outputs, left split for ``parallel_cross_entropy``).

    Raises:
        PlanError: a mesh of another size, rules that match nothing, a layer that cannot be split so.
        DesyncError: ranks hold different models.
    """
    if not isinstance(mesh, Mesh):
        raise PlanError(f"mesh is a Mesh, such as hvd.Mesh(dp=2, tp=2); it is {mesh!r}.")
    if not isinstance(model, keras.Model):
        raise PlanError(f"model is a keras.Model; it is a {type(model).__name__}.")
    if by == "features":
        return shard_features(model, mesh, rules, loss)
    raise PlanError(
        f'A Keras model is split by features alone, and by is {by!r}. Give by="features"; pipelines (by="layers" and '
        'by="graph") are in hvdscale.torch.'
    )
