"""The adapter of the Keras backend in use: one handful of verbs, whichever it is."""

from __future__ import annotations

from typing import Any

from hvdscale.errors import BuildError
from hvdscale.runtime.console import quiet_import
from hvdscale.runtime.horovod import require_horovod

with quiet_import("tensorflow"):  # Keras imports it on any backend, where it is installed
    import keras

__all__ = ["NAME", "verbs"]

NAME: str = keras.backend.backend()

if NAME not in ("tensorflow", "torch"):
    raise BuildError(
        f"hvdscale.keras works on the Keras backends 'tensorflow' and 'torch'; Keras runs on {NAME!r} here. "
        "Set KERAS_BACKEND=tensorflow or KERAS_BACKEND=torch before Keras is imported."
    )
require_horovod(NAME)

verbs: Any
if NAME == "tensorflow":
    from hvdscale.keras import on_tensorflow as verbs
else:
    from hvdscale.keras import on_torch as verbs
