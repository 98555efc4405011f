"""hvdscale: scale a training script with Horovod, correctly, on today's PyTorch, TensorFlow and Keras.

Import the adapter of your framework: ``hvdscale.torch``, ``hvdscale.tensorflow`` or ``hvdscale.keras``.
This package itself imports no framework.
"""

from hvdscale._version import __version__

__all__ = ["__version__"]
