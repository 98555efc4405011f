"""Loading a saved model with its optimizer distributed again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import keras
from keras.src.legacy.saving.legacy_h5_format import load_optimizer_weights_from_hdf5_group

from hvdscale.errors import PlanError, StateError
from hvdscale.keras.backend import verbs
from hvdscale.keras.keras_hooks import reducer_of
from hvdscale.keras.optimizer import DistributedOptimizer

__all__ = ["load_model"]

Compression = verbs.hvd.Compression


def load_model(
    filepath: Any,
    custom_optimizers: Sequence[type] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    compression: Any = Compression.none,
    legacy_opts: bool = False,
    *,
    sync: Any = None,
) -> Any:
    """Load a ``.keras`` or ``.h5`` model and distribute its optimizer, whose state is kept.

    Args:
        filepath: the file; every rank reads it.
        custom_optimizers: optimizer classes of your own that the model may use.
        custom_objects: other classes and functions by name, as Keras takes them.
        compression: of the distributed optimizer.
        sync: the plan of the distributed optimizer.
        legacy_opts: Horovod's switch for ``keras.optimizers.legacy``, which Keras 3 does not have.

    Returns:
        The model. One saved without an optimizer comes back without.

    Raises:
        PlanError: ``legacy_opts=True``.
        StateError: an ``.h5`` file whose optimizer state does not fit the model.
    """
    if legacy_opts:
        raise PlanError("Keras 3 has no keras.optimizers.legacy. Leave legacy_opts out.")
    known = {cls.__name__: cls for cls in custom_optimizers or ()}
    model = keras.models.load_model(filepath, custom_objects={**known, **(custom_objects or {})})
    if getattr(model, "optimizer", None) is not None:
        if Path(str(filepath)).suffix in (".h5", ".hdf5"):
            _restore_optimizer(model, filepath)
        DistributedOptimizer(model.optimizer, compression=compression, sync=sync)
        reducer_of(model.optimizer).know(model)
    return model


def _restore_optimizer(model: Any, filepath: Any) -> None:
    """Give the model the optimizer state of an ``.h5`` file, which Keras 3 builds for no variables and so loses."""
    with h5py.File(filepath, "r") as file:
        if "optimizer_weights" not in file:
            return
        values = [value[()] for value in load_optimizer_weights_from_hdf5_group(file)]
    optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
    optimizer.build(model.trainable_variables)
    if [tuple(v.shape) for v in optimizer.variables] != [tuple(v.shape) for v in values]:
        raise StateError(
            f"{filepath} holds {len(values)} optimizer variables, and {optimizer.name} has "
            f"{len(optimizer.variables)} for this model, or their shapes differ. Save it as .keras instead."
        )
    for variable, value in zip(optimizer.variables, values, strict=True):
        variable.assign(value)
    model.optimizer = optimizer
