"""The checkpoint of a rank's rounds: numbers that JSON holds, and float32 arrays by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from hvdscale.errors import HvdscaleError, StateError
from hvdscale.sync.tensors import TensorSpec
from hvdscale.update.outer import Float32s

__all__ = ["check_complete", "check_origin", "copy_into", "origin", "reading"]

_FORMAT = "hvdscale-rounds-v1"


class Plan(Protocol):
    def facts(self) -> dict[str, object]: ...


class Members(Protocol):
    """The ranks that agree, and this one's position among them."""

    rank: int
    size: int


def origin(plan: Plan, specs: Sequence[TensorSpec], members: Members) -> dict[str, Any]:
    """What a state must share with the rounds it is loaded into."""
    return {
        "format": _FORMAT,
        "rank": members.rank,
        "ranks": members.size,
        "plan": {name: str(value) for name, value in plan.facts().items()},
        "tensors": [[spec.name, list(spec.shape), spec.dtype] for spec in specs],
    }


def check_origin(state: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Raise StateError at the first thing in which a saved state is another's."""
    for name, value in mine.items():
        saved = state.get(name)
        if saved != value:
            name, saved, value = _first_difference(name, saved, value)
            raise StateError(
                f"This state of optimizer.sync belongs to other rounds: its {name} is {saved!r}, here it is {value!r}. "
                "Load the state this rank saved, with the same model, plan and number of ranks; to change any of "
                "them, load only the outer weights into the model and start new rounds."
            )


@contextmanager
def reading() -> Iterator[None]:
    """Around what takes up a state: one that is damaged is a StateError, wherever it shows."""
    try:
        yield
    except HvdscaleError:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise StateError(
            f"This state of optimizer.sync is damaged ({type(error).__name__}: {error}). Load what "
            "optimizer.sync.state_dict() gave, as it was saved."
        ) from error


def check_complete(state: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise StateError if a saved state lacks any of ``names``."""
    lacking = [name for name in names if name not in state]
    if lacking:
        raise StateError(f"The state of optimizer.sync lacks {', '.join(lacking)}. Save it anew, whole.")


def _first_difference(name: str, saved: Any, value: Any) -> tuple[str, Any, Any]:
    if isinstance(saved, Mapping) and isinstance(value, Mapping):
        for key in value:
            if saved.get(key) != value[key]:
                return name, f"{key}={saved.get(key)}", f"{key}={value[key]}"
    if isinstance(saved, list) and isinstance(value, list):
        for theirs, ours in zip(saved, value, strict=False):
            if theirs != ours:
                return name, theirs, ours
        return f"number of {name}", len(saved), len(value)
    return name, saved, value


def copy_into(arrays: Mapping[str, Float32s], name: str, target: Float32s) -> None:
    """Copy the saved array ``name`` into ``target``.

    Raises:
        StateError: it is missing, or of another size.
    """
    if name not in arrays or np.shape(arrays[name]) != target.shape:
        found = f"shape {np.shape(arrays[name])}" if name in arrays else "not there"
        raise StateError(f"The state of optimizer.sync holds an array {name!r} of shape {target.shape}; it is {found}.")
    target[...] = arrays[name]
