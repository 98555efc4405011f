"""Gradients on their way to the ranks that update them: flattened into buckets, reduced, and each rank given its share.

What a round is, and when a bucket leaves, is the same as in ``Reducer``. A parameter's own gradient is given up when
its bucket leaves; when all have arrived ``.grad`` is a ``PlacedGradient``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvdscale.errors import PlanError
from hvdscale.runtime.patience import patience
from hvdscale.torch.carriers import Arrival, Carrier
from hvdscale.torch.collectives import allgather
from hvdscale.torch.placed_gradients import PlacedGradient
from hvdscale.torch.reducer import Reducer
from hvdscale.torch.runtime import control
from hvdscale.update import Bucket, Placement

__all__ = ["PlacedReducer", "master_dtype"]


def master_dtype(parameter: Tensor) -> torch.dtype:
    """In which dtype a parameter is updated, and its gradient added up: float32 for the half precisions."""
    return torch.float32 if parameter.dtype in (torch.float16, torch.bfloat16) else parameter.dtype


class PlacedReducer(Reducer):
    """Reduces gradients to shares.

    Args:
        plan: ``plan(positions)`` places the trainable parameters; collective, called when they change.
        carrier: moves the buckets.
        arguments: those of ``Reducer``.
    """

    def __init__(self, plan: Callable[[list[int]], Placement], carrier: Carrier, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._place = plan
        self._carrier = carrier
        self._bucket_at: dict[int, Bucket] = {}
        self._flat: dict[Bucket, Tensor] = {}  # one message buffer per bucket, kept from round to round
        self._arrivals: list[tuple[Bucket, Arrival]] = []
        self.parts: dict[int, PlacedGradient] = {}  # by position
        self._norms: dict[float, dict[int, float]] = {}
        self._transport = control(arguments["process_set"])

    def new_round(self) -> None:
        if not self.busy:
            self._drop()
        super().new_round()

    def forget(self) -> None:
        self._arrivals = []
        super().forget()

    def _drop(self) -> None:
        """Reduced gradients take part in one step only: a backward pass cannot add to them."""
        for position, part in self.parts.items():
            if self._parameters[position].grad is part:
                self._parameters[position].grad = None
        self.parts = {}

    def _plan(self, positions: list[int]) -> list[list[int]]:
        placement = self._place(positions)
        self._bucket_at = {position: bucket for bucket in placement.buckets for position in bucket.tensors}
        self._flat = {}
        return [list(bucket.tensors) for bucket in placement.buckets]

    def _launch(self, bucket: list[int]) -> None:
        held = self._bucket_at.get(bucket[0])
        if held is None:  # unfrozen in the middle of a round: it takes part from the next one on
            return
        flat = self._flat.get(held)
        if flat is None:
            like = self._parameters[held.tensors[0]]
            flat = self._flat[held] = torch.zeros(held.size, dtype=master_dtype(like), device=like.device)
        for position, place in zip(held.tensors, held.places(), strict=True):
            parameter = self._parameters[position]
            target = flat[place].view(parameter.shape)
            if parameter.grad is None:
                target.zero_()  # another rank may have used the parameter
            else:
                target.copy_(self._dense(position))
                parameter.grad = None
        name = f"{self._prefix}{self._names[held.tensors[0]]}.share"
        self._flights.append((list(held.tensors), list))
        self._arrivals.append((held, self._carrier.reduce(flat, held, name)))

    def _dense(self, position: int) -> Tensor:
        gradient = self._parameters[position].grad
        assert gradient is not None
        if not gradient.is_sparse:
            return gradient.detach()
        if not self.reduction.sparse_as_dense:
            raise PlanError(
                f"The gradient of {self._names[position]} is sparse, and updates that are placed travel dense. Pass "
                'sparse_as_dense=True, or use EveryStep(update="local").'
            )
        return gradient.detach().to_dense()

    def _wait(self) -> None:
        self._flights = []
        arrivals, self._arrivals = self._arrivals, []
        finishes = [(bucket, arrive()) for bucket, arrive in arrivals]
        rank = self._process_set.rank()
        self.changed()
        for bucket, finish in finishes:
            share = finish()
            pieces = {piece.tensor: piece for piece in bucket.pieces(rank)}
            for position in bucket.tensors:
                parameter, piece = self._parameters[position], pieces.get(position)
                part = share[piece.place] if piece is not None else share[:0]
                self.parts[position] = PlacedGradient(parameter, part, self, self._names[position])
                parameter.grad = self.parts[position]

    # The home of the parts -----------------------------------------------------------------------------

    def changed(self) -> None:
        self._norms = {}

    def norms(self, order: float) -> dict[int, float]:
        if order not in self._norms:
            positions = sorted(self.parts)
            own = [_power_sum(self.parts[p].part, order) for p in positions]
            everyone = self._everyone("The norm of a gradient", own)  # [ranks][parameters]
            together = [_joined(column, order) for column in zip(*everyone, strict=True)]
            self._norms[order] = {id(self.parts[p]): norm for p, norm in zip(positions, together, strict=True)}
        return self._norms[order]

    def any_rank(self, flag: Tensor) -> None:
        everyone = self._everyone("A gradient scaler's check", [float(flag)])
        flag.fill_(float(np.max(everyone)))

    def whole(self, gradient: PlacedGradient) -> Tensor:
        with patience("full_tensor() of a gradient"):
            joined = allgather(gradient.part, f"{self._prefix}{gradient.owner}.whole", self._process_set)
        return joined.view(gradient.shape).to(gradient.dtype)

    def _everyone(self, call: str, numbers: Sequence[float]) -> list[list[float]]:
        with patience(call):
            return [json.loads(data) for data in self._transport.allgather(json.dumps(list(numbers)).encode())]


def _power_sum(part: Tensor, order: float) -> float:
    """What adds up, or for the limits is compared, over ranks to the norm of this order."""
    if order == float("inf"):
        return float(part.abs().max()) if part.numel() else 0.0
    if order == float("-inf"):
        return float(part.abs().min()) if part.numel() else float("inf")
    if order == 0 or not part.numel():
        return float(torch.count_nonzero(part))
    return float(torch.linalg.vector_norm(part, order, dtype=torch.float64)) ** order


def _joined(values: Sequence[float], order: float) -> float:
    if order == float("inf"):
        return float(np.max(values))  # NaN if there is one
    if order == float("-inf"):
        return float(np.min(values))
    total = sum(values)  # in rank order: the same bits everywhere
    return total if order == 0 else total ** (1.0 / order)
