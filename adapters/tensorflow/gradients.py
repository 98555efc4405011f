"""The gradients of a list of variables, reduced: agreed upon once, the local ones left with their rank."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf
from horovod.tensorflow.mpi_ops import ProcessSet, global_process_set

from hvdscale.errors import PlanError
from hvdscale.runtime.session import World
from hvdscale.sync import Reduction
from hvdscale.tensorflow.messages import exchanges
from hvdscale.tensorflow.registry import agree_on, describe
from hvdscale.tensorflow.runtime import world
from hvdscale.tensorflow.sync import Gradient, op_name, reduce_gradients
from hvdscale.tensorflow.wire import Compression, as_variable

__all__ = ["GradientSync"]

Groups = int | Sequence[Sequence[Any]] | None


@dataclass(frozen=True)
class _Agreed:
    """A list of variables all ranks have compared, and the reduction with groups as positions in it."""

    world: World
    variables: tuple[Any, ...]  # weak references; () for a source that is no variable
    reduction: Reduction


# A tape is made anew at every step, so what was agreed is kept here. Old entries are dropped, oldest first.
_agreed: OrderedDict[tuple[Any, ...], _Agreed] = OrderedDict()
_KEPT = 256


class GradientSync:
    """Reduce gradients as ``DistributedOptimizer`` and ``DistributedGradientTape`` are told to.

    Args are Horovod's; ``about`` names the user's call in errors.

    Raises:
        PlanError: arguments that cannot be.
    """

    def __init__(
        self,
        about: str,
        *,
        device_dense: str = "",
        device_sparse: str = "",
        compression: Any = Compression.none,
        sparse_as_dense: bool = False,
        op: int = 0,
        gradient_predivide_factor: float = 1.0,
        num_groups: int = 0,
        groups: Groups = None,
        process_set: ProcessSet = global_process_set,
        scale_local_gradients: bool = True,
    ) -> None:
        if groups is None and num_groups:
            groups = num_groups
        self._groups: tuple[tuple[Any, ...], ...] | None = None
        if groups is not None and not isinstance(groups, int):
            self._groups = tuple(tuple(as_variable(v) for v in group) for group in groups)
        self._reduction = Reduction(
            op=op_name(op),
            predivide=gradient_predivide_factor,
            groups=groups if isinstance(groups, int) else None,
            sparse_as_dense=sparse_as_dense,
        )
        self._about = about
        self._devices = {"device_dense": device_dense, "device_sparse": device_sparse}
        self._compression = compression
        self._local: dict[int, Any] = {}
        self.process_set = process_set
        self.scale_local_gradients = scale_local_gradients

    def register_local(self, variable: Any) -> None:
        """Leave the gradient of ``variable`` with its rank."""
        variable = as_variable(variable)
        self._local[id(variable)] = variable

    def is_local(self, variable: Any) -> bool:
        return id(as_variable(variable)) in self._local

    def __call__(
        self, gradients: Sequence[Gradient], variables: Sequence[Any], generic_names: bool = False
    ) -> list[Gradient]:
        """Gradients in the order of ``variables``: reduced over ranks; local ones divided by the number of ranks.

        Raises:
            DesyncError: the first time, when ranks differ in variables or settings.
        """
        results = list(gradients)
        local = [self.is_local(v) for v in variables] if self._local else [False] * len(results)
        shared = [i for i, is_local in enumerate(local) if not is_local]
        reduction = self._reduction
        if exchanges(self.process_set):
            reduction = self._agree([variables[i] for i in shared], [results[i] for i in shared])
        reduced = reduce_gradients(
            [results[i] for i in shared],
            reduction,
            compression=self._compression,
            process_set=self.process_set,
            name="grad" if generic_names else "gradient",
            ignore_name_scope=generic_names,
            **self._devices,
        )
        for i, gradient in zip(shared, reduced, strict=True):
            results[i] = gradient
        if self.scale_local_gradients and self.process_set.included():
            size = self.process_set.size()
            results = [_divided(g, size) if local[i] else g for i, g in enumerate(results)]
        return results

    def _agree(self, variables: list[Any], gradients: list[Gradient]) -> Reduction:
        inner = [as_variable(v) for v in variables]
        key = (
            tuple(id(v) if isinstance(v, tf.Variable) else v.dtype for v in inner),
            tuple(tuple(map(id, group)) for group in self._groups) if self._groups else None,
            self._about,
            self._reduction,
            self._compression,
            self.process_set.process_set_id,
        )
        known = _agreed.get(key)
        if known and known.world is world() and all(r() is v for r, v in zip(known.variables, inner, strict=True) if r):
            return known.reduction
        reduction = replace(self._reduction, groups=self._positions(inner)) if self._groups else self._reduction
        kinds = [
            " sparse" if isinstance(g, tf.IndexedSlices) else " unconnected" if g is None else "" for g in gradients
        ]
        agree_on(
            [describe(v, kind) for v, kind in zip(variables, kinds, strict=True)],
            {
                "plan": reduction,
                "compression": getattr(self._compression, "__name__", type(self._compression).__name__),
            },
            f"the gradients of {self._about}",
            self.process_set,
        )
        references = tuple(weakref.ref(v) if isinstance(v, tf.Variable) else () for v in inner)
        _agreed[key] = _Agreed(world(), references, reduction)
        _agreed.move_to_end(key)
        while len(_agreed) > _KEPT:
            _agreed.popitem(last=False)
        return reduction

    def _positions(self, variables: list[Any]) -> tuple[tuple[int, ...], ...]:
        at = {id(v): i for i, v in enumerate(variables)}
        for group in self._groups or ():
            for variable in group:
                if not hasattr(variable, "shape"):
                    raise PlanError(
                        "groups must be a number of groups > 0 or a list of lists of variables, "
                        f"got a {type(variable).__name__} in a list."
                    )
        return tuple(tuple(at[id(v)] for v in group if id(v) in at) for group in self._groups or ())


def _divided(gradient: Gradient, size: int) -> Gradient:
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values / size, gradient.indices, gradient.dense_shape)
    return gradient / size
