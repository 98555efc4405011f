"""Every error hvdscale raises. A message gives the rule, the offending values and the next step."""

__all__ = [
    "BuildError",
    "DesyncError",
    "HvdscaleError",
    "PlanError",
    "StateError",
    "TransportError",
    "WorldError",
]


class HvdscaleError(Exception):
    """Base of every error raised by hvdscale."""

    # TensorFlow re-raises an error from inside a tf.function as its own type only if the type has this initialiser.
    __init__ = Exception.__init__


class PlanError(HvdscaleError, ValueError):
    """A plan or an argument that cannot be carried out."""


class WorldError(HvdscaleError, RuntimeError):
    """The launch is broken: ranks and world size do not fit together."""


class DesyncError(HvdscaleError, RuntimeError):
    """Ranks disagree on what they are about to do.

    Raised on every rank with the same message, which names the ranks and the first difference.
    """


class TransportError(HvdscaleError, RuntimeError):
    """Bytes could not be moved between ranks."""


class StateError(HvdscaleError, ValueError):
    """A saved state does not fit what it is loaded into."""


class BuildError(HvdscaleError, ImportError):
    """Horovod is missing, does not fit the installed frameworks, or could not be built."""
