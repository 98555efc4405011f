"""Which text each rank of the language model examples trains on, and is evaluated on."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hvdscale.data import ShardPlan, split
from hvdscale.errors import PlanError
from lm.text import END, Document, make_tokenizer, read_documents

# Held-out text is evaluated again and again: a random sample of it, the same on every rank and in every evaluation.
HELD_OUT_WINDOWS = 512


@dataclass(frozen=True)
class Windows:
    """A stream of tokens in windows of ``context`` inputs, each input with the token that follows as its target."""

    tokens: np.ndarray  # uint16[tokens]
    context: int

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.context)

    def read(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int32[len(windows), context] each."""
        places = windows[:, None] * self.context + np.arange(self.context + 1)  # [windows, context + 1]
        tokens = self.tokens[places].astype(np.int32)
        return tokens[:, :-1], tokens[:, 1:]


class Batches:
    """One shard's training batches, without end: ``batches[step]``, each epoch in a new order.

    All shards of the plan have as many batches in an epoch; windows that fill no whole batch are left out of it.
    """

    def __init__(self, windows: Windows, plan: ShardPlan, shard: int, batch_size: int) -> None:
        self.per_epoch = plan.n // (plan.shards * batch_size)
        self._windows, self._plan, self._shard, self._batch_size = windows, plan, shard, batch_size
        self._epoch, self._order = 0, plan.indices(shard)

    def __getitem__(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._plan.indices(self._shard, epoch)
        return self._windows.read(self._order[place * self._batch_size : (place + 1) * self._batch_size])


@dataclass(frozen=True)
class Share:
    """What one rank trains and is evaluated on."""

    batches: Batches
    held_out: tuple[np.ndarray, np.ndarray]  # inputs and targets, int32[windows, context]; may be no window
    vocabulary: int
    description: str
    digest: bytes  # 16, of the whole text


def load_share(flags: argparse.Namespace, rank: int, ranks: int) -> Share:
    """Read the text, hold some documents out, and give this rank its share of the others.

    ``flags.shard`` is the policy. ``"hash"``: each document goes to the rank its name hashes to. ``"ordered"``: each
    rank has one contiguous stretch of the text. ``"random"``: all windows in one random order, dealt out in turn,
    so that ``k`` ranks with batches of ``B`` take the steps of one rank with ``k * B``.
    Every rank reads all documents, so the same error meets all of them where they have the same files.

    Raises:
        PlanError: data that is missing, empty or not text, or too little of it for these ranks and batches.
    """
    context, seed = flags.context, flags.seed
    documents = read_documents(flags.data)
    tokenizer = make_tokenizer(flags.tokenizer, documents, flags.vocabulary)
    keys = [document.key for document in documents]
    train, held = split(keys, (1 - flags.held_out, flags.held_out), salt=seed)
    if flags.shard == "hash" and len(train) < ranks:
        raise PlanError(
            f"Each rank needs a document; there are {len(train)} to train on for {ranks} ranks. "
            "Use fewer ranks, more text, or --shard random."
        )
    if not len(train) or not len(held):
        raise PlanError(
            f"Training and evaluation need a document each; of {len(documents)}, {len(train)} are to train on and "
            f"{len(held)} held out. Give more text, or another --held-out (now {flags.held_out:g})."
        )
    streams = [np.append(stream, np.uint16(END)) for stream in tokenizer.encode([d.text for d in documents])]
    shards = _share_out([streams[i] for i in train], [keys[i] for i in train], flags.shard, ranks, context, seed)
    _check_sizes(shards, flags.batch_size, context)
    windows, plan = shards[rank]
    return Share(
        Batches(windows, plan, rank if plan.shards > 1 else 0, flags.batch_size),
        _held_out([streams[i] for i in held], rank, ranks, context, seed),
        tokenizer.vocabulary,
        f"{len(documents)} documents, {len(held)} of them held out; "
        f"{sum(len(streams[i]) for i in train) / 1e6:.2f} M tokens to train on",
        _digest(documents),
    )


def _digest(documents: Sequence[Document]) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for document in documents:
        digest.update(f"{document.key}\0{document.text}\0".encode())
    return digest.digest()


def _share_out(
    streams: Sequence[np.ndarray], keys: Sequence[str], shard: str, ranks: int, context: int, seed: int
) -> list[tuple[Windows, ShardPlan]]:
    """For each rank the windows it reads from, and the plan that orders them."""
    if shard == "hash":
        documents = ShardPlan(len(keys), ranks, "hash", keys=keys, seed=seed)
        mine = [Windows(_join([streams[i] for i in documents.indices(r)]), context) for r in range(ranks)]
        return [(windows, ShardPlan(len(windows), 1, "random", seed=seed)) for windows in mine]
    everything = Windows(_join(streams), context)
    plan = ShardPlan(len(everything), ranks, shard, seed=seed)
    if shard == "random":
        return [(everything, plan)] * ranks
    stretches = [plan.indices(r) for r in range(ranks)]
    mine = [
        Windows(everything.tokens[s[0] * context : (s[-1] + 1) * context + 1], context) for s in stretches if len(s)
    ]
    mine += [Windows(_join([]), context)] * (ranks - len(mine))
    return [(windows, ShardPlan(len(windows), 1, "random", seed=seed)) for windows in mine]


def _check_sizes(shards: Sequence[tuple[Windows, ShardPlan]], batch_size: int, context: int) -> None:
    sizes = [plan.n // plan.shards for _, plan in shards]
    if min(sizes) < batch_size:
        rank = sizes.index(min(sizes))
        raise PlanError(
            f"A batch cannot be larger than the data: --batch-size is {batch_size}, and rank {rank} of {len(sizes)} "
            f"has {sizes[rank]} windows of {context} tokens. Use a smaller batch or context, fewer ranks, or more text."
        )


def _held_out(
    streams: Sequence[np.ndarray], rank: int, ranks: int, context: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    windows = Windows(_join(streams), context)
    sample = ShardPlan(len(windows), 1, "random", seed=seed).indices(0)[:HELD_OUT_WINDOWS]
    return windows.read(sample[ShardPlan(len(sample), ranks, "ordered").indices(rank)])


def _join(streams: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.uint16), *streams])
