"""The tensors an optimizer updates on one rank: slices of the model's parameters, or float32 masters of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hvdscale.torch.placed_gradients import PlacedGradient
from hvdscale.torch.placed_reducer import master_dtype
from hvdscale.update import Bucket, Piece, Placement

__all__ = ["Slice", "Slices"]


@dataclass(eq=False)
class Slice:
    """One rank's piece of a parameter.

    ``tensor`` is what the optimizer updates: of the parameter's shape where the piece is all of it, else
    one-dimensional. It shares the parameter's memory, unless that is of half precision or not contiguous.
    """

    piece: Piece
    parameter: Tensor
    tensor: Tensor

    @classmethod
    def of(cls, piece: Piece, parameter: Tensor) -> Slice:
        part = _flat(parameter)[piece.start : piece.stop]
        if piece.size == parameter.numel():
            part = part.view(parameter.shape)
        return cls(piece, parameter, part.to(master_dtype(parameter)).detach())

    @property
    def is_master(self) -> bool:
        """Whether it keeps what the parameter's dtype would round away."""
        return self.tensor.dtype != self.parameter.dtype

    @property
    def in_place(self) -> bool:
        """Whether what the optimizer writes is in the parameter at once."""
        return self.tensor.data_ptr() == self.parameter.data_ptr() + self.piece.start * self.parameter.element_size()

    def gradient(self) -> Tensor | None:
        """Its piece of the parameter's gradient: the reduced one, or a whole tensor that was assigned."""
        given = self.parameter.grad
        if given is None:
            return None
        if isinstance(given, PlacedGradient):
            return given.part.view(self.tensor.shape)
        flat = given.detach().to_dense().reshape(-1)
        return flat[self.piece.start : self.piece.stop].to(self.tensor.dtype).view(self.tensor.shape)

    def refresh(self) -> None:
        """Take in weights that were written to the parameter since, such as a checkpoint's."""
        if self.in_place:
            return
        now = _flat(self.parameter)[self.piece.start : self.piece.stop].view(self.tensor.shape)
        same = self.tensor.to(now.dtype) == now
        self.tensor.copy_(torch.where(same, self.tensor, now.to(self.tensor.dtype)))


def _flat(parameter: Tensor) -> Tensor:
    """All elements in order: the parameter's own memory where it is contiguous."""
    return parameter.detach().reshape(-1)


class Slices:
    """All slices of one rank under one placement.

    Args:
        placement: who updates what.
        rank: whose slices, a position among the ranks that take part.
        parameters: the registry, by position.
    """

    def __init__(self, placement: Placement, rank: int, parameters: Sequence[Tensor]) -> None:
        self.placement = placement
        self._rank = rank
        self._parameters = parameters
        self._shares: dict[Bucket, Tensor] = {}  # one message buffer per bucket, kept from step to step
        self.by_position = {piece.tensor: Slice.of(piece, parameters[piece.tensor]) for piece in placement.pieces(rank)}
        self.by_parameter = {id(held.parameter): held for held in self.by_position.values()}

    @property
    def parameters(self) -> list[Tensor]:
        """All placed parameters, whoever updates them."""
        return [self._parameters[position] for position in self.positions]

    @property
    def positions(self) -> list[int]:
        """Of all placed parameters, whoever updates them."""
        return sorted(position for bucket in self.placement.buckets for position in bucket.tensors)

    @torch.no_grad()
    def load(self) -> None:
        """Make the slices ready for a step, with what is in ``.grad`` now: a script may have put something there."""
        for held in self.by_position.values():
            held.refresh()
            held.tensor.grad = held.gradient()

    def unload(self) -> None:
        """The step is over: let go of the gradients."""
        for held in self.by_position.values():
            held.tensor.grad = None

    @torch.no_grad()
    def share(self, bucket: Bucket) -> Tensor:
        """This rank's share of the updated weights, in the parameters' dtype; padding is zero. Good until the next."""
        share = self._shares.get(bucket)
        if share is None:
            like = self._parameters[bucket.tensors[0]]
            share = torch.zeros(bucket.shares[self._rank], dtype=like.dtype, device=like.device)
            self._shares[bucket] = share
        for piece in bucket.pieces(self._rank):
            share[piece.place].copy_(self.by_position[piece.tensor].tensor.reshape(-1))
        return share

    @torch.no_grad()
    def adopt(self, bucket: Bucket, weights: Tensor) -> None:
        """Write all ranks' updated weights, [size of the bucket], into the parameters, in place."""
        for position, place in zip(bucket.tensors, bucket.places(), strict=True):
            parameter, held = self._parameters[position], self.by_position.get(position)
            if held is None or not held.in_place:
                parameter.copy_(weights[place].view(parameter.shape))
                continue
            flat, arrived = _flat(parameter), weights[place]  # this rank's own part is there already
            flat[: held.piece.start].copy_(arrived[: held.piece.start])
            flat[held.piece.stop :].copy_(arrived[held.piece.stop :])
