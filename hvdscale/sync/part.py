"""What a rank keeps of one fragment between rounds, and the arithmetic before and after an exchange.

A round goes over the fragment block by block, so that a value is loaded once on its way out and once on its way back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdscale.sync.exchange import Exchange
from hvdscale.sync.fragments import Fragment
from hvdscale.sync.header import Meeting, Phase
from hvdscale.sync.tensors import Tensors
from hvdscale.update.outer import Float32s, blocks

__all__ = ["Departure", "Found", "Part", "probe", "square_in_float64"]


_RUN = 1 << 16  # values copied at once, at least: calls of a framework cost, too


@dataclass(frozen=True)
class Run:
    """What is read and written at once: the tensors at ``positions`` in the registry, at ``place`` in the fragment.

    ``pieces`` stay in the cache: where each lies in the fragment, and where in the run.
    """

    positions: tuple[int, ...]
    place: slice
    pieces: tuple[tuple[slice, slice], ...]

    @classmethod
    def of(cls, positions: Sequence[int], place: slice) -> Run:
        start = place.start
        cut = ((slice(start + b.start, start + b.stop), b) for b in blocks(place.stop - start))
        return cls(tuple(positions), place, tuple(cut))


@dataclass(frozen=True, eq=False)
class Departure:
    """What a rank brings to a round: ``values``, float32[n], zero where they are not ``finite``; ``weights``, those it
    leaves with, where it must tell later what it has learnt since; and a figure for the header."""

    values: Float32s
    weights: Float32s | None
    finite: bool
    square: float


@dataclass(frozen=True)
class Found:
    """How far ranks were apart: the mean squared distance of their weights from what they agreed on, and its root over
    the norm of that."""

    distance: float
    drift: float


class Part(ABC):
    """One fragment on this rank. All arithmetic is in float32.

    Tensors that lie in the host's memory as float32 are worked on where they are, each a run. The others are copied:
    small ones together, large ones alone.
    Where parameters are kept in fewer bits, ``rounding`` is what writing them lost, so that a rank that learnt
    nothing says so.
    """

    slots: Mapping[str, Float32s] = {}  # the outer optimizer's arrays

    def __init__(self, fragment: Fragment, weights: Tensors, exchange: Exchange) -> None:
        self.fragment = fragment
        self.exchange = exchange
        self._weights = weights
        narrow = any(weights.specs[p].dtype != "float32" for p in fragment.positions)
        self.rounding = np.zeros(fragment.size, np.float32) if narrow else None
        self.runs = tuple(self._runs())
        self.samples = 0.0  # since the last round, of whichever ranks
        self.since = 0.0  # samples since the last round of all ranks

    def arrays(self) -> dict[str, Float32s]:
        """What belongs into a checkpoint of this rank, by name."""
        return {} if self.rounding is None else {"rounding": self.rounding}

    def numbers(self) -> dict[str, Any]:
        """And the numbers that do, which JSON holds."""
        return {"samples": self.samples, "since": self.since}

    def load_numbers(self, saved: Mapping[str, Any]) -> None:
        for name in self.numbers():
            setattr(self, name, saved[name])

    @abstractmethod
    def begin(self) -> None:
        """This rank's weights are, from now on, the same on every rank."""

    @abstractmethod
    def weight(self, phase: Phase) -> float:
        """How much what this rank has to say counts."""

    def probe(self, resumed: bool) -> tuple[float, float]:
        """A number that other shared weights do not have, and their square; ``resumed``: ranks have trained since."""
        values = np.empty(self.fragment.size, np.float32)
        self.read(values)
        return probe(values)

    @abstractmethod
    def depart(self, out: Float32s, travels: bool) -> Departure:
        """What this rank has to say, written to ``out``. ``travels``: it will train on before the answer comes."""

    @abstractmethod
    def arrive(self, departure: Departure, meeting: Meeting, lr: float) -> Found:
        """Take ``departure.values``, now what became of them over ranks; overwrites them. ``lr`` is the inner rate."""

    def restore(self) -> bool:
        """Where this rank's weights are not finite, hold those that were last agreed on; returns whether it had to.

        Without an anchor there are none.
        """
        return False

    @abstractmethod
    def finish(self) -> None:
        """After a last round of everyone: hold the shared weights, to the last bit."""

    @abstractmethod
    def shared(self) -> Float32s:
        """float32[n], the weights all ranks share."""

    def tensors(self) -> Iterator[tuple[int, slice]]:
        """``(position in the registry, place in the fragment)`` of each tensor."""
        start = 0
        for position in self.fragment.positions:
            stop = start + self._weights.specs[position].size
            yield position, slice(start, stop)
            start = stop

    def read(self, out: Float32s) -> None:
        """This rank's weights, with what rounding lost."""
        for run in self.runs:
            self._read(run, out)

    def own(self, out: Float32s) -> Iterator[tuple[slice, Float32s]]:
        """This rank's weights, with what rounding lost: ``(place in the fragment, values)``, a piece at a time.

        Values may be the tensor itself, or lie at their place in ``out``, float32[n].
        """
        for run in self.runs:
            values = self._view(run)
            if values is None:
                self._read(run, out)
                values = out[run.place]
            for piece, inside in run.pieces:
                yield piece, values[inside]

    def _runs(self) -> Iterator[Run]:
        positions: list[int] = []
        start = 0
        for position, place in self.tensors():
            alone = place.stop - place.start >= _RUN or self._weights.view(position) is not None
            if positions and (alone or place.start - start >= _RUN):
                yield Run.of(positions, slice(start, place.start))
                positions, start = [], place.start
            if alone:
                yield Run.of([position], place)
                start = place.stop
            else:
                positions.append(position)
        if positions:
            yield Run.of(positions, slice(start, self.fragment.size))

    def _view(self, run: Run, writes: bool = False) -> Float32s | None:
        """The weights of ``run`` where they lie; ``None``: read and write them."""
        return (
            self._weights.view(run.positions[0], writes) if self.rounding is None and len(run.positions) == 1 else None
        )

    def _read(self, run: Run, out: Float32s) -> None:
        """Write the weights of ``run``, with what rounding lost, to their place in ``out``."""
        here = self._view(run)
        if here is not None:
            out[run.place] = here
            return
        self._weights.read(run.positions, out[run.place])
        if self.rounding is not None:
            out[run.place] -= self.rounding[run.place]

    def _write(self, run: Run, values: Float32s) -> None:
        """``run`` becomes what lies at its place in ``values``."""
        here = self._view(run, writes=True)
        if here is not None:
            here[:] = values[run.place]
            return
        self._weights.write(run.positions, values[run.place])
        if self.rounding is not None:
            self._weights.read(run.positions, self.rounding[run.place])
            self.rounding[run.place] -= values[run.place]


def square_in_float64(values: Float32s) -> float:
    """The sum of squares where float32 may have overflowed; NaN or infinite if a value is."""
    return sum(float(np.sum(np.square(values[block], dtype=np.float64))) for block in blocks(values.size))


def probe(values: Float32s) -> tuple[float, float]:
    """A sum over float32[n] in which each value has a weight of its own, of about 1, and the sum of squares."""
    weights = np.sin(np.arange(1, _RUN + 1, dtype=np.float64) ** 2).astype(np.float32)
    total = square = 0.0
    for number, start in enumerate(range(0, values.size, _RUN)):
        block = values[start : start + _RUN]
        total += float(np.dot(block, weights[: block.size])) * (1 + 1 / (1 + number))
        square += float(np.dot(block, block))
    return total, square if np.isfinite(square) else square_in_float64(values)
