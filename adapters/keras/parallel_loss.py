"""Cross-entropy of logits whose vocabulary is split over a team: only three numbers a token travel.

Shoeybi et al., arXiv 1909.08053, section 3: "communicating scalar losses instead of logits".
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from keras import ops

from hvdscale.errors import PlanError
from hvdscale.keras.backend import verbs
from hvdscale.model.layout import Split
from hvdscale.model.mesh import Mesh

__all__ = ["parallel_cross_entropy"]


def parallel_cross_entropy(
    logits: Any,
    targets: Any,
    vocabulary: int,
    mesh: Mesh,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Any:
    """The cross-entropy of logits of which each tensor rank holds a part, in nats. Collective over the team.

    Args:
        logits: ``float[..., part of vocabulary]``, as a ``"vocab"`` dense layer gives them.
        targets: ``int[...]``, the same on every rank of the team.
        vocabulary: how many classes there are in all.
        mesh: whose tensor ranks share them.
        ignore_index: targets that count for nothing.
        reduction: ``"mean"`` over targets that count, ``"sum"``, or ``"none"``.

    Returns:
        float32: a number, or ``[...]``; the same on every rank of the team.

    Raises:
        PlanError: logits that are no part of ``vocabulary``, a target that is no class, another ``reduction``. In a
            TensorFlow graph the second is TensorFlow's own error, with the same text.
    """
    team = verbs.tensor_team(mesh)
    ((start, stop),) = Split(0).spans(vocabulary, team.size, team.rank)
    targets = ops.cast(targets, "int32")
    shape, wanted = list(logits.shape), [*targets.shape, stop - start]
    if len(shape) != len(wanted) or any(None not in (a, b) and a != b for a, b in zip(shape, wanted, strict=True)):
        raise PlanError(
            f"logits are this rank's part of {vocabulary} classes, {wanted}; they have shape {shape}. A dense layer "
            "gives a part where its rule is 'vocab'."
        )
    if reduction not in ("mean", "sum", "none"):
        raise PlanError(f"reduction is 'mean', 'sum' or 'none'; it is {reduction!r}.")

    def check(classes: np.ndarray) -> np.ndarray:
        wrong = classes[(classes != ignore_index) & ((classes < 0) | (classes >= vocabulary))]
        if wrong.size:
            raise PlanError(f"targets are classes 0 to {vocabulary - 1}; {wrong[0]} is among them.")
        return np.zeros((), np.int32)

    targets = verbs.after_check(check, targets, [targets])
    counted = targets != ignore_index
    wide = ops.cast(logits, "float32")
    most = ops.max(ops.stop_gradient(wide), axis=-1)
    most = verbs.exchanged(most, team.largest) if team.size > 1 else most
    shifted = wide - ops.expand_dims(most, -1)
    local = targets - start
    here = ops.logical_and(counted, ops.logical_and(local >= 0, local < stop - start))
    chosen = ops.one_hot(ops.where(here, local, -1), stop - start, dtype="float32")  # elsewhere zeros
    picked = ops.sum(shifted * chosen, axis=-1)
    total = verbs.leave(ops.sum(ops.exp(shifted), axis=-1), team)
    counts = ops.cast(counted, "float32")
    losses = (ops.log(total) - verbs.leave(picked, team)) * counts
    if reduction == "none":
        return losses
    return ops.sum(losses) / ops.sum(counts) if reduction == "mean" else ops.sum(losses)
