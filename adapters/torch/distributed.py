"""Turning an optimizer into a distributed one in place: the same object, of a subclass of its own type.

The step itself is not overridden. Work is done in the optimizer's own step hooks, so learning-rate schedulers,
gradient scalers and hooks made before or after find what they expect, once per step.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import horovod.torch as _horovod
from horovod.torch import global_process_set
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdscale.errors import DesyncError, PlanError, StateError
from hvdscale.runtime.agreement import Fingerprint, agree
from hvdscale.sync import EveryStep, LocalPlan
from hvdscale.sync.gradient_mean import metrics_of
from hvdscale.sync.handle import SteadySync, Sync
from hvdscale.torch.adasum import DeltaReducer
from hvdscale.torch.coded import CodedReducer
from hvdscale.torch.local import LocalTraining
from hvdscale.torch.names import parameter_names
from hvdscale.torch.placed import PlacedUpdate
from hvdscale.torch.placed_state import keep_precision
from hvdscale.torch.reducer import Reducer, Survey
from hvdscale.torch.runtime import control, elastic
from hvdscale.torch.steps import Attachment, Terms, after_step, before_step

__all__ = ["DistributedMixin", "distribute", "plain_class"]

_ZERO_GRAD = (
    "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or optimizer.synchronize(). "
    "This is prohibited as it can cause a race condition."
)

# Every optimizer has a number, part of its messages' names, so that models do not collide: how many this process
# wrapped before it. A copy is numbered after its original, so that one made on some ranks only shifts nobody's count.
_wrapped = 0
_copies: Counter[str] = Counter()

Registry = tuple[tuple[str, bool], ...]  # name of each parameter, and whether its gradient is sparse


class DistributedMixin:
    """What a distributed optimizer adds to its type. Not made directly: see ``DistributedOptimizer``."""

    _hvdscale: Attachment
    param_groups: list[dict[str, Any]]

    @property
    def sync(self) -> Sync[Tensor]:
        """The agreement of all ranks: ``flush()``, ``outer_weights()``, ``metrics()``, ``state_dict()`` and others."""
        held = self._hvdscale
        if isinstance(held.exchange, LocalTraining):
            return held.exchange.sync
        more: dict[str, Any] = {}
        if isinstance(held.exchange, PlacedUpdate):
            more = {"flush": held.exchange.flush, "metrics": held.exchange.metrics}
        elif isinstance(held.exchange, CodedReducer):
            more = {"metrics": held.exchange.metrics, "kept": held.exchange}
        elif isinstance(held.terms.plan, EveryStep) and held.terms.plan.coded:  # a rank alone sends nothing
            more = {"metrics": lambda: metrics_of(())}
        return SteadySync(lambda: {name: p.detach().clone() for name, p in held.named if p.requires_grad}, **more)

    @property
    def backward_passes_per_step(self) -> int:
        return self._hvdscale.terms.reduction.passes

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change how many backward passes are accumulated before gradients are reduced."""
        held = self._hvdscale
        held.terms = replace(held.terms, reduction=replace(held.terms.reduction, passes=passes))
        if held.exchange is not None:
            held.exchange.set_passes(passes)

    def synchronize(self) -> None:
        """Wait until ``.grad`` of every parameter holds the reduced gradient. Collective.

        Needed before gradients are read or changed only where some parameters get none in a backward pass, or
        gradients are reduced before all passes of ``backward_passes_per_step``; a second call does nothing.
        """
        if self._hvdscale.exchange is not None:
            self._hvdscale.exchange.synchronize()

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """A step inside does not reduce gradients: ``synchronize()`` was called before."""
        held = self._hvdscale
        if isinstance(held.exchange, DeltaReducer):
            raise AssertionError("Skipping synchronization is not supported when using Adasum optimizer.")
        held.skip = True
        try:
            yield
        finally:
            held.skip = False

    def zero_grad(self, set_to_none: bool = True) -> None:
        exchange = self._hvdscale.exchange
        if exchange is not None:
            if exchange.busy:
                raise AssertionError(_ZERO_GRAD)
            exchange.new_round()
        super().zero_grad(set_to_none=set_to_none)  # type: ignore[misc]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters later; theirs are reduced too. Collective: every rank adds the same group."""
        super().add_param_group(param_group)  # type: ignore[misc]
        held = self._hvdscale
        last = len(self.param_groups) - 1
        named = parameter_names(self.param_groups[last:], held.names, last)
        held.named += named
        if held.exchange is not None:
            try:
                _agree(self, held, "a parameter group")  # type: ignore[arg-type]
            except DesyncError:
                self.param_groups.pop()
                del held.named[-len(named) :]
                raise
            held.exchange.add(named)

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as a plain optimizer's, whoever holds it.

        With ``EveryStep(update="central" | "sharded")`` this is collective: call it on every rank. To save on one rank
        alone, call ``sync.flush()`` on every rank first, and then ``state_dict()`` on the first.
        """
        plain: Any = super()
        if not isinstance(self._hvdscale.exchange, PlacedUpdate):
            return plain.state_dict()
        with self._hvdscale.exchange.whole_state():
            return plain.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a whole state, saved by any number of ranks or by a plain optimizer. Every rank loads the same."""
        exchange = self._hvdscale.exchange
        if exchange is not None:
            exchange.forget()
        super().load_state_dict(state_dict)  # type: ignore[misc]
        if isinstance(exchange, PlacedUpdate):
            keep_precision(self, state_dict)  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        revived = self.__dict__.pop("_hvdscale_revived", None)
        if revived is not None:  # a copy: distributed like the original
            _attach(self, *revived)  # type: ignore[arg-type]

    def __reduce_ex__(self, protocol: Any) -> Any:
        held = self._hvdscale
        if isinstance(held.exchange, PlacedUpdate):
            raise StateError(
                f'With update="{held.exchange.update}" this rank holds a part of the optimizer\'s state, and a copy '
                "would be one of that part. Make a new optimizer and give it optimizer.state_dict()."
            )
        state = {k: v for k, v in self.__getstate__().items() if k != "_hvdscale"}  # type: ignore[attr-defined]
        registry = tuple((name, id(parameter) in held.sparse) for name, parameter in held.named)
        return _revive, (plain_class(self), held.terms, held.number, registry, held.asks), state  # type: ignore[arg-type]


def plain_class(optimizer: Optimizer) -> type[Optimizer]:
    """The optimizer's type without the distribution."""
    return getattr(type(optimizer), "_hvdscale_plain", type(optimizer))


def distribute(
    optimizer: Optimizer,
    terms: Terms,
    names: dict[int, str] | None,
    named: list[tuple[str, Tensor]],
    sparse: frozenset[int] | None = None,
    model: nn.Module | None = None,
) -> None:
    """Make ``optimizer`` distributed in place. Collective over the process set.

    Args:
        terms: how to reduce.
        names: the user's names by ``id`` of the parameter, for groups added later.
        named: ``(name, parameter)`` of all groups, in order.
        sparse: ``id`` of the parameters that have sparse gradients, or ``None`` where that is not known.
        model: whose buffers are averaged in rounds.

    Raises:
        DesyncError: ranks disagree on parameters, optimizer or terms.
        PlanError: a type of optimizer whose class cannot be exchanged.
    """
    global _wrapped
    number, _wrapped = str(_wrapped), _wrapped + 1
    held = Attachment(terms, names, named, number, None, sparse or frozenset(), asks=sparse is None, model=model)
    alone = not _takes_part(terms)
    if not alone:
        _agree(optimizer, held, "the optimizer")
    try:
        optimizer.__class__ = _distributed_class(type(optimizer))
    except TypeError as error:
        raise PlanError(
            f"{type(optimizer).__name__} cannot be made distributed in place ({error}). "
            "Derive it from torch.optim.Optimizer without __slots__."
        ) from error
    optimizer._hvdscale = held  # type: ignore[attr-defined]
    if not alone:
        _watch(optimizer, held)
    if isinstance(held.exchange, (CodedReducer, LocalTraining)):
        held.exchange.open()


def _takes_part(terms: Terms) -> bool:
    """Weights meet on a rank alone, too: its outer optimizer is part of the method."""
    exchanges = terms.process_set.size() > 1 or elastic() or isinstance(terms.plan, LocalPlan)
    return bool(terms.process_set.included()) and exchanges


def _agree(optimizer: Optimizer, held: Attachment, about: str) -> None:
    tensors = [
        (name, tuple(p.shape), str(p.dtype).removeprefix("torch.") + ("" if p.requires_grad else " (frozen)"))
        for name, p in held.named
    ]
    agree(
        Fingerprint.of(tensors, held.terms.facts(plain_class(optimizer), held.number)),
        control(held.terms.process_set),
        about,
    )


def _watch(optimizer: Optimizer, held: Attachment) -> None:
    terms, prefix = held.terms, f"hvdscale.{held.number}."
    common = {"compression": terms.compression, "process_set": terms.process_set, "prefix": prefix}
    survey = _survey(terms) if held.asks else None
    if terms.reduction.op == "adasum":
        held.exchange = DeltaReducer(terms.reduction, **common)
    elif isinstance(terms.plan, LocalPlan):
        warm = terms.plan.warmup > 0 and terms.process_set.size() > 1
        averager = partial(Reducer, terms.reduction, sparse=held.sparse, survey=survey, **common)
        held.exchange = LocalTraining(terms.plan, optimizer, held.model, terms.process_set, averager if warm else None)
    elif terms.plan.placed:
        held.exchange = PlacedUpdate(terms.plan, optimizer, terms.reduction, **common)
    elif terms.plan.coded and terms.process_set.size() > 1:
        held.exchange = CodedReducer(
            terms.plan, held.model, reduction=terms.reduction, sparse=held.sparse, survey=survey, **common
        )
    else:
        held.exchange = Reducer(terms.reduction, sparse=held.sparse, survey=survey, **common)
    held.exchange.add(held.named)
    optimizer.register_step_pre_hook(before_step)
    after = optimizer.register_step_post_hook(after_step)
    if isinstance(held.exchange, PlacedUpdate):  # first, so that hooks the user made before see the updated model
        optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]


def _survey(terms: Terms) -> Survey:
    def survey(kinds: dict[int, bool]) -> dict[int, bool]:
        everyone = control(terms.process_set).allgather(json.dumps(sorted(kinds.items())).encode())
        known = [pair for message in everyone for pair in json.loads(message)]
        return {position: any(is_sparse for p, is_sparse in known if p == position) for position, _ in known}

    return survey


_classes: dict[type[Optimizer], type[Optimizer]] = {}  # made once, so that copies are of the same type


def _distributed_class(cls: type[Optimizer]) -> type[Optimizer]:
    if cls not in _classes:
        body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        _classes[cls] = type(cls.__name__, (DistributedMixin, cls), {**body, "_hvdscale_plain": cls})
    return _classes[cls]


def _revive(cls: type[Optimizer], terms: Terms, original: str, registry: Registry, asks: bool) -> Optimizer:
    """A copied or unpickled optimizer, before its state is set."""
    if not _horovod.is_initialized():
        raise StateError(
            "A distributed optimizer can be unpickled only after hvd.init(): it would step on local gradients. "
            "Call hvd.init() first, or save and load optimizer.state_dict()."
        )
    if terms.process_set.process_set_id == global_process_set.process_set_id:
        terms = replace(terms, process_set=global_process_set)
    twin = _distributed_class(cls)
    optimizer = twin.__new__(twin)
    optimizer.__dict__["_hvdscale_revived"] = (terms, original, registry, asks)
    return optimizer


def _attach(optimizer: Optimizer, terms: Terms, original: str, registry: Registry, asks: bool) -> None:
    _copies[original] += 1
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    named = [(name, p) for (name, _), p in zip(registry, parameters, strict=True)]
    sparse = frozenset(id(p) for (_, is_sparse), p in zip(registry, parameters, strict=True) if is_sparse)
    number = f"{original}.copy{_copies[original]}"
    held = Attachment(terms, {id(p): n for n, p in named}, named, number, None, sparse, asks)
    optimizer._hvdscale = held  # type: ignore[attr-defined]
    if _takes_part(terms):
        _watch(optimizer, held)
