"""``DistributedGradientTape``: a gradient tape whose gradients are those of all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf
from horovod.tensorflow.mpi_ops import Average, ProcessSet, global_process_set

from hvdscale.errors import PlanError
from hvdscale.sync import EveryStep
from hvdscale.tensorflow.gradients import GradientSync, Groups
from hvdscale.tensorflow.wire import Compression

__all__ = ["DistributedGradientTape", "PartialDistributedGradientTape"]


class DistributedGradientTape(tf.GradientTape):
    """A ``tf.GradientTape`` whose ``gradient`` is reduced over ranks; everything else is the given tape's.

    ``tape = hvd.DistributedGradientTape(tape)`` after recording, or
    ``with hvd.DistributedGradientTape(tf.GradientTape()) as tape:`` around it. Works eagerly and inside
    ``tf.function``, with Keras variables, ``tf.Variable`` and watched tensors as sources.

    A source that is unconnected on some ranks counts as zeros there: all get the same result. One that has been
    unconnected on every rank so far stays ``None``. Eagerly it may become connected on any rank at any step: where
    there is such a source, ranks ask each other at every step. In a ``tf.function`` they must trace the call in which
    it does together. Where one rank's gradient is sparse and another's dense, all send dense ones.

    Args:
        gradtape: the tape that records.
        device_dense, device_sparse: where the reductions are placed.
        compression: ``Compression.none`` or ``Compression.fp16``.
        sparse_as_dense: turn ``tf.IndexedSlices`` into dense gradients first.
        op: ``Average``, ``Sum`` or ``Adasum``.
        gradient_predivide_factor: divide by it before the sum and multiply after (``Average`` only).
        num_groups: the older name of a number of groups.
        groups: number of messages, or lists of variables that travel together. Default: one message per dtype.
        process_set: ranks to reduce over.
        sync: when ranks agree; ``EveryStep()`` is what a tape can do, and the default.
        scale_local_gradients: divide gradients of local sources by the number of ranks, so that they weigh
            as much against the shared ones as in training on one rank with the whole batch.

    Raises:
        PlanError: arguments that cannot be, or a tape that is distributed already.
    """

    def __init__(
        self,
        gradtape: tf.GradientTape,
        device_dense: str = "",
        device_sparse: str = "",
        compression: Any = Compression.none,
        sparse_as_dense: bool = False,
        op: int = Average,
        gradient_predivide_factor: float = 1.0,
        num_groups: int = 0,
        groups: Groups = None,
        process_set: ProcessSet = global_process_set,
        scale_local_gradients: bool = True,
        *,
        sync: EveryStep | None = None,
    ) -> None:
        if sync not in (None, EveryStep()):
            raise PlanError(
                "sync takes EveryStep() on a tape, which averages each gradient that it is asked for, as it is; "
                f"{sync!r} is for optimizers. Give it to hvd.DistributedOptimizer(optimizer, sync=...), and the "
                "gradients of a plain tape to that."
            )
        if isinstance(gradtape, DistributedGradientTape):
            raise PlanError("This tape is distributed already: its gradients would be reduced twice. Wrap it once.")
        self._given = gradtape
        self._local_layers: list[Any] = []
        self._sync = GradientSync(
            "DistributedGradientTape",
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

    def register_local_source(self, source: Any) -> None:
        """Leave the gradient of ``source`` with its rank; see ``scale_local_gradients``."""
        self._sync.register_local(source)

    @tf.autograph.experimental.do_not_convert
    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        use_generic_names: bool = False,
        *,
        unconnected_gradients: tf.UnconnectedGradients = tf.UnconnectedGradients.NONE,
    ) -> Any:
        """Gradients in the structure of ``sources``, reduced over ranks. Every rank must call it.

        Args:
            use_generic_names: name messages by position instead of by place in the graph.

        Raises:
            DesyncError: at the first call for these sources, when ranks differ in them or in settings.
        """
        if not isinstance(use_generic_names, bool):
            raise PlanError(
                "The fourth argument of a distributed tape's gradient() is use_generic_names (True or False), "
                f"got {use_generic_names!r}. Pass unconnected_gradients by its name."
            )
        for layer in self._local_layers:  # asked now: a layer may get its weights in the forward pass
            for variable in layer.trainable_weights:
                self.register_local_source(variable)
        gradients = self._given.gradient(target, sources, output_gradients, unconnected_gradients)
        flat_sources = tf.nest.flatten(sources)
        flat_gradients = list(gradients) if _is_flat(sources) else tf.nest.flatten(gradients)
        reduced = self._sync(flat_gradients, flat_sources, use_generic_names)
        return reduced if _is_flat(sources) else tf.nest.pack_sequence_as(sources, reduced)

    def get_local_and_global_gradients(
        self, target: Any, sources: Sequence[Any], output_gradients: Any = None, use_generic_names: bool = False
    ) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
        """``(source, gradient)`` pairs: those of local sources, and those reduced over ranks."""
        gradients = self.gradient(target, list(sources), output_gradients, use_generic_names)
        pairs = list(zip(sources, gradients, strict=True))
        return [p for p in pairs if self._sync.is_local(p[0])], [p for p in pairs if not self._sync.is_local(p[0])]

    def __enter__(self) -> DistributedGradientTape:
        self._given.__enter__()
        return self

    def __exit__(self, *exception: Any) -> Any:
        return self._given.__exit__(*exception)

    def watch(self, tensor: Any) -> None:
        self._given.watch(tensor)

    def stop_recording(self) -> Any:
        return self._given.stop_recording()

    def reset(self) -> None:
        self._given.reset()

    def watched_variables(self) -> Any:
        return self._given.watched_variables()

    def jacobian(self, *args: Any, **kwargs: Any) -> Any:
        """This rank's own Jacobian, not reduced."""
        return self._given.jacobian(*args, **kwargs)

    def batch_jacobian(self, *args: Any, **kwargs: Any) -> Any:
        """This rank's own Jacobian, not reduced."""
        return self._given.batch_jacobian(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "_given":  # not set yet: copying and unpickling ask before __init__
            raise AttributeError(name)
        return getattr(self._given, name)


def PartialDistributedGradientTape(
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    op: int = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Groups = None,
    process_set: ProcessSet = global_process_set,
    local_layers: Any = None,
    scale_local_gradients: bool = True,
) -> DistributedGradientTape:
    """A ``DistributedGradientTape`` that leaves the gradients of ``local_layers`` with their rank.

    Args:
        local_layers: a Keras layer or several. A layer without weights yet is looked at again later.

    Raises:
        PlanError: ``local_layers`` holds something that is no layer.
    """
    layers = list(local_layers) if isinstance(local_layers, Iterable) else [local_layers] if local_layers else []
    for layer in layers:
        if not isinstance(layer, tf.keras.layers.Layer):
            raise PlanError(f"local_layers takes Keras layers, got a {type(layer).__name__}: {layer!r}.")
    tape = DistributedGradientTape(
        gradtape,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        op,
        gradient_predivide_factor,
        num_groups,
        groups,
        process_set,
        scale_local_gradients,
    )
    tape._local_layers = layers
    return tape


def _is_flat(sources: Any) -> bool:
    return isinstance(sources, list) and not any(isinstance(s, list | tuple | dict) for s in sources)
