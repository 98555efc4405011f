"""Loading a saved model with its optimizer distributed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from hvdscale.errors import PlanError
from hvdscale.keras.backend import verbs
from hvdscale.keras.optimizer import DistributedOptimizer

__all__ = ["load_model"]

Compression = verbs.hvd.Compression


def load_model(
    filepath: Any,
    custom_optimizers: Sequence[type] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    compression: Any = Compression.none,
    legacy_opts: bool = False,
) -> Any:
    """Load a ``.keras`` or ``.h5`` model and distribute its optimizer, whose state is kept.

    Args:
        filepath: the file; every rank reads it.
        custom_optimizers: optimizer classes of your own that the model may use.
        custom_objects: other classes and functions by name, as Keras takes them.
        compression: of the distributed optimizer.
        legacy_opts: Horovod's switch for ``keras.optimizers.legacy``, which Keras 3 does not have.

    Returns:
        The model. One saved without an optimizer comes back without.

    Raises:
        PlanError: ``legacy_opts=True``.
    """
    if legacy_opts:
        raise PlanError("Keras 3 has no keras.optimizers.legacy. Leave legacy_opts out.")
    known = {cls.__name__: cls for cls in custom_optimizers or ()}
    model = keras.models.load_model(filepath, custom_objects={**known, **(custom_objects or {})})
    if getattr(model, "optimizer", None) is not None:
        DistributedOptimizer(model.optimizer, compression=compression)
    return model
