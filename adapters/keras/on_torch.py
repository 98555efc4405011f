"""The verbs of the Keras adapter on the PyTorch backend; ``on_tensorflow`` is its twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np
import torch

import hvdscale.torch as hvd
from hvdscale.sync import Kind, Reduction
from hvdscale.torch.bundles import NESTS
from hvdscale.torch.channel import open_channel, open_post
from hvdscale.torch.gradients import HOROVOD_OPS, reduce_gradients
from hvdscale.torch.metrics import open_writer, write_metrics
from hvdscale.torch.runtime import control, world
from hvdscale.torch.stages import TorchStages as Stages
from hvdscale.torch.teams import connect, data_ranks, team_along, tensor_team
from hvdscale.torch.tensor_parallel import enter, exchanged, join, leave, part_of, sum_over

__all__ = [
    "NESTS",
    "Stages",
    "after_check",
    "apart_from_compilers",
    "as_dense",
    "broadcast_bytes",
    "compiled",
    "compiled_by_xla",
    "connect",
    "control",
    "data_ranks",
    "draw_from",
    "eager",
    "enter",
    "exchanged",
    "exchanges",
    "forget_values",
    "gather_rows",
    "gather_slices_of",
    "hand_out",
    "hvd",
    "in_kind",
    "initialised",
    "join",
    "kind_of",
    "leave",
    "only_if",
    "op_name",
    "open_channel",
    "open_post",
    "open_writer",
    "pair",
    "part_of",
    "reduce_gradients",
    "run_between_steps",
    "same_random_state",
    "scaled",
    "send_slices",
    "slice_of_sum",
    "sum_over",
    "sum_over_ranks",
    "team_along",
    "tensor",
    "tensor_team",
    "track_parts",
    "value_and_gradients",
    "world",
    "write_metrics",
]

FRAMEWORK = "torch"


def eager() -> AbstractContextManager[Any]:
    """What runs inside happens now: here everything does."""
    return nullcontext()


def exchanges(process_set: Any) -> bool:
    """Whether this rank has anyone to exchange with."""
    return bool(process_set.included()) and process_set.size() > 1


def initialised(variables: Sequence[Any]) -> bool:
    """Whether values can be read now: here always."""
    return True


def compiled_by_xla() -> bool:
    """Whether the graph being traced will be compiled by XLA: never here."""
    return False


def apart_from_compilers(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as ``torch.compile`` sees it: left alone, and called as it is."""
    disabled: Callable[..., Any] = torch.compiler.disable(function)
    return disabled


def tensor(value: Any) -> Any:
    """A backend tensor of a number, an array, a tensor or a Keras variable."""
    if isinstance(value, keras.Variable):
        return value.value.detach()
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))


def as_dense(gradient: Any) -> Any:
    """A dense tensor of a gradient that may be sparse."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def scaled(gradient: Any, factor: float) -> Any:
    """``gradient * factor``, sparse or dense."""
    return gradient * factor


def kind_of(gradient: Any) -> Kind:
    """What this gradient is."""
    if gradient is None:
        return Kind.NONE
    return Kind.SPARSE if gradient.is_sparse else Kind.DENSE


def in_kind(gradient: Any, variable: Any, kind: Kind) -> Any:
    """``gradient`` of ``variable`` turned into ``kind``, which is no less than its own; its value stays."""
    if kind_of(gradient) == kind:
        return gradient
    if gradient is None:
        gradient = torch.zeros_like(variable.value)
    return as_dense(gradient) if kind is Kind.DENSE else gradient.to_sparse(1)


def op_name(op: int) -> Any:
    """Horovod's reduction constant as ``Reduction`` names it; unknown ones as they are, for it to refuse."""
    return next((name for name, constant in HOROVOD_OPS.items() if constant == op), op)


def broadcast_bytes(data: np.ndarray, root_rank: int, process_set: Any, name: str) -> np.ndarray:
    """``data`` (uint8) of ``root_rank``, on every rank of ``process_set``."""
    sent = hvd.broadcast(torch.from_numpy(data.copy()), root_rank, name=name, process_set=process_set)
    result: np.ndarray = sent.numpy()
    return result


def sum_over_ranks(value: Any, process_set: Any, name: str) -> Any:
    """The sum of a float tensor over ranks."""
    return hvd.allreduce(value.detach().contiguous(), op=hvd.Sum, process_set=process_set, name=name)


def slice_of_sum(flat: Any, reduction: Reduction, process_set: Any, name: str) -> Any:
    """[n] of each rank -> [n / ranks], this rank's slice of their sum, or mean."""
    before, after = reduction.scales() if reduction.op == "average" else (1.0, 1.0)
    op = HOROVOD_OPS[reduction.op]
    return hvd.reducescatter(
        flat.detach(), name, op=op, process_set=process_set, prescale_factor=before, postscale_factor=after
    )


def gather_slices_of(share: Any, process_set: Any, name: str) -> Any:
    """[n] of each rank -> [ranks * n]."""
    return hvd.allgather(share.detach(), name=name, process_set=process_set)


def send_slices(share: Any, rows: np.ndarray, process_set: Any, name: str) -> Any:
    """``rows[r]`` elements to rank r; what came, one rank's after the other."""
    return hvd.alltoall(share.detach(), torch.from_numpy(rows), name=name, process_set=process_set)[0]


def hand_out(value: Any, root_rank: int, process_set: Any, name: str) -> Any:
    """``value`` of ``root_rank``."""
    return hvd.broadcast(value.detach(), root_rank, name=name, process_set=process_set)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, row: torch.Tensor, process_set: Any, name: str) -> torch.Tensor:
        ctx.process_set, ctx.name = process_set, name
        rows: torch.Tensor = hvd.allgather(row.detach()[None].contiguous(), name=name, process_set=process_set)
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total = sum_over_ranks(gradients[0], ctx.process_set, f"{ctx.name}.gradient")
        return total[ctx.process_set.rank()], None, None


def gather_rows(row: Any, process_set: Any, name: str) -> Any:
    """``[k]`` of each rank -> ``[ranks, k]``. What depends on this rank's row is summed over all ranks' losses."""
    return _GatherRows.apply(row, process_set, name)


def only_if(condition: Callable[[], bool], change: Callable[[list[Any]], list[Any]], tensors: list[Any]) -> list[Any]:
    """``change(tensors)`` where ``condition()`` holds when the step runs; ``tensors`` elsewhere."""
    return change(tensors) if condition() else tensors


def run_between_steps(local: Any) -> None:
    """Count a step of ``local``, and meet if it is time to."""
    with torch.no_grad():
        if local.count():
            local.meet()


def track_parts(layers: Sequence[Any]) -> None:
    """Let the backend know that variables of these layers have other values, of another shape."""
    for layer in layers:
        layer._track_variables()


def same_random_state(team: Any) -> None:
    """Go on from the random state of the team's first rank."""
    torch.set_rng_state(torch.from_numpy(team.first(torch.get_rng_state().numpy()).copy()))


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as one graph: here as it is."""
    return function


def draw_from(seed: Any) -> None:
    """What is drawn outside Keras's generators comes from ``seed``, an integer."""
    torch.default_generator.manual_seed(int(seed))


def pair(seed: Any) -> Any:
    """The state of a generator that begins at ``seed``."""
    return torch.tensor([int(seed), 0])


def forget_values(layers: Sequence[Any]) -> None:
    """Let go of the values that these layers keep for torch; they collect them anew when they are asked."""
    for layer in layers:
        if hasattr(layer, "_torch_params"):
            del layer._torch_params


def value_and_gradients(function: Callable[[], Any], variables: Sequence[Any]) -> tuple[Any, list[Any]]:
    """A number, and its gradients by ``variables``."""
    value = function()
    gradients = torch.autograd.grad(value, [v.value for v in variables], allow_unused=True)
    return value.detach(), list(gradients)


def after_check(check: Callable[..., Any], result: Any, tensors: Sequence[Any]) -> Any:
    """``result``, once ``check(arrays of tensors)`` has passed."""
    check(
        *(t.detach().cpu().numpy() if isinstance(t, torch.Tensor) else np.asarray(t) for t in tensors if t is not None)
    )
    return result
