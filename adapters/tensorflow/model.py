"""``shard_model`` where scripts on plain TensorFlow look for it: models are Keras models, of the Keras adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from hvdscale.errors import PlanError
from hvdscale.model.mesh import Mesh

if TYPE_CHECKING:
    from hvdscale.tensorflow.keras import ShardedModel

__all__ = ["ShardedModel", "parallel_cross_entropy", "shard_model"]


def shard_model(model: Any, mesh: Mesh, by: str = "layers", **arguments: Any) -> ShardedModel:
    """``hvdscale.keras.shard_model``, whose ``model`` is a Keras model or a list of Keras layers.

    Args:
        arguments: see there.

    Raises:
        PlanError: a ``tf.Module`` or a function, of which nobody knows the layers; a Keras that runs on another
            backend; and as ``hvdscale.keras.shard_model``.
    """
    if not isinstance(model, (keras.Model, list, tuple)):
        what = "a function" if callable(model) and not isinstance(model, tf.Module) else f"a {type(model).__name__}"
        raise PlanError(
            f"shard_model takes a Keras model or a list of Keras layers; it was given {what}, whose layers nobody "
            "knows. Make its parts keras.layers.Layer, and list them with keras.Input(...) before them."
        )
    from hvdscale.tensorflow.keras import shard_model as shard_keras

    return shard_keras(model, mesh, by, **arguments)


def parallel_cross_entropy(*arguments: Any, **named: Any) -> tf.Tensor:
    """``hvdscale.keras.parallel_cross_entropy``, of TensorFlow's tensors.

    Raises:
        PlanError: as there, or a Keras that runs on another backend.
    """
    from hvdscale.tensorflow.keras import parallel_cross_entropy as of_keras

    return of_keras(*arguments, **named)


def __getattr__(name: str) -> Any:
    """The class comes from the Keras adapter, which imports this one."""
    if name == "ShardedModel":
        from hvdscale.tensorflow.keras import ShardedModel

        return ShardedModel
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
