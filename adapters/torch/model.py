"""``shard_model``: one model over many ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from hvdscale.errors import PlanError
from hvdscale.model.mesh import Mesh
from hvdscale.model.partition import Objective
from hvdscale.model.rules import Rules
from hvdscale.model.staging import Staging
from hvdscale.model.ways import check_way
from hvdscale.torch.features import shard_features
from hvdscale.torch.lazy import Lazy
from hvdscale.torch.pipelined import shard_stages
from hvdscale.torch.sharded import ShardedModel

__all__ = ["shard_model"]


def shard_model(
    model: nn.Module | Sequence[nn.Module | Callable[..., Any] | Lazy | tuple[str, Any]],
    mesh: Mesh,
    by: str = "layers",
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    rules: Rules = "auto",
    microbatches: int = 1,
    schedule: str = "1f1b",
    chunks: int = 1,
    recompute: bool = False,
    balance: Objective | None = None,
    sample: Any = None,
    memory_cap: float | None = None,
    whole: Sequence[type[nn.Module] | str] = (),
    ties: Sequence[Sequence[str]] = (),
    count: Callable[[Any], Any] | None = None,
    seed: int | None = None,
) -> ShardedModel:
    """Spread ``model`` over the ranks of ``mesh``. Collective: every rank makes the same call.

    ``by="layers"``: an ``nn.Sequential``, or a list of layers, is cut into as many stages as ``mesh.pp`` says, which
    work on micro-batches in turns. A layer is a module, a function, ``hvd.Lazy(...)``, or (name, layer).
    ``by="graph"``: any module, captured with ``torch.fx``, is cut where little has to travel. Both give a pipeline:
    each rank keeps the layers of its stages and gives up the memory of the others, which move to the meta device.

    ``by="features"``: layers are split in place over the tensor ranks (``mesh.tp``), which take the same batches.
    A model on the meta device gets its weights module by module, so that no rank ever holds all of it.

    The data ranks (``mesh.dp``) take different batches. Weights are first made those of the first of them.

    Args:
        model: the whole model, the same on every rank; it may be on the meta device.
        mesh: its size is the number of ranks.
        by: ``"layers"``, ``"graph"`` or ``"features"``.
        loss: ``loss(outputs, targets)``, a mean over the batch, for ``train_step`` and ``eval_step``.
        rules: by features: ``"auto"``, or patterns of layer names and what becomes of the layers: ``"column"``
            (outputs split; left so where a ``"row"`` layer of the same module takes them, and only elementwise
            functions may stand between), ``"row"`` (inputs split), ``"heads"`` (outputs split by attention heads, which
            the module counts in an attribute; of three times as many outputs as inputs, all queries come first, then
            all keys and all values, or head by head in a ``query_key_value``), ``"vocab"`` (an embedding's rows; a
            linear layer's outputs, left split for ``parallel_cross_entropy``).
        microbatches: in a pipeline, into how many pieces a batch is divided; more of them, less waiting.
        schedule: ``"1f1b"``, ``"gpipe"``, ``"interleaved"`` or ``"zb"`` (backward passes in two halves).
        chunks: stages on each rank; with ``"interleaved"`` and ``"gpipe"``.
        recompute: keep only the inputs of each stage, and run its forward pass again before its backward pass.
        balance: what stages have equally much of: ``"time"``, ``"memory"`` or ``"params"``. Left out: ``"time"`` where
            there is a ``sample``.
        sample: a batch of the model's input, with which the first rank measures each layer.
        memory_cap: bytes that no stage may exceed, as estimated.
        whole: by graph: types or names of submodules that are not looked into, such as a transformer's block.
        ties: names of parameters that are one, where they are not the same object already.
        count: over how many terms the loss of a target is the mean, where that is not its number of samples:
            ``lambda y: (y != ignored).sum()``.
        seed: of dropout and of weights that are made here. Left out: ``torch.initial_seed()`` of rank 0.

    Raises:
        PlanError: a mesh of another size, more stages than layers, a model that cannot be captured, rules that match
            nothing, a loss that is not a mean, a layer that cannot be split so. On every rank.
        DesyncError: ranks hold different models.
    """
    check_way(mesh, by, rules)
    if by == "features":
        if not isinstance(model, nn.Module):
            raise PlanError(f"model is an nn.Module; it is a {type(model).__name__}.")
        return shard_features(model, mesh, rules, loss)
    staging = Staging(
        microbatches, schedule, chunks, recompute, balance, sample, memory_cap, tuple(whole), tuple(ties), count, seed
    )
    return shard_stages(model, mesh, by, loss, staging, rules)
