"""One optimizer's gradients on their way through the ranks, from backward pass to step.

A *round* is everything from one step to the next. Each parameter's hook counts its backward passes; when the last
one of its bucket is there, the bucket's all-reduce starts, while the rest of the backward pass goes on. When all
buckets are under way by the end of a backward pass, their results are awaited right there, so that whatever
follows ``loss.backward()`` sees averaged gradients. Otherwise (some parameter got no gradient) the round
is finished by ``synchronize()`` or the step, which send zeros for the missing ones.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from horovod.torch import ProcessSet
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hvdscale.runtime import timeline
from hvdscale.sync import Reduction
from hvdscale.torch.gradients import Finish, launch
from hvdscale.torch.steps import StepsOnParameters

__all__ = ["Announcer", "Reducer", "Survey"]

_TOO_MANY_PASSES = (
    "Gradients were computed more than backward_passes_per_step={passes} times before call to step() "
    "(parameter {name}). Increase backward_passes_per_step to accumulate gradients locally, or call "
    "optimizer.step(), optimizer.synchronize() or optimizer.zero_grad() between backward passes."
)

Survey = Callable[[dict[int, bool]], dict[int, bool]]
"""Joins what ranks know: whether the gradient at a position is sparse. Collective."""

# The hook on each parameter, by its id: the optimizer wrapped last reduces its gradient, so that one thrown away but
# not collected yet does not reduce it a second time. Entries of parameters long gone do no harm.
_watching: dict[int, RemovableHandle] = {}
_owners: dict[int, tuple[weakref.ref[Reducer], int]] = {}  # of the same parameters: who reduces, and the position there
_quiet: set[int] = set()  # ids of parameters whose gradients someone else says are complete


class Announcer:
    """Says when gradients are complete where backward passes do not: a pipeline makes many of them, some in pieces.

    Inside ``with announcer:`` hooks of ``parameters`` are silent. ``complete`` lets the reduction of gradients start;
    leaving waits for it, as the end of a backward pass does.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._ids = {id(parameter) for parameter in parameters}

    def __enter__(self) -> Announcer:
        _quiet.update(self._ids)
        return self

    def complete(self, parameters: Sequence[Tensor]) -> None:
        for parameter in parameters:
            for reducer, position in self._reducers(parameter):
                reducer.complete(position)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, where: object) -> None:
        _quiet.difference_update(self._ids)
        if kind is None:
            found = [_owners[number][0]() for number in self._ids if number in _owners]
            for reducer in dict.fromkeys(reducer for reducer in found if reducer is not None):
                reducer.settle()

    def _reducers(self, parameter: Tensor) -> list[tuple[Reducer, int]]:
        reference, position = _owners.get(id(parameter), (None, 0))
        reducer = None if reference is None else reference()
        return [] if reducer is None or id(parameter) not in _watching else [(reducer, position)]


class Reducer(StepsOnParameters):
    """Reduces the gradients of an ordered registry of parameters, round by round.

    Args:
        reduction: op, predivision, passes and groups (positions in the registry).
        compression: Horovod's ``Compression`` or a class like it.
        process_set: the ranks that take part; this rank is one of them.
        prefix: put before parameter names in message names, different for every optimizer.
        sparse: ``id`` of parameters known to have sparse gradients.
        survey: asks all ranks, where nobody said which gradients are sparse; ``None`` where that is known.
    """

    watches_gradients = True

    def __init__(
        self,
        reduction: Reduction,
        *,
        compression: Any,
        process_set: ProcessSet,
        prefix: str,
        sparse: frozenset[int] = frozenset(),
        survey: Survey | None = None,
    ) -> None:
        self.reduction = reduction
        self.passes = reduction.passes
        self._compression = compression
        self._process_set = process_set
        self._prefix = prefix
        self._sparse_ids = sparse
        self._parameters: list[Tensor] = []
        self._names: list[str] = []
        self._hooked: set[int] = set()  # positions
        self._sparse: set[int] = set()  # positions whose gradient was sparse once
        self._survey = survey
        self._unknown: set[int] = set()  # positions whose gradient may be sparse, and no rank has had one yet
        # The round:
        self._left: dict[int, int] = {}  # position -> backward passes to come; empty before the first
        self._buckets: list[list[int]] = []
        self._bucket_of: dict[int, int] = {}
        self._waiting: list[int] = []  # per bucket: positions not ready yet
        self._flights: list[tuple[list[int], Finish]] = []
        self._finished: Literal["", "backward", "synchronize"] = ""
        self._queued = False  # a callback waits for the end of the backward pass in progress
        self._asks = False  # nothing is sent before the ranks have told each other what is sparse
        self._warned = False

    def add(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Append parameters to the registry and watch the trainable ones."""
        for name, parameter in named:
            if id(parameter) in self._sparse_ids:
                self._sparse.add(len(self._parameters))
            elif self._survey is not None and parameter.dim() == 2:  # as the weights of embeddings are
                self._unknown.add(len(self._parameters))
            self._parameters.append(parameter)
            self._names.append(name)
        self._trainable()

    @property
    def busy(self) -> bool:
        """Backward passes were counted, and their gradients are not reduced yet."""
        return bool(self._left) and not self._finished

    def set_passes(self, passes: int) -> None:
        """Backward passes per round from now on; a round under way starts counting anew, as in Horovod."""
        self.passes = passes
        if not self._flights:
            self._left = dict.fromkeys(self._left, passes)

    def new_round(self) -> None:
        """The gradients were used or thrown away. Not while they are being reduced."""
        if not self.busy:
            self.forget()

    def forget(self) -> None:
        """Begin a new round, whatever is under way."""
        self._flights = []
        self._left = {}
        self._finished = ""

    def stop(self) -> None:
        """Watch no gradient any more."""
        for parameter in self._parameters:
            handle = _watching.pop(id(parameter), None)
            if handle is not None:
                handle.remove()
        self._hooked.clear()

    def before_scaler(self) -> None:
        """A gradient scaler is about to look for infinities: it sees those of all ranks."""
        self.synchronize()

    def step_skipped(self) -> None:
        """A gradient scaler left the step out, on every rank."""

    def before_step(self) -> None:
        self.synchronize()

    def after_step(self) -> None:
        self.new_round()

    def synchronize(self) -> None:
        """Finish the round: on return every trainable parameter's gradient is reduced. Collective; once a round."""
        if not self._finished:
            if not self._left:
                self._open()
            self._send_rest()
        self._finished = "synchronize"

    def _send_rest(self) -> None:
        """Reduce what is not under way yet, and wait for all. Every rank sends the same, in the same order."""
        sent = {position for bucket, _ in self._flights for position in bucket}
        missing = {position for position in self._trainable() if position not in sent}
        planned = [[p for p in bucket if p in missing] for bucket in self._buckets]
        loose = sorted(missing.difference(*planned))  # unfrozen in the middle of the round
        self._asks = self._asks or not self._unknown.isdisjoint(loose)
        self._ask()
        for bucket in planned:
            if bucket:
                self._launch(bucket)
        if loose:
            self._launch(loose)
        self._wait()

    def _trainable(self) -> list[int]:
        """Positions of parameters that want gradients now; those unfrozen since get their hook."""
        positions = [i for i, p in enumerate(self._parameters) if p.requires_grad]
        for i in positions:
            if i not in self._hooked:
                self._hooked.add(i)
                self._watch(i)
        return positions

    def _watch(self, position: int) -> None:
        reducer = weakref.ref(self)  # an optimizer thrown away must not go on reducing

        def hook(parameter: Tensor) -> None:
            alive = reducer()
            if alive is not None and id(parameter) not in _quiet:
                alive._gradient_ready(position)

        parameter = self._parameters[position]
        _owners[id(parameter)] = (reducer, position)
        before = _watching.pop(id(parameter), None)
        if before is not None:
            before.remove()
        _watching[id(parameter)] = parameter.register_post_accumulate_grad_hook(hook)

    def _arrange(self) -> list[int]:
        """Positions of what wants gradients now, each in a bucket."""
        positions = self._trainable()
        if positions != sorted(self._bucket_of):
            self._buckets = self._plan(positions)
            self._bucket_of = {p: i for i, bucket in enumerate(self._buckets) for p in bucket}
        return positions

    def _open(self) -> None:
        positions = self._arrange()
        self._left = dict.fromkeys(positions, self.passes)
        self._waiting = [len(bucket) for bucket in self._buckets]
        self._finished = ""
        self._queued = False  # a backward pass that raised never ran its callback
        self._asks = not self._unknown.isdisjoint(positions)

    def _plan(self, positions: list[int]) -> list[list[int]]:
        """Which parameters travel together: called when other ones than before are trainable."""
        parameters = [self._parameters[position] for position in positions]
        return self.reduction.buckets(positions, [p.numel() * p.element_size() for p in parameters])

    def _ask(self) -> None:
        """Let a rank without a gradient know what kind its peers send. Every rank comes here once in such a round."""
        if self._asks and self._survey is not None:
            self._asks = False
            gradients = {position: self._parameters[position].grad for position in self._unknown}
            kinds = self._survey({position: g.is_sparse for position, g in gradients.items() if g is not None})
            self._sparse |= {position for position, is_sparse in kinds.items() if is_sparse}
            self._unknown -= kinds.keys()

    def complete(self, position: int) -> None:
        """A backward pass that this reducer did not watch is over for this parameter."""
        self._gradient_ready(position, in_backward=False)

    def settle(self) -> None:
        """That pass is over for all parameters."""
        if self._left and not any(self._waiting):
            self._backward_over()

    def _gradient_ready(self, position: int, in_backward: bool = True) -> None:
        if self._finished == "backward":
            raise AssertionError(_TOO_MANY_PASSES.format(passes=self.passes, name=self._names[position]))
        if self._finished or not self._left:
            self._open()
        left = self._left.get(position)
        if left is None:  # unfrozen in the middle of a round: goes with what is left at its end
            return
        if left == 0:
            raise AssertionError(_TOO_MANY_PASSES.format(passes=self.passes, name=self._names[position]))
        self._left[position] = left - 1
        if left > 1:
            return
        number = self._bucket_of[position]
        self._waiting[number] -= 1
        if self._waiting[number] == 0 and not self._asks:
            self._launch(self._buckets[number])
        if in_backward and not self._queued:
            self._queued = True
            # Runs when the backward pass in progress is over; there is no public name for it.
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_over)

    def _backward_over(self) -> None:
        self._queued = False
        if self._finished:
            return
        if not any(self._waiting):
            self._send_rest()
            self._finished = "backward"
        elif not self._warned:
            self._warned = True
            missing = [self._names[position] for position, left in self._left.items() if left]
            warnings.warn(
                f"No gradient reached {', '.join(missing[:3])}{' ...' if len(missing) > 3 else ''} in this backward "
                "pass, so gradients are averaged over ranks only in optimizer.step(). Before you clip or read them, "
                "call optimizer.synchronize().",
                stacklevel=2,
            )

    def _launch(self, bucket: list[int]) -> None:
        gradients = [self._gradient(position) for position in bucket]
        finish = launch(
            gradients,
            self.reduction,
            compression=self._compression,
            process_set=self._process_set,
            name=f"{self._prefix}{self._names[bucket[0]]}",
            in_place=True,
        )
        self._flights.append((bucket, finish))

    def _gradient(self, position: int) -> Tensor:
        parameter = self._parameters[position]
        if parameter.grad is None:
            # Another rank may have used the parameter: all must send something, and of the same kind.
            if position in self._sparse:
                parameter.grad = torch.sparse_coo_tensor(
                    torch.empty(1, 0, dtype=torch.int64, device=parameter.device),
                    torch.empty(0, *parameter.shape[1:], dtype=parameter.dtype, device=parameter.device),
                    parameter.shape,
                    check_invariants=False,
                )
            else:
                parameter.grad = torch.zeros_like(parameter)
        elif parameter.grad.is_sparse:
            self._sparse.add(position)
        return parameter.grad

    def _wait(self) -> None:
        flights, self._flights = self._flights, []
        for bucket, finish in flights:
            with timeline.span("wait for gradients"):
                results = finish()
            for position, result in zip(bucket, results, strict=True):
                if result.is_sparse:
                    self._parameters[position].grad = result
