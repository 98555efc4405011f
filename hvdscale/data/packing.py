"""Packing documents of many lengths into blocks of one length, for training language models."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import xxhash

from hvdscale.data.best_fit import best_fit
from hvdscale.data.checks import array, integer, numbers_below, one_of
from hvdscale.data.lengths import check_lengths
from hvdscale.data.types import Int64s
from hvdscale.errors import PlanError

__all__ = ["PackMethod", "Packing", "PackingReport", "Pieces", "pack"]

PackMethod = Literal["best-fit", "chop"]

_LONGEST_BLOCK = 2**30
_MOST_TOKENS = 2**62
_MOST_BLOCKS = 2**31  # what describes their pieces takes 40 bytes a block and more

Int32s = npt.NDArray[np.int32]


class Pieces(NamedTuple):
    """Pieces of documents, int64[pieces] each: ``length`` tokens of ``document`` from its token ``offset`` on
    lie in the block from ``position`` on."""

    document: Int64s
    offset: Int64s
    length: Int64s
    position: Int64s


@dataclass(frozen=True)
class PackingReport:
    """What a packing costs. ``waste`` is the share of padding in all blocks, 0 .. 1."""

    documents: int
    tokens: int
    blocks: int
    block: int
    pieces: int
    split_documents: int
    waste: float

    def __str__(self) -> str:
        return (
            f"{self.documents} documents, {self.tokens} tokens -> {self.blocks} blocks of {self.block}\n"
            f"waste {self.waste:.2%} (padding); {self.split_documents} documents split; {self.pieces} pieces"
        )


@dataclass(frozen=True, eq=False)
class Packing:
    """Blocks of ``block`` tokens and the pieces of documents in them, as made by ``pack``.

    The pieces of block ``b`` are rows ``starts[b] .. starts[b + 1] - 1`` of ``pieces``. They lie one behind
    another from position 0; padding follows the last. Blocks are the samples of a ``ShardPlan(len(packing), ...)``.
    Arrays are read-only.
    """

    block: int
    starts: Int64s = field(repr=False)
    pieces: Pieces = field(repr=False)
    first_token: Int64s = field(repr=False)
    """int64[documents + 1]: where each document starts in the tokens of all documents, one behind another."""

    def __post_init__(self) -> None:
        for part in (self.starts, *self.pieces, self.first_token):
            part.flags.writeable = False

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def digest(self) -> str:
        """A hash of the whole packing, the same on every machine; ranks with equal digests read equal blocks."""
        digest = xxhash.xxh3_64(f"pack-v1 {self.block} {len(self)} {len(self.first_token)}".encode())
        for part in (self.starts, *self.pieces):
            digest.update(part.astype("<i8").tobytes())
        return digest.hexdigest()

    def report(self) -> PackingReport:
        """How much is padding, and how many documents are split."""
        tokens, room = int(self.first_token[-1]), len(self) * self.block
        return PackingReport(
            documents=len(self.first_token) - 1,
            tokens=tokens,
            blocks=len(self),
            block=self.block,
            pieces=len(self.pieces.document),
            split_documents=int(np.count_nonzero(np.bincount(self.pieces.document) > 1)),
            waste=1 - tokens / room if room else 0.0,
        )

    def pieces_of(self, block: int) -> Pieces:
        """The pieces in one block, in the order in which they lie there."""
        b = integer("block", block, 0, len(self) - 1)
        return Pieces(*(part[self.starts[b] : self.starts[b + 1]] for part in self.pieces))

    def places(self, blocks: npt.ArrayLike) -> Int64s:
        """Where each token of these blocks is in the tokens of all documents: int64[..., block], -1 for padding.

        Raises:
            PlanError: a block that is no integer in ``0 .. len(self) - 1``. So for all that take ``blocks``.
        """
        rows = self._rows(blocks)
        first = self.first_token[rows.pieces.document] + rows.pieces.offset  # [pieces]
        return rows.spread(first[rows.piece] + rows.within, -1, np.int64)

    def read(self, tokens: npt.NDArray[Any], blocks: npt.ArrayLike, padding: float = 0) -> npt.NDArray[Any]:
        """The tokens of these blocks: [..., block], of the dtype of ``tokens``.

        ``tokens`` are those of all documents, one behind another: [sum of lengths]; a memory map will do.

        Raises:
            PlanError: tokens that are no numbers or not those packed, or padding that is none of their dtype.
        """
        tokens = array("Tokens", tokens)
        padding = _padding(padding, tokens.dtype)
        if np.shape(tokens) != (int(self.first_token[-1]),):
            raise PlanError(
                f"The documents packed have {self.first_token[-1]} tokens in one vector; "
                f"these tokens have shape {np.shape(tokens)}."
            )
        rows = self._rows(blocks)
        first = self.first_token[rows.pieces.document] + rows.pieces.offset
        return rows.spread(tokens[first[rows.piece] + rows.within], padding, tokens.dtype)

    def segment_ids(self, blocks: npt.ArrayLike) -> Int32s:
        """int32[..., block]: 1 for tokens of a block's first piece, 2 for its second, ...; 0 for padding.

        Tokens attend to one another where their segment ids are equal.
        """
        rows = self._rows(blocks)
        return rows.spread(rows.number[rows.piece] + 1, 0, np.int32)

    def position_ids(self, blocks: npt.ArrayLike) -> Int32s:
        """int32[..., block]: the place of a token within its piece, from 0; 0 for padding."""
        rows = self._rows(blocks)
        return rows.spread(rows.within, 0, np.int32)

    def cu_seqlens(self, blocks: npt.ArrayLike) -> Int32s:
        """int32[segments + 1]: borders of segments in these blocks laid end to end, as variable-length attention
        kernels take them. The padding of a block is a segment of its own.

        Raises:
            PlanError: as ``places``; or more tokens than int32 counts.
        """
        rows = self._rows(blocks)
        if rows.count * self.block > np.iinfo(np.int32).max:
            raise PlanError(f"{rows.count} blocks of {self.block} tokens are more than int32 counts. Take fewer.")
        starts = rows.row * self.block + rows.pieces.position
        borders = np.arange(rows.count + 1) * self.block
        return np.unique(np.concatenate([borders, starts, starts + rows.pieces.length])).astype(np.int32)

    def _rows(self, blocks: npt.ArrayLike) -> _Rows:
        wanted = numbers_below("Blocks", blocks, len(self))
        flat = wanted.ravel()
        row, number = _runs(self.starts[flat + 1] - self.starts[flat])
        pieces = Pieces(*(part[self.starts[flat][row] + number] for part in self.pieces))
        return _Rows(self.block, wanted.shape, row, number, pieces, *_runs(pieces.length))


@dataclass(frozen=True)
class _Rows:
    """Some blocks, a row each, with their pieces and tokens in flat arrays."""

    block: int
    shape: tuple[int, ...]
    row: Int64s  # [pieces]
    number: Int64s  # [pieces], of a piece within its block
    pieces: Pieces
    piece: Int64s  # [tokens], the piece a token is of
    within: Int64s  # [tokens], its place in that piece

    @property
    def count(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def spread(self, values: npt.NDArray[Any], padding: float, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """``values[tokens]`` in their blocks: [*shape, block]."""
        out = np.full(self.count * self.block, padding, dtype)
        out[(self.row * self.block + self.pieces.position)[self.piece] + self.within] = values
        return out.reshape(*self.shape, self.block)


def _padding(padding: Any, dtype: np.dtype[Any]) -> Any:
    """``padding``, checked to be a number that tokens of this dtype can be."""
    if dtype.kind in "iu":
        return integer("padding", padding, int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
    if dtype.kind not in "bf":
        raise PlanError(f"Tokens are numbers; these are {dtype}. Give their numbers in the vocabulary.")
    largest = 1.0 if dtype.kind == "b" else float(np.finfo(dtype).max)
    number = isinstance(padding, int | float | np.number | np.bool_)
    if not number or largest < abs(padding) < math.inf:
        raise PlanError(f"padding must be a number, such as tokens of {dtype} can be; it is {padding!r:.80}.")
    return padding


def _runs(lengths: Int64s) -> tuple[Int64s, Int64s]:
    """For each element of runs one behind another: which run it is in, and its place there."""
    run = np.repeat(np.arange(len(lengths)), lengths)
    return run, np.arange(len(run)) - (np.cumsum(lengths) - lengths)[run]


def pack(lengths: npt.ArrayLike, block: int, method: PackMethod = "best-fit") -> Packing:
    """Pack documents into blocks of ``block`` tokens. Equal arguments give equal blocks on every rank and machine.

    Pack once and shard the blocks: ``packing = pack(lengths, 2048)``, ``plan = ShardPlan(len(packing), ranks)``,
    ``packing.read(tokens, batch)`` for each batch of the plan. To keep documents on their shards, pack
    ``lengths[plan.indices(shard)]`` instead. For targets shifted by one token use blocks of context + 1.

    Args:
        lengths: int[documents], tokens of each document, its end token included. Empty ones are in no block.
        block: tokens of a block.
        method: ``"best-fit"`` keeps documents whole. Only one longer than a block is split: into full blocks and
            a rest, which is packed like any other. ``"chop"`` lays all documents end to end and cuts every
            ``block`` tokens: padding in the last block only, documents cut wherever a block ends.

    Raises:
        PlanError: lengths that are no integers from 0, or another argument out of its range.
    """
    block = integer("block", block, 1, _LONGEST_BLOCK)
    one_of("method", method, get_args(PackMethod))
    given = array("Lengths", lengths)
    checked = check_lengths(given, _MOST_TOKENS // max(1, given.size))
    blocks = int((-(-checked // block)).sum())
    if blocks > _MOST_BLOCKS:
        raise PlanError(f"A packing has at most {_MOST_BLOCKS} blocks; these would fill {blocks} of {block} tokens.")
    first_token = np.concatenate([np.zeros(1, np.int64), np.cumsum(checked)])  # [documents + 1]
    return (_pack_whole if method == "best-fit" else _chop)(checked, block, first_token)


def _pack_whole(lengths: Int64s, block: int, first_token: Int64s) -> Packing:
    document, number = _runs(-(-lengths // block))
    offset = number * block
    length = np.minimum(lengths[document] - offset, block)
    opened = best_fit(length, block)
    # Pieces are in source order; so are then the pieces of a block, and the blocks by their first piece.
    first_piece = np.full(int(opened.max(initial=-1)) + 1, len(opened), np.int64)
    np.minimum.at(first_piece, opened, np.arange(len(opened)))
    number_of = np.empty_like(first_piece)
    number_of[np.argsort(first_piece)] = np.arange(len(first_piece))
    block_of = number_of[opened]
    order = np.argsort(block_of, kind="stable")
    starts = np.searchsorted(block_of[order], np.arange(len(first_piece) + 1))
    length = length[order]
    position = np.cumsum(length) - length
    position -= position[starts[:-1]][block_of[order]] if len(order) else 0
    return Packing(block, starts, Pieces(document[order], offset[order], length, position), first_token)


def _chop(lengths: Int64s, block: int, first_token: Int64s) -> Packing:
    total = int(first_token[-1])
    cuts = np.arange(0, total, block)
    edges = np.union1d(first_token[:-1][lengths > 0], cuts)  # [pieces], where a document or a block starts
    document = np.searchsorted(first_token, edges, side="right") - 1
    length = np.diff(edges, append=total)
    starts = np.append(np.searchsorted(edges, cuts), len(edges))
    pieces = Pieces(document, edges - first_token[document], length, edges % block)
    return Packing(block, starts, pieces, first_token)
