"""Names of Keras variables: each once, and the same on ranks that have built other things before."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["renumbered", "unique_names"]

_COUNTER = re.compile(r"_\d+$")


def unique_names(variables: Sequence[Any]) -> list[str]:
    """The variables' paths; one that comes again has ``#`` behind it."""
    names: list[str] = []
    taken: set[str] = set()
    for variable in variables:
        name = variable.path
        while name in taken:
            name += "#"
        taken.add(name)
        names.append(name)
    return names


def renumbered(paths: Mapping[str, Any] | Sequence[str]) -> list[str]:
    """``paths`` with the counters of Keras beginning anew: ``dense_7``, ``dense_9`` become ``dense``, ``dense_1``."""
    known: dict[tuple[str, ...], dict[str, int]] = {}
    result = []
    for path in paths:
        plain: list[str] = []
        for part in path.split("/"):
            stem = _COUNTER.sub("", part)
            numbers = known.setdefault((*plain, stem), {})
            number = numbers.setdefault(part, len(numbers))
            plain.append(f"{stem}_{number}" if number else stem)
        result.append("/".join(plain))
    return result
