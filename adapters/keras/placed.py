"""``EveryStep(update="central" | "sharded")``: a Keras optimizer that is built on this rank's slices of the variables.

Gradients are reduced to the ranks that update them; each takes the optimizer's step on its slices; then all ranks'
updated weights are assigned to the model's variables. All of it is part of the graph where there is one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from hvdscale.keras.backend import verbs
from hvdscale.keras.carriers import carrier_of
from hvdscale.keras.plan import Distribution
from hvdscale.keras.replicas import path_of
from hvdscale.update import Bucket, Piece, place

__all__ = ["PlacedUpdate", "dtype_of", "master_dtype"]

_BUCKET_BYTES = 32 << 20


class PlacedUpdate:
    """Who updates what of one optimizer's variables, and this rank's slices. Made on all ranks alike.

    A slice has its variable's shape where it is all of it, else one dimension; its dtype is float32 for variables of
    half precision, so that it keeps what they round away.

    Args:
        plan: with an update that is placed.
        variables: all that the optimizer trains, in order.
    """

    def __init__(self, plan: Distribution, variables: Sequence[Any]) -> None:
        self.plan = plan
        self.variables = list(variables)
        assert plan.update is not None
        self.update = plan.update
        self._sizes = [int(np.prod(v.shape)) for v in self.variables]
        self._dtypes = [master_dtype(v) for v in self.variables]
        self.rank = plan.process_set.rank()
        self.placement = place(
            self.update,
            range(len(self.variables)),
            self._sizes,
            [dtype_of(v) for v in self.variables],
            plan.process_set.size(),
            _BUCKET_BYTES // 4,
        )
        self.pieces: list[Piece] = self.placement.pieces(self.rank)
        readable = verbs.initialised(self.variables)
        self.slices = [self._slice(piece, readable) for piece in self.pieces]
        self._of_piece = dict(zip(self.pieces, self.slices, strict=True))
        self.owners = {id(s): self.variables[p.tensor] for p, s in zip(self.pieces, self.slices, strict=True)}
        self._have_gradients: set[int] = set()  # in this step, whoever updates them
        self._present: list[int] = []  # those of them of which this rank has slices
        self._sink = keras.Variable(0.0, dtype="float32", trainable=False, name="sink")
        self._carrier = carrier_of(self.update, plan)

    @property
    def stepping(self) -> int:
        """The first rank that takes steps: others may hold nothing, or nothing that has gradients."""
        ranks = range(self.placement.ranks)
        return next((r for r in ranks if any(p.tensor in self._have_gradients for p in self.placement.pieces(r))), 0)

    def _slice(self, piece: Piece, readable: bool) -> Any:
        variable = self.variables[piece.tensor]
        whole = piece.size == self._sizes[piece.tensor]
        shape = tuple(variable.shape) if whole else (piece.size,)
        value = np.zeros(shape, "float32")
        if readable:  # some optimizers start from the weights
            flat = np.asarray(ops.convert_to_numpy(variable)).reshape(-1)
            value = flat[piece.start : piece.stop].reshape(shape)
        name = f"{path_of(variable)}".replace("/", "_")
        return keras.Variable(value, dtype=self._dtypes[piece.tensor], name=name)

    # Each step ------------------------------------------------------------------------------------------

    def reduce(self, gradients: Sequence[Any], reduced: bool) -> list[Any]:
        """A gradient for each of ``slices``. ``None`` where the variable has none.

        ``reduced``: the gradients are those of all ranks already.
        """
        shares = {}
        for number, bucket in enumerate(self.placement.buckets):
            flat = self._flat(gradients, bucket)
            if reduced:
                first = sum(bucket.shares[: self.rank])
                shares[bucket] = flat[first : first + bucket.shares[self.rank]]
            else:
                shares[bucket] = self._carrier.reduce(flat, bucket, f"{self.plan.name}.share.{number}")
        found: list[Any] = []
        for bucket in self.placement.buckets:
            for piece in bucket.pieces(self.rank):
                if gradients[piece.tensor] is None:
                    found.append(None)
                else:
                    part = shares[bucket][piece.at : piece.at + piece.size]
                    found.append(ops.reshape(part, self._of_piece[piece].shape))
        self._have_gradients = {position for position, gradient in enumerate(gradients) if gradient is not None}
        self._present = [p.tensor for p in self.pieces if p.tensor in self._have_gradients]
        self._take_part(shares, gradients)
        return found

    def _take_part(self, shares: dict[Bucket, Any], gradients: Sequence[Any]) -> None:
        """A graph leaves out what nobody uses. A rank may have no use for its share, and others wait for it."""
        unused = [
            share
            for bucket, share in shares.items()
            if all(gradients[piece.tensor] is None for piece in bucket.pieces(self.rank))
        ]
        if unused:
            self._sink.assign(sum(ops.sum(ops.cast(share, "float32")) for share in unused))

    def _flat(self, gradients: Sequence[Any], bucket: Bucket) -> Any:
        """The message: float[size of the bucket]."""
        dtype = self._dtypes[bucket.tensors[0]]
        parts = []
        for position, size in zip(bucket.tensors, bucket.sizes, strict=True):
            gradient = gradients[position]
            if gradient is None:
                parts.append(ops.zeros((size,), dtype))
            else:
                # Not (-1,): in a graph a gradient's shape may be known only when it runs.
                parts.append(ops.cast(ops.reshape(verbs.as_dense(gradient), (size,)), dtype))
        return _joined(parts, bucket.size, dtype)

    def refresh(self) -> None:
        """Take the model's weights, which may have been loaded since; a master keeps what they round away."""
        for piece, held in zip(self.pieces, self.slices, strict=True):
            variable = self.variables[piece.tensor]
            flat = ops.reshape(verbs.tensor(variable), (-1,))[piece.start : piece.stop]
            now = ops.reshape(flat, held.shape)
            if dtype_of(held) != dtype_of(variable):
                own = verbs.tensor(held)
                same = ops.equal(ops.cast(own, dtype_of(variable)), now)
                now = ops.where(same, own, ops.cast(now, dtype_of(held)))
            held.assign(now)

    def spread(self) -> None:
        """Assign all ranks' updated weights to the model's variables, and apply their constraints."""
        for number, bucket in enumerate(self.placement.buckets):
            dtype = dtype_of(self.variables[bucket.tensors[0]])
            own = [
                ops.cast(ops.reshape(verbs.tensor(self._of_piece[p]), (-1,)), dtype) for p in bucket.pieces(self.rank)
            ]
            share = _joined(own, bucket.shares[self.rank], dtype)
            whole = self._carrier.spread(share, bucket, f"{self.plan.name}.weights.{number}")
            for position, at in zip(bucket.tensors, bucket.places(), strict=True):
                variable = self.variables[position]
                value = ops.reshape(whole[at.start : at.stop], variable.shape)
                constraint = getattr(variable, "constraint", None)
                variable.assign(value if constraint is None else constraint(value))

    # Norms ----------------------------------------------------------------------------------------------

    def clip(self, optimizer: Any, gradients: Sequence[Any]) -> list[Any]:
        """``clipnorm`` and ``global_clipnorm`` by the norms of whole gradients.

        ``gradients`` are those of this step's slices that have one, in order.
        """
        owners = dict(enumerate(self._present))
        squares = {t: ops.sum(ops.square(ops.cast(gradients[i], "float32"))) for i, t in owners.items()}
        zero = ops.zeros((), "float32")
        own = ops.stack([squares.get(position, zero) for position in range(len(self.variables))])
        norms = ops.sqrt(verbs.sum_over_ranks(own, self.plan.process_set, f"{self.plan.name}.norms"))
        if optimizer.clipnorm and optimizer.clipnorm > 0:
            limit = float(optimizer.clipnorm)
            factors = limit / ops.maximum(norms, limit)
        else:
            limit = float(optimizer.global_clipnorm)
            total = ops.sqrt(ops.sum(ops.square(norms)))
            # As Keras: a norm that is not finite makes every gradient NaN, on every rank.
            factor = ops.where(ops.isfinite(total), limit / ops.maximum(total, limit), float("nan"))
            factors = ops.ones_like(norms) * factor
        self._sink.assign(ops.sum(norms))  # a graph leaves out what nobody uses, and others wait for it
        clipped = list(gradients)
        for i, position in owners.items():
            clipped[i] = gradients[i] * ops.cast(factors[position], gradients[i].dtype)
        return clipped


def _joined(parts: list[Any], size: int, dtype: str) -> Any:
    """``parts`` one after the other, and zeros up to ``size``."""
    missing = size - sum(int(part.shape[0]) for part in parts)
    if missing or not parts:
        parts = [*parts, ops.zeros((missing,), dtype)]
    return parts[0] if len(parts) == 1 else ops.concatenate(parts)


def dtype_of(variable: Any) -> str:
    """Its name, of a Keras variable or the framework's own."""
    return str(keras.backend.standardize_dtype(variable.dtype))


def master_dtype(variable: Any) -> str:
    """Of what is updated in its place."""
    return "float32" if dtype_of(variable) in ("float16", "bfloat16") else dtype_of(variable)
