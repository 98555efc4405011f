"""The examples' text: what counts as a document, which rank reads it, and what is refused."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

from lm.batches import HELD_OUT_WINDOWS, Batches, Share, Windows, load_share  # noqa: E402
from lm.flags import check_flags, parse_flags  # noqa: E402
from lm.report import Report, Scalars  # noqa: E402
from lm.text import END, make_tokenizer, read_documents  # noqa: E402

from hvdscale.data import ShardPlan  # noqa: E402
from hvdscale.errors import PlanError  # noqa: E402


def flags(*given: str) -> argparse.Namespace:
    before = sys.argv
    sys.argv = ["example", *given]
    try:
        return parse_flags("")
    finally:
        sys.argv = before


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Forty documents of 2,000 bytes, each of one letter or sign of its own."""
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(chr(33 + i) * 2000)
    return tmp_path


def share(folder: Path, rank: int, ranks: int, *given: str) -> Share:
    chosen = flags("--data", str(folder), "--context", "50", "--batch-size", "4", "--held-out", "0.2", *given)
    return load_share(chosen, rank, ranks)


def inputs_read(batches: Batches, steps: int) -> np.ndarray:
    return np.concatenate([batches[step][0] for step in range(steps)])


class TestDocuments:
    def test_by_default_python_s_own_library_is_read(self) -> None:
        documents = read_documents(None)
        assert 5e6 < sum(len(d.text) for d in documents) < 5e7
        keys = {d.key for d in documents}
        assert {"os.py", "json/decoder.py"} <= keys
        assert not any(key.startswith(("site-packages/", "test/")) for key in keys)

    def test_a_folder_is_one_document_a_file_and_what_is_not_text_is_left_out(self, tmp_path: Path) -> None:
        (tmp_path / "deep").mkdir()
        (tmp_path / ".hidden").mkdir()
        (tmp_path / "deep" / "a.txt").write_text("one")
        (tmp_path / "b.md").write_text("zwei äöü")
        (tmp_path / "empty.txt").write_text("")
        (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0")
        (tmp_path / "latin.txt").write_bytes("äöü".encode("latin-1"))
        (tmp_path / ".hidden" / "c.txt").write_text("no")
        assert [(d.key, d.text) for d in read_documents(str(tmp_path))] == [("b.md", "zwei äöü"), ("deep/a.txt", "one")]

    def test_a_file_is_cut_at_blank_lines_and_growing_moves_no_earlier_piece(self, tmp_path: Path) -> None:
        path = tmp_path / "play.txt"
        text = "".join(f"Speaker {i}\n" + "words " * 50 + "\n\n" for i in range(100))
        path.write_text(text)
        before = read_documents(str(path))
        assert "".join(d.text for d in before) == text
        assert all(d.text.endswith("\n\n") for d in before)
        path.write_text(text + "Speaker 100\n" * 2000)
        after = read_documents(str(path))
        assert after[: len(before) - 1] == before[:-1]
        assert len({d.key for d in after}) == len(after) > 5


class TestTokenizers:
    TEXTS = ("def f(x):\n    return x\n" * 200, "äöü €", "")

    def test_bytes_are_the_text(self, folder: Path) -> None:
        encoded = make_tokenizer("bytes", (), 0).encode(self.TEXTS)
        assert [bytes(e.astype(np.uint8)).decode() for e in encoded] == list(self.TEXTS)
        assert END not in np.concatenate(encoded)

    def test_byte_pairs_are_fewer_and_the_same_for_every_rank(self) -> None:
        documents = read_documents(str(Path(argparse.__file__).parent / "email"))
        one, two = (make_tokenizer("bpe", documents, 600) for _ in range(2))
        texts = [d.text for d in documents]
        assert all(np.array_equal(a, b) for a, b in zip(one.encode(texts), two.encode(texts), strict=True))
        assert one.vocabulary == 600
        tokens = np.concatenate(one.encode(texts))
        assert len(tokens) < 0.7 * sum(len(t.encode()) for t in texts)
        assert tokens.min() > END
        assert tokens.max() < 600


class TestWindows:
    def test_each_input_has_the_next_token_as_its_target(self) -> None:
        windows = Windows(np.arange(11, dtype=np.uint16), 5)
        assert len(windows) == 2
        inputs, targets = windows.read(np.array([1, 0]))
        assert inputs.tolist() == [[5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]
        assert np.array_equal(targets, inputs + 1)

    @pytest.mark.parametrize(("tokens", "context", "count"), [(0, 5, 0), (5, 5, 0), (6, 5, 1), (10, 5, 1), (11, 5, 2)])
    def test_only_whole_windows_count(self, tokens: int, context: int, count: int) -> None:
        assert len(Windows(np.zeros(tokens, np.uint16), context)) == count

    def test_an_epoch_reads_each_window_once_and_the_next_in_another_order(self) -> None:
        windows = Windows(np.arange(121, dtype=np.uint16), 5)  # 24 windows
        batches = Batches(windows, ShardPlan(24, 1, "random"), 0, 4)
        assert batches.per_epoch == 6
        first, second = inputs_read(batches, 6)[:, 0], inputs_read(batches, 12)[24:, 0]
        assert sorted(first) == sorted(second) == list(range(0, 120, 5))
        assert list(first) != list(second)
        assert np.array_equal(batches[3][0], batches[3][0])


class TestShares:
    def test_by_hash_no_document_is_on_two_ranks_nor_both_trained_on_and_held_out(self, folder: Path) -> None:
        parts = [share(folder, rank, 3) for rank in range(3)]
        trained = [set(inputs_read(p.batches, p.batches.per_epoch).ravel()) - {END} for p in parts]
        held = set(np.concatenate([p.held_out[0].ravel() for p in parts])) - {END}
        assert all(trained)
        assert sum(map(len, trained)) == len(set.union(*trained))
        assert held
        assert not held & set.union(*trained)

    def test_ordered_ranks_read_one_stretch_each_and_together_every_window(self, folder: Path) -> None:
        parts = [share(folder, rank, 3, "--shard", "ordered", "--batch-size", "1") for rank in range(3)]
        alone = share(folder, 0, 1, "--shard", "ordered", "--batch-size", "1")
        stretches = [inputs_read(p.batches, p.batches.per_epoch) for p in parts]
        everything = inputs_read(alone.batches, alone.batches.per_epoch)
        assert sorted(map(tuple, np.concatenate(stretches))) == sorted(map(tuple, everything))
        letters = [set(s.ravel()) - {END} for s in stretches]
        assert max(letters[0]) <= min(letters[1])
        assert max(letters[1]) <= min(letters[2])

    @pytest.mark.parametrize("ranks", [2, 4])
    def test_at_random_a_step_reads_the_same_windows_on_any_number_of_ranks(self, folder: Path, ranks: int) -> None:
        alone = share(folder, 0, 1, "--shard", "random", "--batch-size", "8").batches
        parts = [
            share(folder, rank, ranks, "--shard", "random", "--batch-size", str(8 // ranks)).batches
            for rank in range(ranks)
        ]
        for step in (0, 1, alone.per_epoch, 2 * alone.per_epoch + 3):
            together = np.concatenate([p[step][0] for p in parts])
            assert sorted(map(tuple, together)) == sorted(map(tuple, alone[step][0]))

    def test_evaluation_covers_the_same_windows_on_any_number_of_ranks(self, folder: Path) -> None:
        alone = share(folder, 0, 1).held_out[0]
        together = np.concatenate([share(folder, rank, 3).held_out[0] for rank in range(3)])
        assert 0 < len(alone) <= HELD_OUT_WINDOWS
        assert np.array_equal(together, alone)

    def test_the_seed_decides_what_is_read(self, folder: Path) -> None:
        one, same, other = (share(folder, 0, 2, "--seed", seed) for seed in "110")
        assert np.array_equal(one.batches[0][0], same.batches[0][0])
        assert not np.array_equal(one.batches[0][0], other.batches[0][0])


class TestRefused:
    """Every rank reads the whole text, so every rank says the same."""

    @pytest.mark.parametrize("rank", [0, 1])
    @pytest.mark.parametrize(
        ("content", "given", "message"),
        [
            (None, (), "'.*text' does not exist"),
            (b"", (), "text' is empty"),
            (b" \n\n", (), "text' is empty"),
            (b"\x7fELF\0\0\1", (), "text' is not text"),
            (b"caf\xe9", (), "text' is not text"),
            (b"a few words", (), "there are 1 to train on for 2 ranks.*--shard random"),
            (b"a few words", ("--shard", "random"), "1 are to train on and 0 held out"),
            (b"words and\n\n" * 20000, ("--batch-size", "9999"), r"--batch-size is 9999, and rank 0 of 2 has \d+ win"),
            (b"words and\n\n" * 20000, ("--tokenizer", "words"), "'bytes' or 'bpe'; it is 'words'"),
            (b"words and\n\n" * 20000, ("--tokenizer", "bpe", "--vocabulary", "70000"), "512..65536; it is 70000"),
        ],
    )
    def test_text(self, tmp_path: Path, rank: int, content: bytes | None, given: tuple, message: str) -> None:
        path = tmp_path / "text"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(PlanError, match=message):
            load_share(flags("--data", str(path), *given), rank, 2)

    def test_a_folder_without_text(self, tmp_path: Path) -> None:
        (tmp_path / "a.bin").write_bytes(b"\0\1")
        with pytest.raises(PlanError, match="1 file in this folder, none of them text"):
            read_documents(str(tmp_path))

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (("--steps", "0"), "--steps must be at least 1; it is 0"),
            (("--batch-size", "-2"), "--batch-size must be at least 1; it is -2"),
            (("--heads", "3"), "they are 256 and 3"),
            (("--warmup", "300"), "0..steps-1; it is 300 of 300"),
            (("--held-out", "1"), "between 0 and 1; it is 1"),
            (("--seed", "-1"), "--seed must be at least 0; it is -1"),
            (("--lr", "nan"), "--lr must be a number above 0; it is nan"),
        ],
    )
    def test_numbers(self, given: tuple[str, ...], message: str) -> None:
        with pytest.raises(PlanError, match=message):
            check_flags(flags(*given))


class TestReport:
    def test_held_out_loss_is_weighted_by_tokens(self) -> None:
        other_rank = np.array([3.0 * 900, 900])  # the other rank's loss times tokens, and tokens
        report = Report(1, 2, 10, 5, lambda values: (values + other_rank) / 2)
        report.evaluated(loss=1.0, tokens=100)
        assert report.held_out == {0: pytest.approx(2.8)}

    def test_a_rank_without_held_out_text_weighs_nothing(self) -> None:
        report = Report(1, 2, 10, 5, lambda values: (values + np.array([3.0 * 900, 900])) / 2)
        report.evaluated(loss=0.0, tokens=0)
        assert report.held_out == {0: pytest.approx(3.0)}

    def test_training_losses_are_averaged_over_ranks_once(self) -> None:
        report = Report(1, 2, 10, 5, lambda values: values + 1)
        for loss in (1.0, 2.0):
            report.step(loss)
        report.evaluated(1.0, 10)
        report.step(3.0)
        report.evaluated(1.0, 10)
        assert report.train == [2.0, 3.0, 4.0]

    def test_scalars_are_records_tensorboard_reads(self, tmp_path: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New

        scalars = Scalars(str(tmp_path / "runs" / "lm"))
        scalars.write("loss", 2.5, 7)
        scalars.close()
        (path,) = (tmp_path / "runs" / "lm").iterdir()
        reader = PyRecordReader_New(str(path))
        events = []
        for _ in range(2):
            reader.GetNext()
            events.append(Event.FromString(reader.record()))
        assert events[0].file_version == "brain.Event:2"
        assert [(events[1].step, v.tag, v.simple_value) for v in events[1].summary.value] == [(7, "loss", 2.5)]
