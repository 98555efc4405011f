"""Cutting a model into fragments that take turns: whole tensors, in the order of the registry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from hvdscale.errors import PlanError
from hvdscale.sync.tensors import TensorSpec
from hvdscale.sync.wire import Codec

__all__ = ["Fragment", "cut"]

_MANY = 1 << 20  # values, of which the last block of a code is a small part


@dataclass(frozen=True)
class Fragment:
    """``positions`` in the registry, those that go coded first: the first ``coded`` of ``size`` values.

    ``tables``: where among the values each embedding lies, and its number of rows.
    """

    positions: tuple[int, ...]
    coded: int
    size: int
    tables: tuple[tuple[slice, int], ...] = ()


def cut(specs: Sequence[TensorSpec], parts: int, codec: Codec) -> tuple[Fragment, ...]:
    """``parts`` runs of tensors with nearly equal numbers of bytes on the wire.

    Raises:
        PlanError: fewer tensors than parts.
    """
    if not 1 <= parts <= len(specs):
        raise PlanError(
            f"A fragment holds at least one tensor: there are {len(specs)} trainable tensors and fragments={parts}. "
            f"Use at most {len(specs)} fragments."
        )
    return tuple(_fragment(specs, range(a, b), codec) for a, b in pairwise(_borders(specs, parts, codec)))


def _borders(specs: Sequence[TensorSpec], parts: int, codec: Codec) -> list[int]:
    coded = codec.size(_MANY) / _MANY  # bytes of a value
    sent_bytes = (spec.size * (coded if _travels_coded(spec) else 4) for spec in specs)
    ends = list(accumulate(sent_bytes, initial=0.0))  # [tensors + 1]
    borders = [0]
    for part in range(1, parts):
        ideal = ends[-1] * part / parts
        room = range(borders[-1] + 1, len(specs) - (parts - part) + 1)  # each part keeps a tensor
        borders.append(min(room, key=lambda end: abs(ends[end] - ideal)))
    return [*borders, len(specs)]


def _fragment(specs: Sequence[TensorSpec], positions: range, codec: Codec) -> Fragment:
    coded = [p for p in positions if codec.way != "allreduce" and _travels_coded(specs[p])]
    exact = [p for p in positions if p not in coded]
    order = (*coded, *exact)
    ends = list(accumulate((specs[p].size for p in order), initial=0))
    tables = tuple(
        (slice(start, stop), specs[p].shape[0])
        for p, (start, stop) in zip(order, pairwise(ends), strict=True)
        if specs[p].role == "embedding" and specs[p].size
    )
    return Fragment(order, sum(specs[p].size for p in coded), ends[-1], tables)


def _travels_coded(spec: TensorSpec) -> bool:
    """Matrices do. Biases and norms are too few to matter, and embedding rows too unequal to share a scale."""
    return len(spec.shape) > 1 and spec.role != "embedding"
