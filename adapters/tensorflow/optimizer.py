"""``DistributedOptimizer`` for ``tf.compat.v1.train.Optimizer``; a Keras optimizer goes to the Keras adapter."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf
from horovod.tensorflow.gradient_aggregation import LocalGradientAggregationHelper
from horovod.tensorflow.mpi_ops import Adasum, Average, ProcessSet, global_process_set, rank

from hvdscale.errors import PlanError
from hvdscale.sync import EveryStep, LocalPlan
from hvdscale.tensorflow.gradients import GradientSync, Groups
from hvdscale.tensorflow.wire import Compression

__all__ = ["DistributedOptimizer", "LocalGradientAggregationHelper"]


def DistributedOptimizer(
    optimizer: Any,
    name: str | None = None,
    use_locking: bool = False,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    backward_passes_per_step: int = 1,
    op: int = Average,
    gradient_predivide_factor: float = 1.0,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: Groups = None,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
    *,
    sync: EveryStep | LocalPlan | None = None,
    model: Any = None,
) -> Any:
    """An optimizer that reduces gradients over ranks before it applies them.

    A Keras optimizer becomes what ``hvdscale.keras.DistributedOptimizer`` makes of it. A TensorFlow 1 optimizer is
    wrapped in one that reduces in ``compute_gradients``.

    Args:
        optimizer: a Keras optimizer or a ``tf.compat.v1.train.Optimizer``.
        name: head of the names of its operations.
        backward_passes_per_step: gradients are added up over so many passes before they are reduced (graph mode).
        average_aggregated_gradients: divide that sum by their number.
        sync, model: for Keras optimizers, as in ``hvdscale.keras.DistributedOptimizer``.
        The others: see ``DistributedGradientTape``.

    Raises:
        PlanError: arguments that cannot be, an optimizer wrapped twice, or something that is no optimizer.
    """
    if isinstance(optimizer, keras.optimizers.Optimizer):
        from hvdscale.tensorflow.keras import DistributedOptimizer as distribute_keras

        return distribute_keras(
            optimizer,
            name,
            device_dense=device_dense,
            device_sparse=device_sparse,
            compression=compression,
            sparse_as_dense=sparse_as_dense,
            gradient_predivide_factor=gradient_predivide_factor,
            op=op,
            backward_passes_per_step=backward_passes_per_step,
            average_aggregated_gradients=average_aggregated_gradients,
            num_groups=num_groups,
            groups=groups,
            process_set=process_set,
            scale_local_gradients=scale_local_gradients,
            sync=sync,
            model=model,
        )
    if isinstance(optimizer, _DistributedOptimizer):
        raise PlanError("This optimizer is distributed already: gradients would be reduced twice. Wrap it once.")
    if not isinstance(optimizer, tf.compat.v1.train.Optimizer):
        raise PlanError(
            "DistributedOptimizer takes a Keras optimizer or a tf.compat.v1.train.Optimizer, got "
            f"{type(optimizer).__module__}.{type(optimizer).__qualname__}. To reduce gradients yourself use "
            "DistributedGradientTape."
        )
    if sync is not None or model is not None:
        raise PlanError("sync= and model= are for Keras optimizers. Leave them out with a TensorFlow 1 optimizer.")
    if op == Adasum:
        raise PlanError(
            "op=Adasum combines the weight changes of a TensorFlow 1 optimizer in Horovod, which does not run on "
            "TensorFlow 2.16 and later. Use op=Average, or DistributedGradientTape(tape, op=hvd.Adasum)."
        )
    if backward_passes_per_step > 1 and tf.executing_eagerly():
        raise PlanError(
            f"backward_passes_per_step={backward_passes_per_step} needs a graph with a TensorFlow 1 optimizer. "
            "Add gradients up yourself, or use hvdscale.keras.DistributedOptimizer."
        )
    reduce = GradientSync(
        "DistributedOptimizer",
        device_dense=device_dense,
        device_sparse=device_sparse,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        op=op,
        gradient_predivide_factor=gradient_predivide_factor,
        num_groups=num_groups,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
    )
    name = name or f"Distributed{type(optimizer).__name__}"
    aggregation = None
    if backward_passes_per_step != 1:
        aggregation = LocalGradientAggregationHelper(
            backward_passes_per_step,
            lambda gradients, variables: reduce(gradients, variables),
            sparse_as_dense,
            average_aggregated_gradients,
            rank(),
            LocalGradientAggregationHelper._OPTIMIZER_TYPE_LEGACY,
            process_set,
            scale_local_gradients,
            name,
        )
    return _DistributedOptimizer(optimizer, name, use_locking, reduce, aggregation)


class _DistributedOptimizer(tf.compat.v1.train.Optimizer):
    def __init__(
        self,
        optimizer: tf.compat.v1.train.Optimizer,
        name: str,
        use_locking: bool,
        sync: GradientSync,
        aggregation: LocalGradientAggregationHelper | None,
    ) -> None:
        super().__init__(use_locking, name)
        self._optimizer = optimizer
        self._sync = sync
        self._aggregation = aggregation

    def register_local_var(self, var: tf.Variable) -> None:
        """Leave the gradient of ``var`` with its rank."""
        (self._aggregation.register_local_var if self._aggregation else self._sync.register_local)(var)

    def compute_gradients(self, *args: Any, **kwargs: Any) -> list[tuple[Any, Any]]:
        """The optimizer's ``compute_gradients``, reduced over ranks."""
        gradients, variables = zip(*self._optimizer.compute_gradients(*args, **kwargs), strict=True)
        if self._aggregation:
            return list(zip(self._aggregation.compute_gradients(gradients, variables), variables, strict=True))
        return list(zip(self._sync(gradients, variables), variables, strict=True))

    def apply_gradients(self, grads_and_vars: Any, global_step: Any = None, name: str | None = None) -> Any:
        def apply() -> Any:
            return self._optimizer.apply_gradients(grads_and_vars, global_step=global_step, name=name)

        if self._aggregation is None:
            return apply()
        return self._aggregation.apply_gradients(
            apply, self._optimizer, grads_and_vars, global_step=global_step, name=name
        )

    def get_slot(self, *args: Any, **kwargs: Any) -> Any:
        return self._optimizer.get_slot(*args, **kwargs)

    def get_slot_names(self, *args: Any, **kwargs: Any) -> Any:
        return self._optimizer.get_slot_names(*args, **kwargs)

    def variables(self, *args: Any, **kwargs: Any) -> Any:
        return self._optimizer.variables(*args, **kwargs)
