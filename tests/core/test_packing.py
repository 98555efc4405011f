"""pack: every token in exactly one place, documents whole where they fit, little waste on real text."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdscale.data import Packing, ShardPlan, pack
from hvdscale.errors import PlanError
from tests.core.real_text import document_lengths

METHODS = ("best-fit", "chop")
GOLDEN = ["054303f1590de46c", "9ae62692814dba27"]  # digests of pack-v1
SOME = ([3, 5, 2, 7, 0, 12, 1], 6)


def bins_of_plain_best_fit(lengths: list[int], room: int) -> list[int]:
    """The rooms left by best-fit decreasing as the textbook has it, one piece at a time; sorted."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, left in enumerate(rooms) if left >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(room - length)
    return sorted(rooms)


def assert_exact(packing: Packing, lengths: list[int]) -> None:
    """Every token of every document lies in exactly one place, pieces in a row from position 0."""
    tokens = np.arange(sum(lengths)) + 1
    everything = packing.read(tokens, np.arange(len(packing)), padding=0)
    assert everything.shape == (len(packing), packing.block)
    assert np.array_equal(np.sort(everything[everything > 0]), tokens)
    for b in range(len(packing)):
        pieces = packing.pieces_of(b)
        assert np.array_equal(pieces.position, np.cumsum(pieces.length) - pieces.length)
        assert pieces.length.min() >= 1
        assert pieces.length.sum() <= packing.block
        assert (np.diff(pieces.document) >= 0).all(), "source order within a block"


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(0, 60), max_size=60), block=st.integers(1, 40), method=st.sampled_from(METHODS))
def test_every_token_is_in_exactly_one_place(lengths: list[int], block: int, method: str) -> None:
    assert_exact(pack(lengths, block, method), lengths)


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), max_size=80))
def test_best_fit_fills_blocks_as_the_textbook_does(lengths: list[int]) -> None:
    packing = pack(lengths, 40)
    filled = np.bincount(np.repeat(np.arange(len(packing)), np.diff(packing.starts)), packing.pieces.length)
    assert sorted((40 - filled).tolist()) == bins_of_plain_best_fit(lengths, 40)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(0, 100), max_size=50), block=st.integers(1, 60))
def test_best_fit_splits_only_what_is_longer_than_a_block(lengths: list[int], block: int) -> None:
    pieces = pack(lengths, block).pieces
    number = np.bincount(pieces.document, minlength=len(lengths))
    assert number.tolist() == [-(-length // block) for length in lengths]


@pytest.mark.parametrize("total", [0, 1, 5, 6, 7, 30, 31])
def test_chop_pads_the_last_block_only(total: int) -> None:
    lengths = [2] * (total // 2) + [1] * (total % 2)
    packing = pack(lengths, 6, "chop")
    assert len(packing) == -(-total // 6)
    padding = packing.segment_ids(np.arange(len(packing))) == 0
    assert padding.sum() == -total % 6
    assert not padding[:-1].any()


def test_a_block_in_full() -> None:
    packing = pack(*SOME)
    at = next(b for b in range(len(packing)) if 0 in packing.pieces_of(b).document)
    assert packing.pieces_of(at).document.tolist() == [0, 2, 3]
    assert packing.pieces_of(at).offset.tolist() == [0, 0, 6]
    assert packing.segment_ids(at).tolist() == [1, 1, 1, 2, 2, 3]
    assert packing.position_ids(at).tolist() == [0, 1, 2, 0, 1, 0]
    assert packing.places(at).tolist() == [0, 1, 2, 8, 9, 16]
    assert packing.cu_seqlens(at).tolist() == [0, 3, 5, 6]


def test_padding_is_marked_in_every_view() -> None:
    packing = pack([4], 6)
    assert packing.read(np.array([9, 8, 7, 6], np.uint16), [0], padding=99).tolist() == [[9, 8, 7, 6, 99, 99]]
    assert packing.places([0]).tolist() == [[0, 1, 2, 3, -1, -1]]
    assert packing.segment_ids([0]).tolist() == [[1, 1, 1, 1, 0, 0]]
    assert packing.position_ids([0]).tolist() == [[0, 1, 2, 3, 0, 0]]
    assert packing.cu_seqlens([0, 0]).tolist() == [0, 4, 6, 10, 12]


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 2)])
def test_blocks_of_any_shape(shape: tuple[int, ...]) -> None:
    packing = pack(*SOME)
    blocks = np.arange(int(np.prod(shape))).reshape(shape) % len(packing)
    for view, dtype in ((packing.segment_ids, np.int32), (packing.position_ids, np.int32), (packing.places, np.int64)):
        got = view(blocks)
        assert got.shape == (*shape, packing.block)
        assert got.dtype == dtype
        one_by_one = [view(b) for b in blocks.ravel()]
        assert np.array_equal(got.reshape(-1, packing.block), np.reshape(one_by_one, (-1, packing.block)))


def test_tokens_keep_their_dtype() -> None:
    assert np.isnan(pack([3], 4).read(np.zeros(3, np.float16), [0], padding=math.nan)[0, 3])
    assert pack([3], 4).read(np.zeros(3, bool), [0], padding=True).tolist() == [[False] * 3 + [True]]
    assert pack([3], 4).read(np.zeros(3, np.uint16), [0]).dtype == np.uint16


class TestRealText:
    @pytest.mark.parametrize("block", [256, 512, 1024, 2048, 4096, 8192, 32768])
    @pytest.mark.parametrize("method", METHODS)
    def test_waste_is_at_most_two_percent(self, block: int, method: str) -> None:
        report = pack(document_lengths(), block, method).report()
        assert report.waste <= 0.02
        assert report.waste == pytest.approx(1 - document_lengths().sum() / (report.blocks * block))

    def test_one_document_a_block_would_waste_far_more(self) -> None:
        lengths = document_lengths()
        blocks = int((-(-lengths // 8192)).sum())
        assert 1 - lengths.sum() / (blocks * 8192) > 0.15

    def test_fewer_documents_are_split_than_by_chopping(self) -> None:
        whole, chopped = (pack(document_lengths(), 32768, method).report() for method in METHODS)
        assert whole.split_documents < chopped.split_documents / 2


class TestWithPlans:
    def test_blocks_are_the_samples_of_a_plan(self) -> None:
        lengths = document_lengths()
        tokens = np.arange(lengths.sum())
        packing = pack(lengths, 4096)
        plan = ShardPlan(len(packing), 3, "random", seed=1)
        read = [packing.read(tokens, plan.indices(shard), padding=-1) for shard in range(3)]
        together = np.concatenate([r[r >= 0] for r in read])
        assert np.array_equal(np.sort(together), tokens)

    def test_documents_stay_on_their_shards_when_packed_after_sharding(self) -> None:
        lengths = document_lengths()
        plan = ShardPlan(len(lengths), 2, "hash")
        packed = [pack(lengths[plan.indices(shard)], 4096).report() for shard in range(2)]
        assert sum(report.tokens for report in packed) == lengths.sum()
        assert all(report.waste < 0.02 for report in packed)


class TestAgreement:
    def test_the_format_does_not_change(self) -> None:
        assert [pack([i * 37 % 101 for i in range(999)], 128, m).digest for m in METHODS] == GOLDEN

    @pytest.mark.parametrize(
        ("lengths", "block"), [([5, 3, 2, 7, 0, 12, 1], 6), ([3, 5, 2, 7, 0, 12, 1], 7), (SOME[0] + [0], 6)]
    )
    def test_another_packing_has_another_digest(self, lengths: list[int], block: int) -> None:
        assert pack(lengths, block).digest != pack(*SOME).digest

    def test_the_arrays_are_read_only(self) -> None:
        packing = pack(*SOME)
        with pytest.raises(ValueError, match="read-only"):
            packing.pieces.length[0] = 1


def test_the_report_reads_well() -> None:
    assert str(pack([4, 9], 6).report()) == (
        "2 documents, 13 tokens -> 3 blocks of 6\nwaste 27.78% (padding); 1 documents split; 3 pieces"
    )


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_packs_into_no_block(lengths: list[int], method: str) -> None:
    packing = pack(lengths, 8, method)
    assert len(packing) == 0
    assert packing.report().waste == 0
    assert packing.segment_ids([]).shape == (0, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([3, -1], 8), r"Lengths lie in 0\.\.\d+; sample 1 has -1"),
        (([2**62, 2**62], 8), r"Lengths lie in 0\.\.\d+; sample 0 has 4611686018427387904"),
        (([1.5], 8), "Lengths are integers, in tokens; these are float64"),
        ((["a"], 8), "Lengths are integers"),
        (([[1, 2]], 8), r"a vector. These have shape \(1, 2\)"),
        (([[1], [2, 3]], 8), "Lengths are one array; these lists are of unequal length"),
        (([10**15], 4), "at most 2147483648 blocks; these would fill 250000000000000 of 4 tokens"),
        (([1], 0), "block must be an integer in 1..1073741824; it is 0"),
        (([1], True), "block must be an integer"),
        (([1], 8, "first-fit"), "method is one of 'best-fit', 'chop'; it is 'first-fit'"),
    ],
)
def test_bad_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        pack(*arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.segment_ids([0, 9]), r"Blocks lie in 0\.\.4; these go from 0 to 9"),
        (lambda p: p.places(-1), r"Blocks lie in 0\.\.4; these go from -1 to -1"),
        (lambda p: p.position_ids([0.5]), "Blocks are integers"),
        (lambda p: p.pieces_of(5), r"block must be an integer in 0\.\.4; it is 5"),
        (
            lambda p: p.read(np.zeros(30, np.uint16), [0], padding=-1),
            r"padding must be an integer in 0\.\.65535; it is -1",
        ),
        (lambda p: p.read(np.zeros(30, int), [0], padding="x"), "padding must be an integer in .*; it is 'x'"),
        (lambda p: p.read(np.zeros(30), [0], padding="x"), "such as tokens of float64 can be; it is 'x'"),
        (lambda p: p.read(np.zeros(30), [0], padding=[0.0, 1.0]), r"it is \[0\.0, 1\.0\]"),
        (lambda p: p.read(np.zeros(30, np.float16), [0], padding=1e9), "tokens of float16 can be; it is 1000000000.0"),
        (lambda p: p.read(np.zeros(30, bool), [0], padding=2), "tokens of bool can be; it is 2"),
        (lambda p: p.read(np.full(30, "a"), [0]), "Tokens are numbers; these are <U1"),
        (lambda p: p.read(np.zeros(29), [0]), r"have 30 tokens in one vector; these tokens have shape \(29,\)"),
    ],
)
def test_bad_blocks_and_tokens(call: object, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        call(pack(*SOME))  # type: ignore[operator]


def test_a_packing_compares_by_its_digest_not_by_its_arrays() -> None:
    assert pack(*SOME) != pack(*SOME)
    assert pack(*SOME).digest == pack(*SOME).digest
