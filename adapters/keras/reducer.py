"""What stands between an optimizer's gradients and its update: agreement, first broadcast, reduction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from keras import ops

from hvdscale.errors import PlanError
from hvdscale.keras.accumulator import Accumulator
from hvdscale.keras.backend import verbs
from hvdscale.keras.coded import CodedMean
from hvdscale.keras.first_weights import has_weights, when_built
from hvdscale.keras.local import LocalTraining
from hvdscale.keras.placed import PlacedUpdate
from hvdscale.keras.placed_state import PlacedState, common_state
from hvdscale.keras.plan import Distribution
from hvdscale.keras.replicas import agree_on, broadcast_variables, model_state, path_of
from hvdscale.keras.store import outer_names
from hvdscale.sync import Kind, LocalPlan, ParameterServer, Reduction, common_kinds
from hvdscale.sync.engine import first_figures
from hvdscale.sync.handle import SteadySync, Sync
from hvdscale.sync.pending import PendingSync

__all__ = ["Reducer"]


class Reducer:
    """The distributed part of one optimizer. Its decisions are taken in Python, once, also under tracing."""

    def __init__(self, plan: Distribution, kind: str, model: Any = None) -> None:
        self.plan = plan
        self.kind = kind
        self.accumulator = Accumulator(plan.reduction.passes, plan.average_passes)
        self.local: set[int] = set()
        self.suspended = False  # a wrapper of our optimizer has reduced already
        self.deferred: list[Any] | None = None  # variables of gradients that Keras is still accumulating
        self.sharded: Any = None  # the ShardedModel whose parts are trained
        self.clipped: list[Any] = []  # variables of the gradients that are being applied
        self._model = model  # to be shared
        self.placed: PlacedUpdate | None = None  # once the optimizer is built, where ranks update different elements
        self.state: PlacedState | None = None
        self.coded = None if plan.coded is None else CodedMean(plan.coded, plan.process_set)
        self.know(model)
        self._training: LocalTraining | None = None
        self._pending: PendingSync[Any] | None = None  # what the user has of it
        self.moments_begun: Any = None  # while moments are corrected
        self._resumed = False  # weights and optimizer state were loaded by each rank: nothing is copied
        self._shared = False
        self._compared = False
        self._kinds: dict[int, Kind] = {}  # by id of the variable: what all ranks send for it

    def know(self, model: Any) -> None:
        """``model`` has the embeddings, and the running statistics that meet in rounds. Its weights stay."""
        self._given_model = model
        if self.coded is not None:
            self.coded.model = model

    @property
    def exchanges(self) -> bool:
        """Whether this rank has anyone to exchange with.

        Raises:
            WorldError: before ``init()``.
        """
        if verbs.world().size == 1:
            return False
        return bool(self.plan.process_set.included()) and self.plan.process_set.size() > 1

    @property
    def relaxed(self) -> bool:
        """Whether weights meet, not gradients, and this rank takes part."""
        return isinstance(self.plan.agreement, LocalPlan) and bool(self.plan.process_set.included())

    def sync_of(self, optimizer: Any) -> Sync[Any]:
        """What ``optimizer.sync`` is. No communication."""
        if self.relaxed:
            if self._pending is None:
                plan = self.plan.agreement
                assert isinstance(plan, LocalPlan)
                self._pending = PendingSync(
                    not self._set_aside,
                    lambda: self._weights_of(self._variables_of(optimizer)),
                    first_figures(plan),
                    lambda joins: self._begin(optimizer, joins),
                )
                if self._training is not None:
                    self._pending.start(self._training.sync)
            return self._pending
        variables = optimizer._trainable_variables if self.placed is None else self.placed.variables
        read = lambda: {path_of(v): verbs.tensor(v) for v in variables}  # noqa: E731
        if self.coded is not None:  # a rank alone sends nothing, and keeps nothing
            return SteadySync(read, metrics=self.coded.metrics, kept=self.coded if self.exchanges else None)
        state = self.state
        if state is None:
            return SteadySync(read)
        return SteadySync(read, state.flush, lambda: {"state_bytes": float(state.bytes())})

    def _variables_of(self, optimizer: Any) -> Sequence[Any]:
        model, variables = self._given_model, optimizer._trainable_variables
        if not variables and model is not None and has_weights(model):
            variables = model.trainable_variables
        if not variables:
            raise PlanError(
                "There is nothing to agree on yet: the model has no variables. Build it, or make a step, first."
            )
        return list(variables)

    @staticmethod
    def _weights_of(variables: Sequence[Any]) -> dict[str, Any]:
        """In float32 and by name, as the agreement gives them."""
        return {
            name: verbs.tensor(np.array(ops.convert_to_numpy(v), np.float32))
            for name, v in zip(outer_names(variables), variables, strict=True)
        }

    def _begin(self, optimizer: Any, joins: bool) -> None:
        """The agreement begins without a step of this rank; ``joins``: with the first step of others, maybe.

        Raises:
            PlanError: the model has no variables yet.
        """
        variables = self._variables_of(optimizer)
        if not optimizer.built:
            optimizer.build(variables)
        self._resumed = self._resumed or not (joins or self._compared)
        if not self._compared and (joins or isinstance(self.plan.agreement, ParameterServer)):
            self.prepare(optimizer, [None] * len(variables), variables, serves=self._set_aside)
        self.local_training(optimizer, variables)

    def trained(self, optimizer: Any, base: Any, variables: Sequence[Any]) -> Sequence[Any]:
        """What the optimizer is built on: ``variables``, or this rank's slices of them."""
        if self.plan.update is None or not self.exchanges:
            return variables
        if self.local:
            raise PlanError(
                f'update="{self.plan.update}" gives variables to the ranks that update them, so none can be '
                "local to each rank. Leave register_local_var() out."
            )
        self.placed = PlacedUpdate(self.plan, variables)
        self.state = PlacedState(base, optimizer, self.placed)
        return self.placed.slices

    @property
    def _set_aside(self) -> bool:
        plan, ranks = self.plan.agreement, self.plan.process_set
        return isinstance(plan, ParameterServer) and ranks.rank() not in plan.worker_ranks(ranks.size())

    def local_training(self, optimizer: Any, variables: Sequence[Any]) -> LocalTraining:
        """The rounds of this optimizer, made when they are first needed, on all ranks."""
        if self._training is None:
            assert isinstance(self.plan.agreement, LocalPlan)
            with verbs.eager():
                self._training = LocalTraining(
                    self.plan.agreement, optimizer, variables, self._given_model, self.plan.process_set
                )
            if self._pending is not None:
                self._pending.start(self._training.sync)
        return self._training

    @contextmanager
    def counting_from_the_first_moment(self) -> Iterator[None]:
        """Within, our optimizer's ``iterations`` are those its moments have seen, by which it corrects them."""
        self.moments_begun = None if self._training is None else self._training.first_state.begun
        try:
            yield
        finally:
            self.moments_begun = None

    # Before the first step ------------------------------------------------------------------------------

    def share_first(self) -> None:
        """Make sure that the first gradient is taken at equal weights: share the model now, or once it is built.

        Raises:
            DesyncError: only some ranks have built the model they were given.
        """
        if self._model is None or not self.exchanges:
            return
        built = {"the model has weights": has_weights(self._model)}
        agree_on("the model given to DistributedOptimizer", (), built, self.plan.process_set)
        self.share_early()
        if not self._shared:
            when_built(self._model, self.share_early)

    def share_early(self) -> None:
        """``share_model``, unless that was done before."""
        if not self._shared:
            self.share_model()

    def share_model(self) -> None:
        """Copy the model's weights from the first rank, if a model was given and has its weights."""
        model = self._model
        if model is None or not self.exchanges or not has_weights(model):
            return
        weights = model_state(model)
        agree_on("the model", weights, {"optimizer": self.kind, **self.plan.facts()}, self.plan.process_set)
        broadcast_variables(weights, self._root, self.plan.process_set)
        self._shared = True

    def prepare(self, optimizer: Any, gradients: Sequence[Any], variables: Sequence[Any], serves: bool = False) -> None:
        """Build the optimizer, agree, and copy the first rank's state: before these variables' first update.

        Raises:
            PlanError: this rank is set aside to serve, and not ``serves``.
        """
        if isinstance(self.plan.agreement, ParameterServer) and self._set_aside and not serves:
            raise self.plan.agreement.set_aside(verbs.world().rank)
        if self._compared and (all(id(v) in self._kinds for v in variables) or not self.exchanges):
            return
        if not verbs.initialised(variables):
            return
        with verbs.eager():
            stepping = True
            if self.exchanges:
                stepping = self._agree(gradients, variables, bool(optimizer.built))
                if not self._resumed:
                    self.share_model()  # again: weights may have been loaded on one rank since
            if not variables:
                return
            if not optimizer.built:
                optimizer.build(list(variables))
            if self.exchanges and self._model is not None and not self._resumed:
                broadcast_variables(common_state(optimizer), self._root, self.plan.process_set)
            if self.plan.update is not None and self.exchanges and self.placed is None:
                getattr(optimizer, "inner_optimizer", optimizer).build_anew(variables)
            if stepping:
                self._model = None
            self._compared = stepping
            if self.relaxed:
                training = self.local_training(getattr(optimizer, "inner_optimizer", optimizer), variables)
                if not serves:
                    training.begin()

    @property
    def _root(self) -> int:
        ranks = self.plan.process_set.ranks
        return int(ranks[0]) if ranks else 0

    def _agree(self, gradients: Sequence[Any], variables: Sequence[Any], built: bool) -> bool:
        """Whether a step follows on some rank; if not, all have come to flush, and agree again when one does."""
        overwritten = [path_of(v) for v in variables if getattr(v, "overwrite_with_gradient", False)]
        if overwritten:
            raise PlanError(
                f"Float8 scales cannot be averaged over ranks, and {overwritten[0]} is one. "
                "Quantise after training, or train in mixed_bfloat16."
            )
        facts = {"optimizer": self.kind, **self.plan.facts()}
        if self.plan.update is not None:
            facts["built on whole variables"] = built and self.placed is None
        agree_on("the optimizer's variables", variables, facts, self.plan.process_set)
        own = [self._kind(g) for g in gradients]
        if isinstance(self.plan.agreement, ParameterServer):
            # A rank set aside has no gradients, and may come here before the first step, as one that resumes does.
            own = [Kind.DENSE] * len(own)
            flags = verbs.control(self.plan.process_set).allgather(bytes([self._resumed]))
            self._resumed = any(map(any, flags))
        kinds = common_kinds(own, verbs.control(self.plan.process_set))
        if self.relaxed and not any(kinds):
            return False
        self._kinds.update((id(v), kind) for v, kind in zip(variables, kinds, strict=True))
        self._compared = True
        return True

    def _kind(self, gradient: Any) -> Kind:
        kind: Kind = verbs.kind_of(gradient)
        dense = self.plan.reduction.sparse_as_dense or self.coded is not None
        return Kind.DENSE if kind is Kind.SPARSE and dense else kind

    def join(self, variables: Sequence[Any]) -> None:
        """Agree anew after ranks came or went; called by all of them, those that know and those that do not."""
        if not self.exchanges:
            return
        facts = {"optimizer": self.kind, **self.plan.facts()}
        agree_on("the optimizer's variables", variables, facts, self.plan.process_set)
        # Per variable: 0 not known here, else 1 + its kind.
        known = bytes(1 + self._kinds[id(v)] if id(v) in self._kinds else 0 for v in variables)
        everyone = verbs.control(self.plan.process_set).allgather(known)
        for i, variable in enumerate(variables):
            claim = max(seen[i] for seen in everyone)
            if claim:
                self._kinds[id(variable)] = Kind(claim - 1)
        self._compared = True
        self._model = None

    # Each step ------------------------------------------------------------------------------------------

    def complete(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """``gradients`` as all ranks send them: zeros, or no rows, where only other ranks have a gradient.

        Which variables have gradients, and which of these are sparse, is agreed upon at the first step and stays.
        Gradients of local variables are left alone.

        Raises:
            PlanError: a gradient where no rank had one at the first step.
        """
        result = list(gradients)
        for i, (gradient, variable) in enumerate(zip(gradients, variables, strict=True)):
            kind = self._kinds.get(id(variable))
            if kind is None or id(variable) in self.local:
                continue
            if kind is Kind.NONE and gradient is not None:
                raise PlanError(
                    f"{path_of(variable)} has a gradient now, but no rank had one at the first step. "
                    "Freeze it, or let it take part from the start."
                )
            result[i] = verbs.in_kind(gradient, variable, kind)
        return result

    def reduce(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """The gradients of all ranks as one list; ``None`` stays ``None``. Between rounds: this rank's own."""
        local = self._training
        if local is None:
            return self._reduced(gradients, variables)
        if not local.has_warmup or self.suspended:
            return list(gradients)
        return verbs.only_if(local.warming_up, lambda g: self._reduced(g, variables), list(gradients))

    def heard(self, kept: Any) -> Any:
        """Of how many passes, ``kept`` of them this rank's, the reduced gradients are; float32."""
        kept, local = ops.cast(kept, "float32"), self._training
        if local is None or not local.has_warmup or not self.exchanges:
            return kept
        name, ranks = f"{self.plan.name}.kept", self.plan.process_set
        return verbs.only_if(local.warming_up, lambda own: [verbs.sum_over_ranks(own[0], ranks, name)], [kept])[0]

    def after_step(self) -> None:
        """The optimizer has made a step, or left it out."""
        if self._training is not None and not self.suspended:
            _refuse_xla("the rounds between steps")
            self._training.after_step()

    def _reduced(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """The gradients of all ranks as one list.

        Raises:
            PlanError: under XLA, which has no kernels for Horovod.
        """
        if self.suspended or not self.exchanges:
            return list(gradients)
        _refuse_xla("Horovod's operations")
        local = [id(v) in self.local for v in variables]
        shared = [None if mine else g for g, mine in zip(gradients, local, strict=True)]
        if self.coded is not None:
            reduced = self.coded.average(shared, variables)
        else:
            reduced = verbs.reduce_gradients(
                shared,
                self._positions(variables),
                compression=self.plan.compression,
                process_set=self.plan.process_set,
                name=self.plan.name,
            )
        share = 1.0 / self.plan.process_set.size() if self.plan.scale_local else 1.0
        return [
            (g if g is None or share == 1.0 else verbs.scaled(g, share)) if mine else r
            for g, r, mine in zip(gradients, reduced, local, strict=True)
        ]

    def _positions(self, variables: Sequence[Any]) -> Reduction:
        """The reduction with the user's groups as positions in ``variables``."""
        if not self.plan.groups:
            return self.plan.reduction
        places = {id(v): i for i, v in enumerate(variables)}
        return replace(
            self.plan.reduction,
            groups=tuple(tuple(places[id(v)] for v in group if id(v) in places) for group in self.plan.groups),
        )

    @contextmanager
    def already_reduced(self) -> Iterator[None]:
        """Within, ``reduce`` hands gradients back as they are."""
        self.suspended = True
        try:
            yield
        finally:
            self.suspended = False


def _refuse_xla(what: str) -> None:
    """Raise PlanError where the step is being compiled by XLA."""
    if verbs.compiled_by_xla():
        raise PlanError(
            f"XLA cannot compile {what}. Call model.compile(..., jit_compile=False), and leave jit_compile out of "
            "tf.function."
        )
