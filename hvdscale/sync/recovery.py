"""A rank whose weights stopped being finite, and came back from the others: its inner optimizer must not stay behind.

Moments that a NaN has reached never leave it again, and would spoil the weights at the very next step.
"""

from __future__ import annotations

import warnings

from hvdscale.sync.tensors import Store

__all__ = ["Recovery"]


class Recovery:
    """Of one rank. ``at``: the step after which its inner optimizer last began anew; 0 if it never did."""

    def __init__(self, store: Store, rank: int, at: int = 0) -> None:
        self.at = at
        self._store, self._rank = store, rank
        self._warned: set[str] = set()  # of what

    def over(self, store: Store) -> Recovery:
        """The same for another store."""
        twin = Recovery(store, self._rank, self.at)
        twin._warned = self._warned
        return twin

    def come_back(self, step: int, voted: bool, moments: bool = True) -> None:
        """This rank holds finite weights again. ``moments``: its optimizer's must be forgotten.

        Args:
            voted: they are those of other ranks; otherwise of the last round, because no rank had any.
        """
        if moments:
            self._store.begin_anew()
            self.at = step
        whose = "those of the other ranks" if voted else "the weights of the last round, because no rank had others"
        self._warn(
            "lost steps",
            step,
            f"It goes on with {whose}, and its optimizer's moments begin anew; the steps it made since it was last "
            "finite are lost.",
        )

    def give_up(self, step: int) -> None:
        """No rank has finite weights, and none are kept."""
        outcome = "So did all ranks, and none keeps others: end the job, and go on from its last checkpoint."
        self._warn("lost weights", step, outcome)

    def _warn(self, what: str, step: int, outcome: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(
                f"Rank {self._rank} brought weights that are not finite to the round after step {step}. {outcome} Look "
                "for what made its loss NaN or infinite: a batch, or too high a learning rate. Later cases are only "
                "counted, in optimizer.sync.metrics()['not_finite'].",
                RuntimeWarning,
                stacklevel=3,
            )
