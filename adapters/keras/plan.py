"""The arguments of ``DistributedOptimizer``, checked where they are given."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from hvdscale.errors import PlanError
from hvdscale.keras.backend import verbs
from hvdscale.keras.replicas import path_of
from hvdscale.sync import EveryStep, LocalPlan, Reduction, read_groups
from hvdscale.update import Update

__all__ = ["Distribution"]


@dataclass(frozen=True)
class Distribution:
    """How one optimizer's gradients are reduced.

    Args:
        reduction: op, predivision, passes, a number of groups, ``sparse_as_dense``.
        groups: lists of variables that travel together; empty without such lists.
        compression: a class with Horovod's ``compress`` and ``decompress``.
        process_set: the ranks that take part.
        average_passes: divide the gradients added up over ``reduction.passes`` by their number.
        scale_local: divide the gradients of local variables by the number of ranks.
        name: head of the messages' names.
        agreement: when ranks agree, and on what.
    """

    reduction: Reduction
    groups: tuple[tuple[Any, ...], ...]
    compression: Any
    process_set: Any
    average_passes: bool
    scale_local: bool
    name: str
    agreement: EveryStep | LocalPlan

    @classmethod
    def of(
        cls,
        *,
        op: Any,
        predivide: float,
        passes: int,
        average_passes: bool,
        groups: int | Collection[Collection[Any]] | None,
        sparse_as_dense: bool,
        compression: Any,
        process_set: Any,
        scale_local: bool,
        name: str,
        sync: Any,
    ) -> Distribution:
        """Horovod's arguments as a plan.

        Raises:
            PlanError: a value that cannot be.
        """
        agreement = EveryStep() if sync is None else sync
        if not isinstance(agreement, (EveryStep, LocalPlan)):
            raise PlanError(
                "sync takes EveryStep(), LocalSGD(...), DiLoCo(...), SlowMo(...), Gossip(...) or ParameterServer(...), "
                f"got {sync!r}. Leave it out for an all-reduce each step."
            )
        number, lists = read_groups(groups)
        reduction = Reduction(
            op=verbs.op_name(op),
            predivide=predivide,
            passes=passes,
            groups=number,
            sparse_as_dense=sparse_as_dense,
        )
        agreement.check(reduction if not lists else replace(reduction, groups=()))
        if compression is not verbs.hvd.Compression.none and (isinstance(agreement, LocalPlan) or agreement.coded):
            agreement.refuse_compression()
        if isinstance(agreement, EveryStep) and agreement.coded and verbs.world().launch.elastic:
            agreement.refuse_elastic()
        return cls(reduction, lists, compression, process_set, average_passes, scale_local, name, agreement)

    @property
    def update(self) -> Update | None:
        """Who updates what, where ranks update different elements; else ``None``."""
        return self.agreement.update if isinstance(self.agreement, EveryStep) and self.agreement.placed else None  # type: ignore[return-value]

    @property
    def coded(self) -> EveryStep | None:
        """The agreement, where gradients travel in a wire format of their own."""
        return self.agreement if isinstance(self.agreement, EveryStep) and self.agreement.coded else None

    def facts(self) -> dict[str, object]:
        """What must be the same on every rank."""
        compression = getattr(self.compression, "__name__", type(self.compression).__name__)
        return {
            "name": self.name,
            **self.agreement.facts(),
            "reduction": self.reduction,
            "groups": [[path_of(v) for v in group] for group in self.groups],
            "compression": compression,
            "ranks": self.process_set.ranks,
            "average_aggregated_gradients": self.average_passes,
            "scale_local_gradients": self.scale_local,
        }
