"""The gradients of a list of variables, reduced: agreed upon once, the local ones left with their rank."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf
from horovod.tensorflow.mpi_ops import ProcessSet, global_process_set

from hvdscale.runtime.session import World
from hvdscale.sync import Kind, Reduction, common_kinds, read_groups
from hvdscale.tensorflow.kinds import Gradient, in_kind, kind_of
from hvdscale.tensorflow.messages import exchanges
from hvdscale.tensorflow.registry import agree_on, can_compare, describe
from hvdscale.tensorflow.runtime import control, world
from hvdscale.tensorflow.sync import op_name, reduce_gradients
from hvdscale.tensorflow.wire import Compression, as_variable

__all__ = ["GradientSync"]

Groups = int | Sequence[Sequence[Any]] | None


@dataclass(frozen=True)
class _Agreed:
    """A list of variables all ranks have compared: what each sends for them, and groups as positions in the list."""

    world: World
    variables: tuple[Any, ...]  # weak references; () for a source that is no variable
    reduction: Reduction
    kinds: tuple[Kind, ...]


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
        number, lists = read_groups(groups)
        self._groups = tuple(tuple(as_variable(v) for v in group) for group in lists)
        self._reduction = Reduction(
            op=op_name(op),
            predivide=gradient_predivide_factor,
            groups=number,
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

        Where only some ranks have a gradient, the others send zeros, or no rows where it is sparse. ``None``
        comes back for a variable that has none on any rank.

        Raises:
            DesyncError: the first time, when ranks differ in variables or settings.
        """
        results = list(gradients)
        local = [self.is_local(v) for v in variables] if self._local else [False] * len(results)
        shared = [i for i, is_local in enumerate(local) if not is_local]
        sent = [results[i] for i in shared]
        reduction = self._reduction
        if exchanges(self.process_set):
            sources = [variables[i] for i in shared]
            reduction, kinds = self._agree(sources, [self._kind(g) for g in sent])
            sent = [in_kind(g, v, kind) for g, v, kind in zip(sent, sources, kinds, strict=True)]
        reduced = reduce_gradients(
            sent,
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

    def _kind(self, gradient: Gradient) -> Kind:
        kind = kind_of(gradient)
        return Kind.DENSE if kind is Kind.SPARSE and self._reduction.sparse_as_dense else kind

    def _agree(self, variables: list[Any], own: list[Kind]) -> tuple[Reduction, tuple[Kind, ...]]:
        """The reduction, and the kind of gradient every rank sends for each variable."""
        inner = [as_variable(v) for v in variables]
        if not can_compare(self.process_set):
            return self._placed(inner), tuple(own)
        key = (
            tuple(id(v) if isinstance(v, tf.Variable) else v.dtype for v in inner),
            tuple(tuple(map(id, group)) for group in self._groups),
            self._about,
            self._reduction,
            self._compression,
            self.process_set.process_set_id,
        )
        known = _agreed.get(key)
        if not inner and tf.executing_eagerly():
            known = None  # nothing tells this list from another empty one: ask each time
        if known and known.world is world() and all(r() is v for r, v in zip(known.variables, inner, strict=True) if r):
            kinds = self._with_latecomers(known.kinds, own)
            if kinds != known.kinds:
                _agreed[key] = replace(known, kinds=kinds)
            return known.reduction, kinds
        reduction = self._placed(inner)
        agree_on(
            [describe(v) for v in variables],
            {
                "plan": reduction,
                "compression": getattr(self._compression, "__name__", type(self._compression).__name__),
            },
            f"the gradients of {self._about}",
            self.process_set,
        )
        kinds = common_kinds(own, control(self.process_set))
        references = tuple(weakref.ref(v) if isinstance(v, tf.Variable) else () for v in inner)
        _agreed[key] = _Agreed(world(), references, reduction, kinds)
        _agreed.move_to_end(key)
        while len(_agreed) > _KEPT:
            _agreed.popitem(last=False)
        return reduction, kinds

    def _with_latecomers(self, agreed: tuple[Kind, ...], own: list[Kind]) -> tuple[Kind, ...]:
        """``agreed``, with what has a gradient on some rank now and had one on none before.

        No rank can know of another's, so ranks ask at every eager step, if there is such a variable at all. A graph
        asks while it is traced, and only where it has such a gradient.
        """
        late = [mine if before is Kind.NONE else before for before, mine in zip(agreed, own, strict=True)]
        if Kind.NONE in agreed and (tf.executing_eagerly() or tuple(late) != agreed):
            return common_kinds(late, control(self.process_set))
        return agreed

    def _placed(self, variables: list[Any]) -> Reduction:
        """The reduction with the user's groups as positions in ``variables``."""
        if not self._groups:
            return self._reduction
        at = {id(v): i for i, v in enumerate(variables)}
        groups = tuple(tuple(at[id(v)] for v in group if id(v) in at) for group in self._groups)
        return replace(self._reduction, groups=groups)


def _divided(gradient: Gradient, size: int) -> Gradient:
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        return tf.IndexedSlices(gradient.values / size, gradient.indices, gradient.dense_shape)
    return gradient / size
