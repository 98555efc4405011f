"""Cross-entropy of logits whose vocabulary is split over a team: only three numbers a token travel.

Shoeybi et al., arXiv 1909.08053, section 3: "communicating scalar losses instead of logits".
"""

from __future__ import annotations

from typing import Any

from keras import ops

from hvdscale.errors import PlanError
from hvdscale.keras.backend import verbs
from hvdscale.model.layout import Split
from hvdscale.model.mesh import Mesh

__all__ = ["parallel_cross_entropy"]


def parallel_cross_entropy(logits: Any, targets: Any, vocabulary: int, mesh: Mesh) -> Any:
    """The mean over tokens of the cross-entropy of logits of which each tensor rank holds a part, in nats.

    Args:
        logits: ``float[..., part of vocabulary]``, as a ``"vocab"`` dense layer gives them.
        targets: ``int[...]``, the same on every rank of the team.
        vocabulary: how many classes there are in all; targets lie in ``0..vocabulary - 1``.
        mesh: whose tensor ranks share them.

    Returns:
        A float32 number, the same on every rank of the team.

    Raises:
        PlanError: logits that are no part of ``vocabulary``.
    """
    team = verbs.tensor_team(mesh)
    ((start, stop),) = Split(0).spans(vocabulary, team.size, team.rank)
    if logits.shape[-1] != stop - start:
        raise PlanError(
            f"logits are this rank's part of {vocabulary} classes, {stop - start}; they have {logits.shape[-1]}. "
            "A dense layer gives a part where its rule is 'vocab'."
        )
    wide = ops.cast(logits, "float32")
    most = ops.max(ops.stop_gradient(wide), axis=-1)
    most = verbs.exchanged(most, team.largest) if team.size > 1 else most
    shifted = wide - ops.expand_dims(most, -1)
    local = ops.cast(targets, "int32") - start
    here = ops.logical_and(local >= 0, local < stop - start)
    chosen = ops.one_hot(ops.where(here, local, -1), stop - start, dtype="float32")  # elsewhere zeros
    picked = ops.sum(shifted * chosen, axis=-1)
    total = verbs.leave(ops.sum(ops.exp(shifted), axis=-1), team)
    return ops.mean(ops.log(total) - verbs.leave(picked, team))
