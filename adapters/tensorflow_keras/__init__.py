"""``hvdscale.tensorflow.keras``: every public name of ``horovod.tensorflow.keras``, by way of ``hvdscale.keras``."""

import keras

from hvdscale.errors import BuildError

if keras.backend.backend() != "tensorflow":
    raise BuildError(
        f"hvdscale.tensorflow.keras is Keras on TensorFlow, but Keras runs on {keras.backend.backend()!r} here. "
        "Import hvdscale.keras, which works on both, or set KERAS_BACKEND=tensorflow."
    )

from importlib import import_module

from hvdscale.keras import *  # noqa: F403
from hvdscale.keras import __all__ as __all__

# By import_module: the names are taken by those of hvdscale.keras.
callbacks = import_module("hvdscale.tensorflow.keras.callbacks")
elastic = import_module("hvdscale.tensorflow.keras.elastic")
