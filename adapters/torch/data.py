"""``shard_dataset``: a rank's share of the data as a ``DataLoader`` that knows what it has delivered."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from inspect import signature
from typing import Any

import torch
from torch.utils.data import DataLoader

from hvdscale.data import BalancedPlan, ShardPlan, ShardStream
from hvdscale.data.batch import Batch
from hvdscale.data.checks import instance, integer
from hvdscale.data.passes import refuse_overtaken
from hvdscale.errors import PlanError
from hvdscale.torch.arrays import as_dataset, on_accelerator
from hvdscale.torch.samplers import AheadSampler
from hvdscale.torch.streaming import ShardedIterable, StatedIterable, refuse_persistent

__all__ = ["ShardedLoader", "StreamLoader", "shard_dataset"]

_OURS = ("batch_sampler", "sampler", "shuffle", "drop_last")
_OTHER_NAMES = {"dataset": "data", "num_workers": "workers", "prefetch_factor": "prefetch", "collate_fn": "collate"}


def shard_dataset(
    data: Any,
    plan: ShardPlan | BalancedPlan | ShardStream,
    batch_size: int,
    *,
    shard: int | None = None,
    epoch: int | None = None,
    workers: int = 0,
    prefetch: int | None = None,
    collate: Callable[[Any], Any] | None = None,
    pin_memory: bool | None = None,
    persistent_workers: bool | None = None,
    **options: Any,
) -> ShardedLoader | StreamLoader:
    """This rank's share of ``data`` as a ``DataLoader``. One iteration is one epoch, each in the plan's order.

    ``loader.state_dict()`` counts the batches handed to the training loop, not those that workers have prepared.
    Save the states of all ranks; ``ShardPlan.resume(states, hvd.size())`` makes the plan for what is left. An
    iteration that is left by ``break`` is gone on with by the next.

    Workers are started as ``DataLoader`` starts them. Pass ``multiprocessing_context="forkserver"`` where processes
    must not fork once MPI runs, as on InfiniBand.

    Args:
        data: an array, or a tuple or dictionary of arrays (NumPy, memory maps, tensors): batches are tensors.
            Or any map-style data set. With a ``ShardStream``: a function of the number of the record to start at.
        plan: which samples each shard reads: a ``ShardPlan``, ``BalancedPlan`` or ``ShardStream``.
        batch_size: samples in a batch of one rank.
        shard: whose samples; default: this rank's, of a plan with one shard per rank.
        epoch: the first epoch; default: the plan's first. A stream has its own.
        workers: processes that prepare batches; 0: none.
        prefetch: batches each worker prepares ahead; default: 2.
        collate: makes a batch of a list of samples, or of the rows taken from arrays; default: PyTorch's, or none.
        pin_memory: in page-locked memory, for fast copies to a GPU; default: where a GPU is and data is not on it.
        persistent_workers: keep workers over epochs; default: yes. Not for streams.
        options: others of ``DataLoader``, such as ``worker_init_fn``, ``timeout``, ``generator``.

    Raises:
        PlanError: an argument out of its range, data that does not fit the plan, or an option that the plan decides.
    """
    instance("plan", plan, ShardPlan, BalancedPlan, ShardStream)
    integer("workers", workers, 0)
    if prefetch is not None and not workers:
        raise PlanError(
            f"Workers prefetch, and there are none; prefetch is {prefetch!r}. Give workers, or leave it out."
        )
    if persistent_workers and not workers:
        raise PlanError("Workers persist, and there are none. Give workers, or leave persistent_workers out.")
    _check_options(options)
    options["num_workers"] = workers
    options["prefetch_factor"] = None if prefetch is None else integer("prefetch", prefetch, 1)
    there = on_accelerator(data)
    if there and (workers or pin_memory):
        raise PlanError(
            "data lies in a GPU's memory, which other processes cannot read, and which cannot be page-locked. Leave "
            "workers and pin_memory out, or keep the data in the host's memory."
        )
    options["pin_memory"] = torch.cuda.is_available() and not there if pin_memory is None else pin_memory
    if isinstance(plan, ShardStream):
        if epoch is not None:
            raise PlanError(f"A stream has its epoch in itself: ShardStream(..., epoch={epoch!r}). Leave epoch out.")
        refuse_persistent(workers, bool(persistent_workers))
        return StreamLoader(ShardedIterable(data, plan, batch_size, shard=shard, collate=collate), **options)
    dataset, gather = as_dataset(data, collate)
    if len(dataset) != plan.n:
        raise PlanError(f"The plan is over {plan.n} samples; data holds {len(dataset)}. Make the plan for len(data).")
    options["persistent_workers"] = workers > 0 if persistent_workers is None else persistent_workers
    return ShardedLoader(dataset, AheadSampler(plan, batch_size, shard=shard, epoch=epoch), gather, **options)


def _check_options(options: Mapping[str, Any]) -> None:
    """Raises PlanError for what is no option of a ``DataLoader``, or not the caller's to decide; it says whose."""
    known = signature(DataLoader).parameters
    fields = {field.name for kind in (ShardPlan, BalancedPlan, ShardStream) for field in dataclasses.fields(kind)}
    for name in options:
        if name in _OTHER_NAMES:
            raise PlanError(
                f"{name} is called {_OTHER_NAMES[name]} here: shard_dataset(..., {_OTHER_NAMES[name]}=...)."
            )
        if name in _OURS:
            raise PlanError(f"The plan decides on {name}: leave it out, or see policy and tail of ShardPlan.")
        if name not in known:
            where = f"Give it to the plan: {name}=..." if name in fields else f"There are {', '.join(known)}."
            raise PlanError(f"A DataLoader of PyTorch {torch.__version__} has no option {name}. {where}")
    if options.get("in_order") is False:
        raise PlanError("Batches come in the plan's order, which the state counts; leave in_order=False out.")


class ShardedLoader(DataLoader[Any]):
    """A ``DataLoader`` over a shard's batches. Made by ``shard_dataset``."""

    def __init__(self, dataset: Any, sampler: AheadSampler, collate: Callable[[Any], Any], **options: Any) -> None:
        super().__init__(dataset, batch_sampler=sampler, collate_fn=collate, **options)
        self.feed = sampler.feed
        self._passes, self._turn = sampler.passes, 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._turn += 1
        for data in _while_latest(super().__iter__(), self._turn, lambda: self._turn):
            self._passes.deliver(self._passes.turn)
            yield data

    @property
    def epoch(self) -> int:
        """The epoch of the next batch: once the last batch of an epoch is handed out, the epoch after it."""
        return self.feed.epoch

    @property
    def batch(self) -> Batch | None:
        """The plan's batch delivered last: ``indices``, ``count``, ``valid``, ``epoch``, ``step``."""
        return self.feed.batch

    def state_dict(self) -> dict[str, Any]:
        """What was delivered, as JSON; ``resume`` of the plan's class takes the states of all ranks."""
        return self.feed.state_dict()


class StreamLoader(DataLoader[Any]):
    """A ``DataLoader`` over a shard's batches of a stream. Made by ``shard_dataset``."""

    def __init__(self, batches: ShardedIterable, **options: Any) -> None:
        super().__init__(StatedIterable(batches), batch_size=None, collate_fn=_as_it_is, **options)
        self._cursor = batches.cursor
        self._turn = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self._turn += 1
        for data, state in _while_latest(super().__iter__(), self._turn, lambda: self._turn):
            self._cursor.reach(state)
            yield data
        self._cursor.finish()

    @property
    def epoch(self) -> int:
        """The pass over the stream of this iteration, or of the next one between two."""
        return self._cursor.epoch

    def state_dict(self) -> dict[str, Any]:
        """What was delivered, as JSON; ``ShardStream.resume`` takes the states of all shards."""
        return self._cursor.state_dict()


def _while_latest(batches: Iterator[Any], own: int, latest: Callable[[], int]) -> Iterator[Any]:
    """The batches of the loader's iteration ``own``.

    Raises:
        PlanError: another one has begun meanwhile; it counts what is delivered.
    """
    while own == latest():
        try:
            batch = next(batches)
        except StopIteration:
            return
        yield batch
    refuse_overtaken()


def _as_it_is(item: Any) -> Any:
    return item
