"""How many steps lie between two rounds: plain callables ``step -> int``, and one that listens to the drift."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from hvdscale.errors import PlanError
from hvdscale.update.outer import check_number

__all__ = ["Adaptive", "Schedule", "constant", "drift_target", "period", "post_local", "qsr"]

Schedule = Callable[[int], int]
"""The length of the period that begins after ``step`` steps: at least 1, and the same on every rank."""

_LONGEST = 1 << 31


@runtime_checkable
class Adaptive(Protocol):
    """A schedule that also hears how far ranks had drifted apart at the end of the period."""

    def __call__(self, step: int) -> int: ...

    def following(self, length: int, drift: float) -> int:
        """The period after one of ``length`` steps that ended with this relative drift."""
        ...


@dataclass(frozen=True)
class constant:
    """Every ``h`` steps."""

    h: int

    def __post_init__(self) -> None:
        _whole("h", self.h)

    def __call__(self, step: int) -> int:
        return self.h


@dataclass(frozen=True)
class post_local:
    """Every step for the first ``start`` steps, every ``h`` after.

    Lin, Stich, Patel and Jaggi, "Don't use large mini-batches, use local SGD", arXiv 1808.07217.
    """

    start: int
    h: int

    def __post_init__(self) -> None:
        _whole("start", self.start, 0)
        _whole("h", self.h)

    def __call__(self, step: int) -> int:
        return 1 if step < self.start else self.h


@dataclass(frozen=True)
class qsr:
    """The quadratic synchronisation rule: ``max(base, floor((alpha / lr)**2))``, longer as the learning rate falls.

    Gu et al., "A quadratic synchronization rule for distributed deep learning", arXiv 2310.14423. It helped image
    models and hurt a language model in one study: measure before you keep it.

    Args:
        lr_schedule: ``step -> learning rate``, the same on every rank.
        base: the shortest period.
        alpha: the growth coefficient, in the unit of the learning rate.
    """

    lr_schedule: Callable[[int], float]
    base: int
    alpha: float

    def __post_init__(self) -> None:
        _whole("base", self.base)
        check_number("alpha", self.alpha, 0.0)

    def __call__(self, step: int) -> int:
        lr = float(self.lr_schedule(step))
        grown = (self.alpha / lr) ** 2 if lr > 0 else math.inf
        return max(self.base, int(min(grown, _LONGEST)))


@dataclass(frozen=True)
class drift_target:
    """Periods that end with ranks about ``target`` apart.

    Drift is the root of the consensus distance (the mean squared distance of the ranks' weights from their mean)
    over the norm of the shared weights. The squared distance grows about linearly with the period, so the next
    period is ``length * (target / drift)**2``, at most halved or doubled at once.

    Kamp et al., "Efficient decentralized deep learning by dynamic model averaging", arXiv 1807.03210, for
    averaging by divergence instead of by the clock.
    """

    target: float
    first: int = 8
    longest: int = 1024

    def __post_init__(self) -> None:
        check_number("target", self.target, 0.0)
        _whole("first", self.first)
        _whole("longest", self.longest)
        if not self.target > 0 or self.first > self.longest:
            raise PlanError(
                f"drift_target needs target > 0 and first <= longest; it has target={self.target}, "
                f"first={self.first}, longest={self.longest}."
            )

    def __call__(self, step: int) -> int:
        return self.first

    def following(self, length: int, drift: float) -> int:
        wanted = length * (self.target / drift) ** 2 if drift > 0 else math.inf
        return int(min(max(wanted, length / 2, 1), 2 * length, self.longest))


def period(every: int | Schedule, step: int) -> int:
    """The checked length of the period that begins after ``step`` steps.

    Raises:
        PlanError: the schedule returned anything but a whole number from 1.
    """
    length = every(step) if callable(every) else every
    return _whole(f"every({step})" if callable(every) else "every", length)


def _whole(name: str, value: object, low: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise PlanError(f"{name} must be a whole number of steps from {low}; it is {value!r}.")
    return value
