"""``DistributedOptimizer``: a Keras optimizer that reduces its gradients over ranks before it applies them."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from typing import Any

import keras
from keras.src.saving import object_registration

from hvdscale.errors import PlanError
from hvdscale.keras.backend import verbs
from hvdscale.keras.keras_hooks import distributed_in, install_hooks
from hvdscale.keras.placed_checks import check_placed
from hvdscale.keras.plan import Distribution
from hvdscale.keras.reducer import Reducer
from hvdscale.keras.sharded import ShardedModel, check_optimizer, clip_gradients
from hvdscale.sync.handle import Sync

__all__ = ["DistributedOptimizer", "PartialDistributedOptimizer"]

Compression = verbs.hvd.Compression
Average = verbs.hvd.Average
global_process_set = verbs.hvd.global_process_set

_made = 0  # optimizers wrapped so far: the same number on every rank, for messages' names


def DistributedOptimizer(
    optimizer: Any,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = Average,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: int | Collection[Collection[Any]] | None = None,
    process_set: Any = global_process_set,
    scale_local_gradients: bool = True,
    *,
    sync: Any = None,
    model: Any = None,
) -> Any:
    """Make ``optimizer`` reduce its gradients over ranks before it applies them; returns the same object.

    Its state, configuration, learning rate and everything that refers to it stay. It works under ``fit``,
    ``train_on_batch``, ``apply``, ``apply_gradients`` and inside ``tf.function``. Clipping, weight decay
    and moving averages see the reduced gradients. With ``gradient_accumulation_steps`` ranks exchange once per
    update. A saved model holds the plain optimizer: ``keras.models.load_model`` reads it, and
    ``hvdscale.keras.load_model`` distributes it again. A gradient that only some ranks compute counts as zeros on
    the others; which variables have gradients, and which of those are sparse, is agreed upon at the first step.
    A gradient that no rank had then is refused when it comes, by the ranks that have it, which ends the job: ranks
    do not ask each other at every step. Let every variable that is ever trained take part in the first step.

    Args:
        optimizer: any Keras 3 optimizer, also one that is built or compiled into a model already.
        name: head of the messages' names.
        device_dense, device_sparse: accepted as Horovod does; Keras places the operations.
        compression: ``Compression.none`` or ``Compression.fp16``.
        sparse_as_dense: reduce sparse gradients as dense ones.
        gradient_predivide_factor: with ``op=Average``, part of the division that is done before the sum.
        op: ``Average``, ``Sum`` or ``Adasum``.
        backward_passes_per_step: batches whose gradients are added up locally before they are reduced and
            applied. ``optimizer.iterations`` and learning-rate schedules count updates, not batches.
        average_aggregated_gradients: divide those sums by ``backward_passes_per_step``.
        num_groups: Horovod's older name of an integer ``groups``.
        groups: number of messages, or lists of variables that travel together.
        process_set: ranks that take part; others apply their own gradients.
        scale_local_gradients: divide gradients of local variables by the number of ranks.
        sync: when ranks agree, and on what: ``EveryStep()`` when left out, or ``LocalSGD(...)``, ``DiLoCo(...)``,
            ``SlowMo(...)``, ``Gossip(...)``, with which ranks train alone between rounds. ``optimizer.sync`` has
            ``flush()``, ``outer_weights()``, ``metrics()`` and the state to save. With ``EveryStep(update="central")``
            or ``"sharded"`` optimizer state is on one rank, or 1/N on each, and saving the model is collective; after
            ``optimizer.sync.flush()`` on every rank the first one saves alone.
        model: its weights, and the optimizer's state, are copied from the first rank before the first step: now,
            or, if the first batch builds the model, when that has built it and before it is computed.
            Seed generators are not: dropout differs from rank to rank. A model sharded by ``shard_model`` shares its
            gradients among the ranks that hold the same part of it; ``global_clipnorm`` is then the whole model's.

    Raises:
        PlanError: not a Keras optimizer, distributed already, or arguments that cannot be; in a later step, a gradient
            that no rank had at the first.
        DesyncError: at the first step, when ranks differ in variables, optimizer, plan or versions; at once,
            when only some have built ``model``.
    """
    global _made
    if num_groups:
        warnings.warn("num_groups is now called groups.", DeprecationWarning, stacklevel=2)
        groups = num_groups if groups is None else groups
    _check(optimizer)
    sharded = model if isinstance(model, ShardedModel) else None
    if sharded is not None:
        check_optimizer(optimizer)
        if process_set.process_set_id != global_process_set.process_set_id:
            raise PlanError(
                "A sharded model shares gradients among the ranks of its mesh's data axis. Leave process_set out."
            )
        process_set, model = sharded.data_ranks, sharded.model
    base: Any = type(optimizer)
    kind = base.__name__
    plan = Distribution.of(
        op=op,
        predivide=gradient_predivide_factor,
        passes=backward_passes_per_step,
        average_passes=average_aggregated_gradients,
        groups=groups,
        sparse_as_dense=sparse_as_dense,
        compression=compression,
        process_set=process_set,
        scale_local=scale_local_gradients,
        name=f"{name or 'Distributed' + kind}.{_made}".replace("/", "."),
        sync=sync,
    )
    if plan.update is not None:
        check_placed(plan.update, optimizer)
    if sharded is not None and getattr(plan.agreement, "placed", False):
        raise PlanError("EveryStep(update=...) and a sharded model do not go together yet. Leave update out.")
    _made += 1
    install_hooks()
    reducer = Reducer(plan, kind, model)
    reducer.sharded = sharded
    # Past the setattr of Keras and TensorFlow: this is no state to track or save.
    object.__setattr__(optimizer, "_hvdscale", reducer)
    object.__setattr__(optimizer, "__class__", _distributed(base))
    reducer.share_first()
    return optimizer


def PartialDistributedOptimizer(
    optimizer: Any,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Any = Average,
    groups: int | Collection[Collection[Any]] | None = None,
    process_set: Any = global_process_set,
    local_layers: Any = None,
    scale_local_gradients: bool = True,
    **ours: Any,
) -> Any:
    """``DistributedOptimizer`` in which the weights of ``local_layers`` keep each rank's own gradients.

    Args:
        local_layers: a built Keras layer or several.
        scale_local_gradients: divide their gradients by the number of ranks.
        ours: further keyword arguments of ``DistributedOptimizer``.

    Raises:
        PlanError: ``local_layers`` are not built Keras layers; and as ``DistributedOptimizer``.
    """
    layers = [] if local_layers is None else local_layers
    layers = [layers] if isinstance(layers, keras.layers.Layer) else list(layers)
    for layer in layers:
        if not isinstance(layer, keras.layers.Layer):
            raise PlanError(f"local_layers takes Keras layers, got {layer!r}.")
        if not layer.built:
            raise PlanError(f"Layer {layer.name!r} has no variables yet. Build the model before it is named local.")
    distributed = DistributedOptimizer(
        optimizer,
        name=name,
        device_dense=device_dense,
        device_sparse=device_sparse,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        gradient_predivide_factor=gradient_predivide_factor,
        op=op,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
        **ours,
    )
    for layer in layers:
        for variable in layer.trainable_weights:
            distributed.register_local_var(variable)
    return distributed


def _check(optimizer: Any) -> None:
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise PlanError(
            f"DistributedOptimizer takes a Keras 3 optimizer, got {type(optimizer).__module__}."
            f"{type(optimizer).__qualname__}. Pass an object such as keras.optimizers.Adam(1e-3)."
        )
    if distributed_in(optimizer) is not None:
        raise PlanError(f"This {optimizer.name} is distributed already. Wrap an optimizer once.")


class _Distributed:
    """Comes before the optimizer's own class in its method resolution order."""

    _hvdscale: Reducer

    @verbs.apart_from_compilers
    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> Any:
        reducer = self._hvdscale
        plain: Any = super()
        passes = reducer.accumulator.passes
        own = self._trainable_variables if reducer.placed is None else reducer.placed.variables  # type: ignore[attr-defined]
        variables = own if trainable_variables is None else list(trainable_variables)
        grads = list(grads)
        acts = reducer.exchanges or reducer.relaxed
        reducer.clipped = [v for g, v in zip(grads, variables, strict=False) if g is not None]
        if len(grads) != len(variables) or (passes == 1 and not acts):
            return plain.apply(grads, trainable_variables)
        if not reducer.suspended:
            reducer.prepare(self, grads, variables)
            grads = reducer.complete(grads, variables)
            reducer.clipped = [v for g, v in zip(grads, variables, strict=True) if g is not None]
        if not grads:
            return plain.apply(grads, trainable_variables)  # nothing to do, and all ranks know it
        if passes > 1:
            if not self.built:  # type: ignore[has-type]
                self.build(variables)  # no variable can be made inside the branch that follows
                self.built = True
            reducer.accumulator.add(grads, variables)
            if reducer.accumulator.counts:
                reducer.accumulator.count(
                    grads, variables, lambda sums, _: self._reduce_and_step(plain, sums, variables)
                )
            return None
        if self.defers and reducer.placed is None:
            reducer.deferred = [v for g, v in zip(grads, variables, strict=True) if g is not None]
            try:
                result = plain.apply(grads, variables)
            finally:
                reducer.deferred = None
            reducer.after_step()
            return result
        return self._reduce_and_step(plain, grads, variables)

    def _reduce_and_step(self, plain: Any, grads: Sequence[Any], variables: Sequence[Any]) -> Any:
        if self._hvdscale.placed is not None:
            return self._step_on_slices(plain, grads, variables)
        result = plain.apply(self._hvdscale.reduce(grads, variables), variables)
        self._hvdscale.after_step()
        return result

    def finish_pass(self, grads: Sequence[Any], variables: Sequence[Any]) -> None:
        """Count a backward pass that loss scaling may have left out here; where all of a step's were, it is, too."""
        reducer = self._hvdscale
        plain: Any = super()

        def go_on(sums: list[Any], kept: Any) -> None:
            reduced = reducer.reduce(sums, variables)
            keras.ops.cond(
                keras.ops.greater(reducer.heard(kept), 0), lambda: plain.apply(reduced, variables), lambda: None
            )
            reducer.after_step()

        reducer.accumulator.count(grads, variables, go_on)

    def _step_on_slices(self, plain: Any, grads: Sequence[Any], variables: Sequence[Any]) -> Any:
        placed = self._hvdscale.placed
        assert placed is not None
        by_variable = {id(v): g for v, g in zip(variables, grads, strict=True)}
        whole = [by_variable.get(id(v)) for v in placed.variables]
        if self._clips_by_norm and self.gradient_accumulation_steps and any(g is None for g in whole):  # type: ignore[attr-defined]
            raise PlanError(
                f'update="{placed.update}" with gradient_accumulation_steps clips by norm where every variable has a '
                "gradient. Freeze those without (trainable=False), or clip by value."
            )
        shares = placed.reduce(whole, self._hvdscale.suspended)
        placed.refresh()
        if any(share is not None for share in shares):
            plain.apply(shares, placed.slices)
        else:
            self._stand_still(placed)
        placed.spread()

    def _stand_still(self, placed: Any) -> None:
        """A step in which nothing that this rank holds has a gradient: the inner optimizer has nothing to look at."""

        def clip() -> None:
            placed.clip(self, [])

        passes = self.gradient_accumulation_steps  # type: ignore[attr-defined]
        if self._clips_by_norm and passes:  # others count on this rank when they clip
            keras.ops.cond((self._iterations + 1) % passes == 0, clip, lambda: None)  # type: ignore[attr-defined]
        elif self._clips_by_norm:
            clip()
        if self.use_ema and placed.slices:  # type: ignore[attr-defined]
            self._update_model_variables_moving_average(placed.slices)  # type: ignore[attr-defined]
        self._iterations.assign_add(1)  # type: ignore[attr-defined]

    @property
    def sync(self) -> Sync[Any]:
        """The agreement of all ranks: ``flush()``, ``outer_weights()``, ``metrics()``, ``state_dict()`` and others."""
        return self._hvdscale.sync_of(self)

    @property
    def iterations(self) -> Any:
        plain: Any = super().iterations  # type: ignore[misc]
        begun = self._hvdscale.moments_begun
        if begun is None:
            return plain
        return keras.ops.maximum(keras.ops.subtract(plain, keras.ops.cast(begun, plain.dtype)), 0)

    def _backend_update_step(self, *arguments: Any) -> None:
        with self._hvdscale.counting_from_the_first_moment():
            super()._backend_update_step(*arguments)  # type: ignore[misc]

    @property
    def defers(self) -> bool:
        """Whether Keras accumulates gradients first, so that they are reduced where it is done with that."""
        return bool(self.gradient_accumulation_steps) and not hasattr(self, "inner_optimizer")  # type: ignore[attr-defined]

    def _clip_gradients(self, grads: list[Any]) -> list[Any]:
        deferred = self._hvdscale.deferred
        if deferred is not None:
            grads = self._hvdscale.reduce(grads, deferred)
        plain: Any = super()
        placed = self._hvdscale.placed
        sharded, limit = self._hvdscale.sharded, self.global_clipnorm  # type: ignore[attr-defined]
        if sharded is not None and limit is not None and limit > 0:
            return clip_gradients(sharded, grads, self._hvdscale.clipped, limit)
        if placed is not None and self._clips_by_norm:
            return placed.clip(self, grads)
        clipped: list[Any] = plain._clip_gradients(grads)
        return clipped

    @property
    def _clips_by_norm(self) -> bool:
        return bool(self.clipnorm or self.global_clipnorm)  # type: ignore[attr-defined]

    def _use_weight_decay(self, variable: Any) -> bool:
        placed = self._hvdscale.placed
        owner = variable if placed is None else placed.owners.get(id(variable), variable)
        return bool(super()._use_weight_decay(owner))  # type: ignore[misc]

    def finalize_variable_values(self, var_list: Any) -> None:
        """At the end of training, with ``use_ema``: the averages become the weights."""
        plain: Any = super()
        placed = self._hvdscale.placed
        if placed is None or not self.use_ema:  # type: ignore[attr-defined]
            plain.finalize_variable_values(var_list)
            return
        placed.refresh()
        if placed.slices:
            plain.finalize_variable_values(placed.slices)
        placed.spread()

    def save_own_variables(self, store: Any) -> None:
        """The whole state, as a plain optimizer's. Collective where updates are placed."""
        state = self._hvdscale.state
        plain: Any = super()
        (plain if state is None else state.whole()).save_own_variables(store)

    def load_own_variables(self, store: Any) -> None:
        state = self._hvdscale.state
        plain: Any = super()
        if state is None:
            plain.load_own_variables(store)
            return
        whole = state.plain()
        whole.load_own_variables(store)
        state.adopt(whole)

    def build_anew(self, variables: Sequence[Any]) -> None:
        """Built on whole variables before it was known who updates what: go on with this rank's part of the state."""
        fresh = type(self)._hvdscale_base.from_config(self.get_config())  # type: ignore[attr-defined]
        fresh.build(list(variables))
        for target, source in zip(fresh.variables, self.variables, strict=True):  # type: ignore[attr-defined]
            target.assign(source)
        for variable in self.variables:  # type: ignore[attr-defined]
            if variable is not self._iterations and variable is not self._learning_rate:  # type: ignore[attr-defined]
                self._untrack_variable(variable)  # type: ignore[attr-defined]
        self.built = False
        self._trainable_variables_indices: dict[Any, int] = {}
        self.build(variables)
        self._hvdscale.state.adopt(fresh)  # type: ignore[union-attr]

    def build(self, variables: Sequence[Any]) -> None:
        self._hvdscale.share_early()  # first: some optimizers start from the weights
        # Now, not in a graph being traced, where they would start from zeros.
        with verbs.eager() if verbs.initialised(variables) else nullcontext():
            super().build(list(self._hvdscale.trained(self, type(self)._hvdscale_base, variables)))  # type: ignore[misc, attr-defined]

    def register_local_var(self, var: Any) -> None:
        """Keep each rank's own gradients for this variable."""
        self._hvdscale.local.add(id(var))


@functools.cache
def _distributed(base: type) -> type:
    """A subclass of ``base`` that looks like it: a saved model names ``base``."""

    def from_config(cls: type, config: dict[str, Any], custom_objects: Any = None) -> Any:
        arguments = {} if custom_objects is None else {"custom_objects": custom_objects}
        return base.from_config(config, **arguments)  # type: ignore[attr-defined]

    disguise: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "from_config": classmethod(from_config),
        "_hvdscale_base": base,
    }
    made = type(base.__name__, (_Distributed, base), disguise)
    _share_registration(base, made)
    return made


def _share_registration(base: type, made: type) -> None:
    """Keras looks the name it saves up by class: give ``made`` the name of ``base``."""
    from keras.src import api_export

    for names in (api_export.REGISTERED_OBJS_TO_NAMES, object_registration.GLOBAL_CUSTOM_NAMES):
        if base in names:
            names[made] = names[base]
