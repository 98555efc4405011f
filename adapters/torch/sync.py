"""``DistributedOptimizer``: the user's own optimizer, stepping on the gradients of all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import horovod.torch as _horovod
from horovod.torch import Average, Compression, ProcessSet, global_process_set
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdscale.errors import PlanError
from hvdscale.sync import EveryStep, LocalPlan, Reduction
from hvdscale.torch import amp
from hvdscale.torch.adasum import check_adasum
from hvdscale.torch.broadcast import broadcast_optimizer_state, broadcast_parameters
from hvdscale.torch.distributed import DistributedMixin, distribute
from hvdscale.torch.gradients import HOROVOD_OPS
from hvdscale.torch.host import travels_by_host
from hvdscale.torch.names import names_by_id, parameter_names
from hvdscale.torch.placed_checks import check_placed, sparse_parameters
from hvdscale.torch.runtime import elastic, world
from hvdscale.torch.sharded import ShardedModel, check_optimizer
from hvdscale.torch.steps import Terms

__all__ = ["DistributedOptimizer"]

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)
Groups = int | Sequence[Sequence[Tensor]]

_MESSAGE_BYTES = 32 << 20


def DistributedOptimizer(
    optimizer: AnyOptimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: Any = Compression.none,
    backward_passes_per_step: int = 1,
    op: int = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Groups | None = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
    *,
    sync: EveryStep | LocalPlan | None = None,
    model: nn.Module | ShardedModel | None = None,
) -> AnyOptimizer:
    """Make ``optimizer`` step on gradients reduced over all ranks. Collective.

    The same object is returned; its state, parameter groups, schedulers and hooks stay. Gradients are reduced while
    ``loss.backward()`` runs, and when it returns ``.grad`` holds the reduced gradients, so that clipping and
    gradient scaling see the same numbers on every rank. Where some parameters got no gradient, or fewer than
    ``backward_passes_per_step`` passes were made, that happens in ``optimizer.synchronize()`` or the step;
    parameters without a gradient then count as zero. Ranks whose backward pass was complete wait there for the
    others, so make no other collective call between a backward pass that may leave parameters out and the step.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        named_parameters: ``model.named_parameters()``; taken from ``model`` when left out.
        compression: ``Compression.none`` or ``Compression.fp16``.
        backward_passes_per_step: backward passes whose gradients are added up locally before each reduction.
        op: ``Average``, ``Sum``, or ``Adasum``, which combines the ranks' weight updates instead of gradients.
        gradient_predivide_factor: with ``Average``, divide by it before the sum and multiply after.
        num_groups: older name of ``groups``.
        groups: parameters reduced as one message: a number of groups, or lists of parameters. Left out: one message
            a gradient over several hosts, one per 32 MiB among ranks that share a host's cores.
        sparse_as_dense: reduce sparse gradients as dense ones.
        process_set: the ranks that share gradients. Others step alone.
        sync: when ranks agree, and who applies the update; ``EveryStep()`` when left out. With
            ``EveryStep(update="central" | "sharded")`` a rank holds its part of the reduced gradients: scaling,
            clamping and norms of ``.grad`` are those of the whole (so clipping works as ever), ``.full_tensor()``
            gives it, anything else is refused; ``state_dict()`` is collective. With ``EveryStep(wire="int8")`` and
            other wires gradients travel coded, averaged in float32; what coding lost so far is in
            ``optimizer.sync.state_dict()``.
        model: its weights and buffers, and the optimizer's state, are first made those of the
            first rank of ``process_set``. Of a model sharded by ``shard_model``: over the ranks that hold the same part
            of it, which are then the ones that share gradients.

    Raises:
        PlanError: arguments that cannot be, an optimizer without trainable parameters or wrapped twice.
        DesyncError: ranks disagree on parameters, optimizer, plan or versions.
    """
    world()
    if not isinstance(optimizer, Optimizer):
        raise PlanError(f"DistributedOptimizer takes a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    if isinstance(optimizer, DistributedMixin):
        raise PlanError("This optimizer is distributed already; its gradients would be reduced twice. Wrap it once.")
    if hasattr(optimizer, "_allreduce_grad_async"):
        raise PlanError(
            "This optimizer is Horovod's DistributedOptimizer; its gradients would be reduced twice. Give hvdscale the "
            "optimizer that it was made of."
        )
    plan = EveryStep() if sync is None else sync
    if not isinstance(plan, (EveryStep, LocalPlan)):
        raise PlanError(
            "sync takes EveryStep(), LocalSGD(...), DiLoCo(...), SlowMo(...), Gossip(...) or ParameterServer(...), "
            f"got {sync!r}. Leave it out for an all-reduce each step."
        )
    if process_set.process_set_id is None:
        raise PlanError(
            "process_set is not known to Horovod yet. Pass it to hvd.init() or hvd.add_process_set() first."
        )
    sharded = model if isinstance(model, ShardedModel) else None
    if sharded is not None:
        check_optimizer(optimizer, sharded.mesh)
        process_set = _data_ranks(sharded, process_set)
        named_parameters = sharded.named_parameters() if named_parameters is None else named_parameters
    held = model.module if isinstance(model, ShardedModel) else model
    names = names_by_id(named_parameters, held)
    named = parameter_names(optimizer.param_groups, names)
    parameters = [parameter for _, parameter in named]
    if not any(p.requires_grad for p in parameters):
        raise PlanError(
            f"The optimizer has {len(parameters)} parameters and none of them is trainable: there is nothing to "
            "reduce. Give it parameters with requires_grad=True."
        )
    if num_groups:
        warnings.warn("num_groups has been replaced by groups.", DeprecationWarning, stacklevel=2)
        groups = num_groups if groups is None else groups
    if isinstance(plan, EveryStep) and plan.placed:
        if sharded is not None:
            raise PlanError(
                f'update="{plan.update}" places the updates of whole models; this one is sharded by shard_model. Leave '
                "sync out."
            )
        check_placed(plan, optimizer, held, sparse_as_dense)
    reduction = Reduction(
        op=_op_name(op),
        predivide=gradient_predivide_factor,
        passes=backward_passes_per_step,
        groups=_positions(groups, parameters),
        sparse_as_dense=sparse_as_dense,
    )
    plan.check(reduction)
    if compression is not Compression.none and (isinstance(plan, LocalPlan) or plan.coded):
        plan.refuse_compression()
    if isinstance(plan, EveryStep) and plan.coded and elastic():
        plan.refuse_elastic()
    if reduction.op == "adasum":
        check_adasum(process_set)
    elif groups is None and not (isinstance(plan, EveryStep) and plan.placed):
        reduction = replace(reduction, groups=_groups_on_one_host(parameters))
    terms = Terms(reduction, plan, compression, process_set)
    distribute(optimizer, terms, names, named, sparse_parameters(held), held)
    optimizer._hvdscale.sharded = sharded  # type: ignore[attr-defined]
    amp.watch_gradient_scalers()
    if model is not None and process_set.included():
        root = process_set.ranks[0]
        broadcast_parameters(sharded.local_state_dict() if sharded else model.state_dict(), root, process_set)
        broadcast_optimizer_state(optimizer, root, held, process_set)
    return optimizer


def _data_ranks(sharded: ShardedModel, process_set: ProcessSet) -> ProcessSet:
    if process_set.process_set_id != global_process_set.process_set_id:
        raise PlanError(
            "A sharded model shares gradients among the ranks of its mesh's data axis. Leave process_set out."
        )
    return sharded.data_ranks


def _groups_on_one_host(parameters: Sequence[Tensor]) -> int | None:
    """How many messages, when nobody says, ranks that share the cores of one host send; ``None``: one a gradient.

    Where every core computes, an all-reduce under the backward pass only takes turns with it, and each message is
    negotiated; on its way through the host's memory, waited for, too. Over links between hosts, and between
    accelerators, messages travel while the backward pass goes on.
    """
    if world().launch.spans_hosts or any(p.device.type != "cpu" and not travels_by_host(p) for p in parameters):
        return None
    return max(1, -(-sum(p.numel() * p.element_size() for p in parameters) // _MESSAGE_BYTES))


def _op_name(op: int) -> Any:
    for name, value in HOROVOD_OPS.items():
        if value == op:
            return name
    known = {getattr(_horovod, name): name for name in ("Min", "Max", "Product")}
    raise PlanError(f"op must be Average, Sum or Adasum to reduce gradients, got {known.get(op, op)}.")


def _positions(groups: Groups | None, parameters: Sequence[Tensor]) -> int | tuple[tuple[int, ...], ...] | None:
    """``groups`` with each parameter as its position; those the optimizer does not hold are left out."""
    if groups is None or isinstance(groups, int):
        return groups
    place = {id(parameter): i for i, parameter in enumerate(parameters)}
    for group in groups:
        for member in group:
            if not isinstance(member, Tensor):
                raise PlanError(f"groups must be a number or lists of parameters; one holds a {type(member).__name__}.")
    return tuple(tuple(place[id(p)] for p in group if id(p) in place) for group in groups)
