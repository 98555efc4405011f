"""Variables without values: those of a model that was described only, and those that other ranks hold."""

from __future__ import annotations

from typing import Any

from keras.src.backend.common import global_state

from hvdscale.errors import StateError
from hvdscale.keras.backend import verbs

__all__ = ["give_up", "give_value"]


def give_value(variable: Any) -> None:
    """A variable that has none gets its first value."""
    if variable._value is None:
        variable._initialize_with_initializer(variable._initializer)
        variable._initializer = None
        _waits_no_more(variable)


def give_up(variables: list[Any], layers: list[Any]) -> None:
    """Free the memory of ``variables``, which other ranks hold; whoever reads one is told so.

    Args:
        layers: all that may hold them.
    """
    for variable in variables:
        variable._value = None
        variable._initializer = _Elsewhere(variable.path)
        _waits_no_more(variable)
    verbs.forget_values(layers)


def _waits_no_more(variable: Any) -> None:
    """Keras gives values to what waits for them when a stateless scope ends."""
    waiting = global_state.get_global_attribute("uninitialized_variables", [])
    global_state.set_global_attribute("uninitialized_variables", [v for v in waiting if v is not variable])


class _Elsewhere:
    """Stands where a variable's initializer was."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __call__(self, *shape: Any, **kind: Any) -> Any:
        raise StateError(
            f"{self._path} lies on another rank of the pipeline. sharded.state_dict() has the whole model, and "
            "sharded.eval_step() runs it."
        )
