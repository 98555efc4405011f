"""Making ranks equal: weights, buffers and optimizer state of one rank for all. No pickle, no step."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from horovod.torch import ProcessSet, global_process_set
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdscale.errors import PlanError
from hvdscale.runtime.agreement import Fingerprint, agree
from hvdscale.runtime.transport import broadcast as broadcast_bytes
from hvdscale.torch.collectives import broadcast_async_
from hvdscale.torch.handles import synchronize
from hvdscale.torch.runtime import control
from hvdscale.torch.structure import decode, encode

__all__ = ["broadcast_optimizer_state", "broadcast_parameters"]

Parameters = dict[str, Any] | Iterable[Tensor] | Iterable[tuple[str, Tensor]]


def broadcast_parameters(params: Parameters, root_rank: int, process_set: ProcessSet = global_process_set) -> None:
    """Overwrite tensors on every rank with those of ``root_rank``, in place. Collective.

    Ranks compare names, shapes and dtypes first, so that nothing is sent between different models.

    Args:
        params: ``model.state_dict()``, ``model.named_parameters()``, ``model.parameters()`` or a list.
            Entries of a dictionary that are not tensors stay as they are, with a warning; ``None`` without.
        root_rank: global rank.
        process_set: the ranks that take part.

    Raises:
        PlanError: not parameters, or ``root_rank`` does not take part.
        DesyncError: ranks hold different tensors.
    """
    named = _named_tensors(params)
    _check_root(root_rank, process_set)
    if process_set.size() == 1:
        return
    tensors = [(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in named]
    agree(Fingerprint.of(tensors, {"root rank": root_rank}), control(process_set), "the parameters to broadcast")
    _broadcast_tensors([t for _, t in named], root_rank, "parameters", process_set)


def broadcast_optimizer_state(
    optimizer: Optimizer,
    root_rank: int,
    model: nn.Module | None = None,
    process_set: ProcessSet = global_process_set,
) -> None:
    """Give every rank the optimizer state and group options (learning rate, ...) of ``root_rank``. Collective.

    No step is taken: weights and step counters stay. Tensors a rank has already are overwritten in place, those it
    lacks are made, and those ``root_rank`` lacks are dropped. Where ranks hold parts of one state (``EveryStep`` with
    ``update="central"`` or ``"sharded"``), it stays where it is. Group options that are neither numbers, text,
    tensors nor lists of them (functions, say) stay as they are.

    Args:
        optimizer: plain or distributed; any type, LBFGS too.
        root_rank: global rank.
        model: accepted for Horovod's sake; not needed.
        process_set: the ranks that take part.

    Raises:
        PlanError: ``root_rank`` does not take part.
        DesyncError: parameter groups differ between ranks.
        StateError: the state holds values that cannot be sent.
    """
    _check_root(root_rank, process_set)
    if process_set.size() == 1:
        return
    transport = control(process_set)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shapes = [(f"parameter {i}", tuple(p.shape), str(p.dtype)) for i, p in enumerate(parameters)]
    sizes = [len(group["params"]) for group in optimizer.param_groups]
    agree(Fingerprint.of(shapes, {"group sizes": sizes, "root rank": root_rank}), transport, "the optimizer")

    root = list(process_set.ranks).index(root_rank)
    sent: list[Tensor] = []
    message = b""
    if transport.rank == root:
        options = [
            {k: encode(v, sent, f"option {k}", optional=True) for k, v in group.items() if k not in _OWN}
            for group in optimizer.param_groups
        ]
        places = {id(p): i for i, p in enumerate(parameters)}
        state: list[Any] | None = [
            [places.get(id(key), key), encode(value, sent, "the state")]
            for key, value in optimizer.state.items()
            if isinstance(key, str) or id(key) in places
        ]
        exchange = getattr(getattr(optimizer, "_hvdscale", None), "exchange", None)
        if getattr(exchange, "is_cut", False):
            state = None  # every rank holds a part, and nobody the whole: there is nothing to copy
        message = json.dumps({"options": options, "state": state}).encode()
    described = json.loads(broadcast_bytes(transport, message, root))
    if transport.rank != root:
        for group, options in zip(optimizer.param_groups, described["options"], strict=True):
            for key in [k for k in group if k not in options and k not in _OWN]:
                del group[key]
            for key, value in options.items():
                group[key] = decode(value, sent, like=group.get(key))
        if described["state"] is not None:
            before = dict(optimizer.state)
            optimizer.state.clear()
            for key, value in described["state"]:
                owner: Any = key if isinstance(key, str) else parameters[key]
                device = None if isinstance(key, str) else parameters[key].device
                optimizer.state[owner] = decode(value, sent, like=before.get(owner), device=device)
    _broadcast_tensors(sent, root_rank, "optimizer", process_set)


_OWN = frozenset({"params", "param_names"})  # entries of a group that are this rank's own objects


def _named_tensors(params: Parameters) -> list[tuple[str, Tensor]]:
    if isinstance(params, (Tensor, str, bytes, nn.Module)) or not isinstance(params, Iterable):
        raise PlanError(
            f"params must be a state_dict, named parameters or a list of tensors, got {type(params).__name__}. "
            "For a module pass module.state_dict()."
        )
    if isinstance(params, dict):
        entries: list[tuple[str, Any]] = [(str(k), v) for k, v in sorted(params.items(), key=lambda item: str(item[0]))]
    else:
        entries = [p if isinstance(p, tuple) else (f"{i}", p) for i, p in enumerate(params)]
    for name, value in entries:
        if isinstance(value, (dict, list)):
            raise PlanError(
                f"params[{name!r}] is a {type(value).__name__}, not a tensor. An optimizer's state is sent by "
                "broadcast_optimizer_state(optimizer, root_rank); pass here one tensor per entry."
            )
    left_out = [name for name, value in entries if value is not None and not isinstance(value, Tensor)]
    if left_out:
        warnings.warn(
            f"broadcast_parameters leaves entries that are not tensors as they are: {', '.join(left_out)}.",
            stacklevel=3,
        )
    return [(name, value) for name, value in entries if isinstance(value, Tensor)]


def _check_root(root_rank: int, process_set: ProcessSet) -> None:
    ranks = list(process_set.ranks or ())
    if root_rank not in ranks:
        raise PlanError(f"root_rank must be one of the ranks that take part ({ranks}), got {root_rank}.")


def _broadcast_tensors(tensors: Sequence[Tensor], root_rank: int, what: str, process_set: ProcessSet) -> None:
    handles = [
        broadcast_async_(tensor, root_rank, f"hvdscale.broadcast.{what}.{i}", process_set)
        for i, tensor in enumerate(tensors)
    ]
    for handle in handles:
        synchronize(handle)
