"""``shard_model``: one Keras model over many ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from hvdscale.errors import PlanError
from hvdscale.keras.features import shard_features
from hvdscale.keras.pipelined import shard_stages
from hvdscale.keras.sharded import ShardedModel
from hvdscale.model.mesh import Mesh
from hvdscale.model.partition import Objective
from hvdscale.model.rules import Rules
from hvdscale.model.staging import Staging
from hvdscale.model.ways import check_way

__all__ = ["shard_model"]


def shard_model(
    model: Any,
    mesh: Mesh,
    by: str = "layers",
    *,
    loss: Callable[[Any, Any], Any] | str | None = None,
    rules: Rules = "auto",
    microbatches: int = 1,
    schedule: str = "1f1b",
    chunks: int = 1,
    recompute: bool = False,
    balance: Objective | None = None,
    sample: Any = None,
    memory_cap: float | None = None,
    count: Callable[[Any], Any] | None = None,
    seed: int | None = None,
) -> ShardedModel:
    """Spread ``model`` over the ranks of ``mesh``. Collective: every rank makes the same call.

    ``by="layers"``: a Sequential or Functional model, or a list of layers that begins with ``keras.Input(...)``, is cut
    into as many stages as ``mesh.pp`` says, which work on micro-batches in turns. Layers of a list that are not built
    yet get their weights on their own ranks alone. ``by="graph"``: cuts may also fall inside models that are layers of
    the model; one with a ``call`` of its own is captured on symbolic inputs. Each rank keeps the layers of its stages
    and gives up the memory of the others. With ``mesh.tp`` above 1 (by layers), the layers of each stage are split
    over the tensor ranks, too, as ``rules`` say.

    ``by="features"``: layers are split in place over the tensor ranks (``mesh.tp``), which take the same batches;
    the data ranks (``mesh.dp``) take different ones. ``model.compile`` and ``model.fit`` work as before, with
    ``DistributedOptimizer(optimizer, model=sharded)``. Weights are first made those of rank 0. A model made under
    ``keras.StatelessScope(initialize_variables=False)`` gets its weights one by one, so that no rank ever holds all.

    Args:
        model: the whole model, built, and the same on every rank.
        mesh: its size is the number of ranks.
        by: ``"layers"``, ``"graph"`` or ``"features"``.
        loss: ``loss(outputs, targets)``, a mean over the batch, for ``train_step`` and ``eval_step``; or a
            ``keras.losses.Loss``, or the name of one.
        rules: of splitting layers: ``"auto"``, or patterns of layer paths and what becomes of the layers: ``"column"``
            (outputs split; left so where a ``"row"`` layer takes them through elementwise functions alone), ``"row"``
            (inputs split), ``"heads"`` (a ``MultiHeadAttention``), ``"vocab"`` (an embedding's rows; a dense layer's
            outputs, left split for ``parallel_cross_entropy``).
        microbatches: in a pipeline, into how many pieces a batch is divided; more of them, less waiting.
        schedule: ``"1f1b"``, ``"gpipe"`` or ``"interleaved"``; ``"zb"`` runs as ``"1f1b"``.
        chunks: stages on each rank; with ``"interleaved"`` and ``"gpipe"``.
        recompute: keep only the inputs of each stage, and run its forward pass again before its backward pass.
        balance: what stages have equally much of: ``"time"``, ``"memory"`` or ``"params"``. Left out: ``"time"`` where
            there is a ``sample``.
        sample: a batch of the model's input, with which the first rank measures the forward pass of each layer.
        memory_cap: bytes that no stage may exceed, as estimated.
        count: over how many terms the loss of a target is the mean, where that is not its number of samples:
            ``lambda y: keras.ops.sum(y != ignored)``.
        seed: of dropout. Left out: that of ``keras.utils.set_random_seed`` on rank 0, or any.

    Raises:
        PlanError: a mesh of another size, more stages than layers, a model that cannot be captured, rules that match
            nothing, a loss that is not a mean, a layer that cannot be split so. On every rank.
        DesyncError: ranks hold different models.
    """
    check_way(mesh, by, rules)
    if by == "features":
        if not isinstance(model, keras.Model):
            raise PlanError(f"model is a keras.Model; it is a {type(model).__name__}.")
        return shard_features(model, mesh, rules, _of_outputs_first(loss))
    staging = Staging(microbatches, schedule, chunks, recompute, balance, sample, memory_cap, count=count, seed=seed)
    return shard_stages(model, mesh, by, _of_outputs_first(loss), staging, rules)


def _of_outputs_first(loss: Any) -> Any:
    """A loss as a function of (outputs, targets), with the reduction it had, and what was ``given``."""
    if isinstance(loss, str):
        try:
            each = keras.losses.get(loss)
        except ValueError:
            raise PlanError(f"loss={loss!r} is not the name of a loss of Keras, such as 'mse'.") from None

        def swapped(outputs: Any, targets: Any) -> Any:
            return ops.mean(each(targets, outputs))

    elif isinstance(loss, keras.losses.Loss):

        def swapped(outputs: Any, targets: Any) -> Any:
            return loss(targets, outputs)

        swapped.reduction = loss.reduction  # type: ignore[attr-defined]
    else:
        return loss
    swapped.given = loss  # type: ignore[attr-defined]
    return swapped
