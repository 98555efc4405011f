"""``shard_dataset``: a rank's share of the data as a ``keras.utils.PyDataset`` for ``fit``."""

from __future__ import annotations

import multiprocessing
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from threading import Lock
from typing import Any

import keras
import numpy as np

from hvdscale.data import BalancedPlan, Batch, Feed, Passes, ShardPlan, ShardStream, Table, verify_feed
from hvdscale.data.checks import instance, integer, own_shard
from hvdscale.data.types import Int64s
from hvdscale.errors import PlanError
from hvdscale.keras.backend import verbs

__all__ = ["BatchCounter", "ShardedPyDataset", "shard_dataset", "verify_epoch"]


def shard_dataset(
    data: Any,
    plan: ShardPlan | BalancedPlan,
    batch_size: int,
    *,
    shard: int | None = None,
    epoch: int | None = None,
    workers: int = 0,
    use_multiprocessing: bool = False,
    prefetch: int = 2,
    collate: Callable[[Any], Any] | None = None,
) -> ShardedPyDataset:
    """This rank's share of ``data`` for ``fit``, on either backend. One epoch of ``fit`` is one of the plan.

        batches = hvd.shard_dataset((x, y), hvd.ShardPlan(len(x), hvd.size(), seed=7), 32)
        model.fit(batches, epochs=3, callbacks=[batches.counter])

    Keras fetches ahead of training, and only a callback hears of each step: ``batches.counter`` counts the batches
    trained on, so that ``state_dict()`` is exact at any step. Without it nothing counts, and each pass reads the same
    epoch: right for an evaluation; from the third pass on a warning says so. Batches come in the plan's order,
    whatever ``shuffle`` says.

    Where the plan has ``tail="pad"``, batches are ``(x, y, weight)``, with 0 for what only fills; each of the three may
    be a dictionary. Keras has no weight for ``x`` alone, so there must be a ``y``: that is refused rather than trained
    on. Keras divides the sum of losses by all samples of a batch.

    Args:
        data: an array, or a tuple ``(x, y)`` or dictionary of arrays, or any object with ``__len__`` and
            ``__getitem__``.
        plan: which samples each shard reads. Streams go through ``shard_dataset`` of the backend's own adapter.
        batch_size: samples in a batch of one rank.
        shard: whose samples; default: this rank's, of a plan with one shard per rank.
        epoch: the first epoch; default: the plan's first.
        workers: threads that fetch batches; 0: none.
        use_multiprocessing: processes rather than threads; data and ``collate`` are sent to each of them.
        prefetch: batches that each worker fetches ahead.
        collate: makes a batch of a list of samples, or of the rows taken from arrays; default: they are stacked,
            or taken as they are.

    Raises:
        PlanError: an argument out of its range, or data that does not fit the plan.
    """
    if isinstance(plan, ShardStream):
        raise PlanError(
            f"A PyDataset has a known length and a ShardStream has none. Give fit what hvdscale.{verbs.FRAMEWORK}."
            "shard_dataset makes of the stream."
        )
    instance("plan", plan, ShardPlan, BalancedPlan)
    integer("batch_size", batch_size, 1)
    integer("workers", workers, 0)
    integer("prefetch", prefetch, 1)
    mine = shard
    if mine is None:  # a given shard needs no init()
        here = verbs.world()
        mine = own_shard(None, plan.shards, here.rank, here.size)
    table = Table(data, collate)
    table.check_length(plan.n)
    return ShardedPyDataset(Feed(plan, mine, batch_size, epoch), table, workers, use_multiprocessing, prefetch)


class ShardedPyDataset(keras.utils.PyDataset):
    """A shard's batches for ``fit``. Made by ``shard_dataset``.

    Keras asks for batches by number, in an order of its own and now and then for one it only looks at. Here each
    request gets the next batch; what was fetched and not trained on is fetched again when Keras begins anew, which
    it says by ``on_epoch_begin`` and, after a look, by ``on_epoch_end``.
    """

    def __init__(self, feed: Feed, table: Table, workers: int, use_multiprocessing: bool, prefetch: int) -> None:
        super().__init__(workers=0)  # the workers here keep batches in order
        self.feed = feed
        self.batch: Batch | None = None
        """The plan's batch that was trained on last, as the counter saw it."""
        self.counter = BatchCounter(self)
        self._table, self._ahead = table, prefetch * workers
        self._executor = _executor(table, workers, use_multiprocessing)
        self._weighs = getattr(getattr(feed.plan, "plan", feed.plan), "tail", "") == "pad"
        self._lock = Lock()
        self._passes, self._turn = Passes(feed), 0
        self._draws: Iterator[tuple[int, Batch]] | None = None
        self._waiting: deque[tuple[Batch, Any]] = deque()
        self._uncounted = 0

    @property
    def num_batches(self) -> int:
        """Batches of this epoch that are not trained on yet: what ``fit`` asks for.

        Raises:
            PlanError: there are none, and ``fit`` cannot do with none.
        """
        if not len(self):
            raise PlanError(
                f"Keras needs a batch in each epoch, and this shard has none in epoch {self.epoch}: there are fewer "
                "samples than shards, or it had read them all before resume. batches.feed.finish() goes on to the next."
            )
        return len(self)

    def __len__(self) -> int:
        return len(self.feed)

    def __getitem__(self, index: int) -> Any:
        """The next batch of this epoch; ``index`` is not looked at."""
        with self._lock:
            if self._draws is None:
                self._draws = self._passes.draw()
                self._waiting.clear()
            while len(self._waiting) <= self._ahead and (drawn := next(self._draws, None)) is not None:
                self._turn, batch = drawn
                self._waiting.append((batch, self._start(batch)))
            if not self._waiting:
                raise IndexError(f"Epoch {self.feed.epoch} has no batch with samples left for step {index} of fit.")
            batch, fetched = self._waiting.popleft()
        rows = fetched.result() if isinstance(fetched, Future) else fetched
        return _weighted(rows, batch.valid) if self._weighs else rows

    def on_epoch_begin(self) -> None:
        self._begin_anew()
        self._uncounted += not (self.counter.used or BatchCounter.counting)  # beside a fit that counts: its validation
        if self._uncounted == 3:  # Keras may have looked at the data before it began
            warnings.warn(
                f"Epoch {self.epoch} of the plan is read again and again, for nobody counts. For fit give "
                "callbacks=[batches.counter]; an evaluation reads the same samples each time.",
                stacklevel=2,
            )

    def on_epoch_end(self) -> None:
        self._begin_anew()

    def take(self) -> None:
        """Count the oldest batch given out as read; the epoch ends with its last one.

        Raises:
            PlanError: none was given out.
        """
        if self._draws is None:
            raise PlanError(
                "The counter in callbacks is of another data set than the one fit reads. For fit(batches, ...) give "
                "callbacks=[batches.counter]."
            )
        self.batch = self._passes.deliver(self._turn)

    @property
    def epoch(self) -> int:
        """The epoch of the next batch: once the last batch of an epoch is trained on, the epoch after it."""
        return self.feed.epoch

    def state_dict(self) -> dict[str, Any]:
        """What was delivered, as JSON; ``resume`` of the plan's class takes the states of all ranks."""
        return self.feed.state_dict()

    def _begin_anew(self) -> None:
        """What was given out and not counted is given out again."""
        with self._lock:
            self._draws = None

    def _start(self, batch: Batch) -> Any:
        if self._executor is None:
            return self._table.fetch(batch.indices)
        if isinstance(self._executor, ProcessPoolExecutor):
            return self._executor.submit(_fetch, batch.indices)
        return self._executor.submit(self._table.fetch, batch.indices)


class BatchCounter(keras.callbacks.Callback):
    """Counts the batches that ``fit`` has trained on. It is ``batches.counter``."""

    counting = False
    """Whether a ``fit`` with a counter is going on."""

    def __init__(self, batches: ShardedPyDataset) -> None:
        super().__init__()
        self.used = False
        self._batches = batches
        self._seen = 0

    def on_train_begin(self, logs: Any = None) -> None:
        """Raises PlanError where ``fit`` was told another number of steps than the epoch has."""
        steps, left = self.params.get("steps"), len(self._batches)
        if steps != left:
            raise PlanError(
                f"fit goes over the rest of the plan's epoch, {left} batches; steps_per_epoch makes it {steps}. "
                "Leave steps_per_epoch out; a callback may set model.stop_training."
            )
        self.used = BatchCounter.counting = True

    def on_train_end(self, logs: Any = None) -> None:
        BatchCounter.counting = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._seen = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        epoch = self._batches.epoch
        while self._seen <= batch and self._batches.epoch == epoch:  # several where a call of Keras makes several steps
            self._batches.take()
            self._seen += 1


def verify_epoch(loader: Any, epoch: int | None = None) -> None:
    """Check that all ranks together have read each sample of an epoch exactly once. All ranks call it, one integer
    of 64 bits is summed.

    What was read before ``resume`` counts, and so do the samples that tail ``"drop"`` leaves out.

    Args:
        loader: what ``shard_dataset`` returned.
        epoch: which epoch, one of the last 64; default: the last one that is over.

    Raises:
        StateError: on every rank, if a sample was left out or read twice; it gives the sum found and the one expected.
        PlanError: something else than a sharded loader, or no epoch is over yet.
    """
    verify_feed(loader, epoch, _add)


def _add(part: Int64s) -> Int64s:
    total = verbs.hvd.allreduce(verbs.tensor(part), op=verbs.hvd.Sum, name="hvdscale.verify_epoch")
    summed: Int64s = np.asarray(total)
    return summed


_own_table: Table | None = None  # of a worker process


def _keep(table: Table) -> None:
    global _own_table
    _own_table = table


def _fetch(samples: Int64s) -> Any:
    assert _own_table is not None
    return _own_table.fetch(samples)


def _executor(table: Table, workers: int, use_multiprocessing: bool) -> Executor | None:
    if not workers:
        return None
    if not use_multiprocessing:
        return ThreadPoolExecutor(workers, "hvdscale-data")
    fresh = multiprocessing.get_context("spawn")  # a fork of a process in which MPI runs is not safe
    return ProcessPoolExecutor(workers, fresh, _keep, (table,))


def _weighted(rows: Any, valid: np.ndarray) -> tuple[Any, Any, Any]:
    """``(x, y, weight)`` of what the data gave: its own weights or 1, and 0 where a sample is not ``valid``, [batch].

    Raises:
        PlanError: the data has no ``y``, so that Keras takes no weight, or is of more parts than Keras knows.
    """
    parts = tuple(rows) if isinstance(rows, tuple | list) else (rows,)
    if len(parts) not in (2, 3) or parts[1] is None:
        raise PlanError(
            f'Tail "pad" gives what only fills a weight of 0, which Keras takes beside (x, y); this data gives '
            f"{len(parts)} parts, {type(rows).__name__}. Give (x, y) or (x, y, weight), with zeros for y where the "
            'model has no use for it, or take tail "exact" or "drop".'
        )
    if len(parts) == 2 or parts[2] is None:
        return (*parts[:2], valid.astype(np.float32))

    def masked(weights: Any) -> np.ndarray:  # [batch] or [batch, ...]
        weights = np.asarray(weights)
        return weights * valid.reshape(-1, *(1,) * (weights.ndim - 1)).astype(weights.dtype)

    return (*parts[:2], keras.tree.map_structure(masked, parts[2]))
