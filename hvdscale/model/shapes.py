"""What stages send each other, as learned in the first run of a signature: shapes, dtypes, structure."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hvdscale.errors import PlanError
from hvdscale.model.verbs import Bytes, Spec

__all__ = ["Form", "Shapes", "Signature"]

Signature = Hashable
"""Equal where the shapes and dtypes of a run's inputs, and what is done with them, are equal."""

Key = tuple[int, int, int]  # source stage, target stage, micro-batch


@dataclass(frozen=True)
class Form:
    """All that a receiver must know of a bundle before it comes."""

    specs: tuple[Spec, ...]
    structure: str

    @property
    def gradients(self) -> tuple[Spec, ...]:
        """Of the gradients that travel back."""
        return tuple(spec for spec in self.specs if spec.grad)

    def encode(self) -> Bytes:
        rows = [[list(spec.shape), spec.dtype, spec.grad] for spec in self.specs]
        return np.frombuffer(json.dumps([rows, self.structure]).encode(), np.uint8)

    @classmethod
    def decode(cls, data: Bytes) -> Form:
        rows, structure = json.loads(data.tobytes())
        return cls(tuple(Spec(tuple(shape), dtype, grad) for shape, dtype, grad in rows), structure)


@dataclass
class Shapes:
    """The form of every bundle that this rank sends or receives. ``complete``: a whole run was seen."""

    complete: bool = False
    _forms: dict[Key, Form] = field(default_factory=dict)

    def learn(self, key: Key, form: Form) -> None:
        """Remember a form, or check that it is the one remembered.

        Raises:
            PlanError: inputs of the same shapes gave another form than before.
        """
        if self._forms.setdefault(key, form) != form:
            source, target, microbatch = key
            raise PlanError(
                f"Inputs of equal shapes must give activations of equal shapes; stage {source} gave stage {target} "
                f"{_shown(self._forms[key].specs)} for micro-batch {microbatch} before, and {_shown(form.specs)} now. "
                "Pad what depends on values, or do it within one stage."
            )

    def __getitem__(self, key: Key) -> Form:
        return self._forms[key]


def _shown(specs: Sequence[Spec]) -> str:
    return ", ".join(f"{spec.dtype}{list(spec.shape)}{'' if spec.grad else ' (no gradient)'}" for spec in specs)
