"""What one rank of a pipeline holds, as a Keras model that trains with ``fit``, on the same batches on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from hvdscale.errors import PlanError
from hvdscale.keras.backend import verbs

__all__ = ["Held"]


class Held(keras.Model):
    """The layers of this rank's stages.

    Args:
        layers: those of its units; and variables that belong to none.
        sharded: takes the steps.
    """

    def __init__(self, layers: Sequence[Any], loose: Sequence[Any], sharded: Any) -> None:
        super().__init__(name="held")
        self.held, self.loose = list(layers), list(loose)
        object.__setattr__(self, "_hvdscale_sharded", sharded)  # not part of the model; and XLA is off
        object.__setattr__(self, "_hvdscale_apply", None)
        self.built = True

    def call(self, *inputs: Any, **named: Any) -> Any:
        raise PlanError(
            "A rank of a pipeline holds some layers, and cannot give the model's output alone. Use train_step, "
            "eval_step or fit; or load sharded.state_dict() into a whole model."
        )

    def compile(self, *arguments: Any, **named: Any) -> None:
        """As ``keras.Model.compile``, for the optimizer; the loss may be left out, or be that of ``shard_model``.

        Raises:
            PlanError: metrics, which would need the model's output, or another loss.
        """
        given = {**dict(zip(("optimizer", "loss", "loss_weights", "metrics"), arguments, strict=False)), **named}
        if given.get("loss") in (None, self._hvdscale_sharded.loss):
            given.pop("loss", None)
        refused = [n for n in ("loss", "loss_weights", "metrics", "weighted_metrics") if given.get(n) is not None]
        if refused:
            raise PlanError(
                f"The last rank alone has the model's output: {' and '.join(refused)} cannot be given to compile here. "
                "The loss is the one given to shard_model(loss=...)."
            )
        super().compile(**{**given, "run_eagerly": True, "jit_compile": False})
        object.__setattr__(self, "_hvdscale_apply", None)

    def train_step(self, data: Any) -> dict[str, Any]:
        x, y = _both(data)
        sharded = self._hvdscale_sharded
        loss, gradients = sharded.train_step(x, y)
        if self._hvdscale_apply is None:
            if not self.optimizer.built:
                self.optimizer.build(self.trainable_variables)
            apply = self.optimizer.apply
            step = verbs.compiled(lambda given: apply(given, self.trainable_variables))
            object.__setattr__(self, "_hvdscale_apply", step)
        self._hvdscale_apply(gradients)
        return self._noted(loss, y)

    def test_step(self, data: Any) -> dict[str, Any]:
        x, y = _both(data)
        return self._noted(self._hvdscale_sharded.eval_step(x, y), y)

    def _noted(self, loss: Any, y: Any) -> dict[str, Any]:
        self._loss_tracker.update_state(loss, sample_weight=verbs.NESTS.rows(y))
        result: dict[str, Any] = self.get_metrics_result()
        return result


def _both(data: Any) -> tuple[Any, Any]:
    x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
    if weight is not None:
        raise PlanError("A pipeline takes no sample weights. Make them part of y, and of loss=...")
    return x, y
