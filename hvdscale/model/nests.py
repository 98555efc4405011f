"""Values that stages give each other: tensors in lists, tuples and dictionaries, beside numbers and text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from hvdscale.errors import PlanError

__all__ = ["Nests", "Plain"]

T = TypeVar("T")


@dataclass(frozen=True)
class Plain:
    """A further type that may stand beside tensors: how it becomes JSON, and what it was."""

    type: type[Any]
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]


@dataclass(frozen=True)
class Nests(Generic[T]):
    """Nested values of one framework.

    Args:
        tensor: its types of tensors, which have a ``shape`` and can be sliced.
        dtype: of a tensor, as text.
        plain: by a short key, further types that may be part of a value.
    """

    tensor: type[Any] | tuple[type[Any], ...]
    dtype: Callable[[T], str]
    plain: Mapping[str, Plain] = field(default_factory=dict)

    def pack(self, value: Any, tensors: list[T]) -> Any:
        """``value`` as JSON can hold it; its tensors are appended to ``tensors``.

        Raises:
            PlanError: a value of a type that cannot be sent.
        """
        if isinstance(value, self.tensor):
            tensors.append(value)
            return {"t": len(tensors) - 1}
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"v": value}
        for key, kind in self.plain.items():
            if isinstance(value, kind.type):
                return {key: kind.encode(value)}
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return {"l" if isinstance(value, list) else "u": [self.pack(item, tensors) for item in value]}
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return {"m": {key: self.pack(item, tensors) for key, item in value.items()}}
        raise PlanError(
            "Stages give each other tensors, numbers, text, and lists, tuples and dictionaries of them; a "
            f"{type(value).__name__} would have to cross. Return one of these, or keep the layers on one stage."
        )

    def unpack(self, packed: Any, tensors: Sequence[T]) -> Any:
        """What ``pack`` was given."""
        ((kind, held),) = packed.items()
        if kind == "t":
            return tensors[held]
        if kind in self.plain:
            return self.plain[kind].decode(held)
        if kind in ("l", "u"):
            items = [self.unpack(item, tensors) for item in held]
            return items if kind == "l" else tuple(items)
        if kind == "m":
            return {key: self.unpack(item, tensors) for key, item in held.items()}
        return held

    def map(self, function: Callable[[T], Any], value: Any) -> Any:
        """``value`` with ``function`` of each of its tensors in their place."""
        if isinstance(value, self.tensor):
            return function(value)
        if type(value) in (list, tuple):
            return type(value)(self.map(function, item) for item in value)
        if isinstance(value, dict):
            return {key: self.map(function, item) for key, item in value.items()}
        return value

    def select(self, value: Any, piece: slice) -> Any:
        """The samples of ``piece`` of each tensor in ``value``."""
        return self.map(lambda tensor: tensor[piece], value)  # type: ignore[index]

    def rows(self, value: Any) -> int:
        """The first dimension of the tensors in ``value``; 0 where there is none, -1 where they differ."""
        sizes: set[int] = set()
        self.map(lambda tensor: sizes.add(_shape(tensor)[0] if _shape(tensor) else -1), value)
        return sizes.pop() if len(sizes) == 1 else -1 if sizes else 0

    def text(self, value: Any) -> str:
        """Shapes and dtypes of a batch, readable."""
        if isinstance(value, self.tensor):
            return f"{self.dtype(value)}{_shape(value)}"
        if isinstance(value, (list, tuple)):
            return f"({', '.join(map(self.text, value))})"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{key}: {self.text(item)}" for key, item in value.items()) + "}"
        return repr(value)


def _shape(tensor: Any) -> list[int]:
    return list(tensor.shape)
