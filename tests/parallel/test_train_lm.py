"""The main job on real ranks: one script, two frameworks, the same losses whatever the number of ranks."""

import fcntl
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hvdscale.runtime.trace import merge, spent
from tests.launcher import Finished, launch

MODEL = ("--layers", "2", "--width", "32", "--heads", "2", "--context", "32")
STEPS = ("--steps", "50", "--warmup", "5", "--eval-every", "25")
DEADLINE_SECONDS = 400
BACKENDS = ("torch", "tensorflow")


def train(
    script: str,
    *flags: str,
    backend: str = "torch",
    ranks: int = 2,
    launcher: str = "mpirun",
    timeline: Path | None = None,
) -> Finished:
    return launch(
        [f"examples/{script}.py", *MODEL, *STEPS, *flags],
        ranks=ranks,
        launcher=launcher,
        env={"KERAS_BACKEND": backend} | ({"HVDSCALE_TIMELINE": str(timeline)} if timeline else {}),
        deadline_seconds=DEADLINE_SECONDS,
    )


Losses = Callable[..., tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="session")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """By backend and number of ranks: training losses float64[50], held-out losses float64[3]; the global batch is 8.

    Each run is made once for all tests, in whatever lanes they are: the first to ask makes it, and others wait.
    """
    own = tmp_path_factory.getbasetemp()
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def of(backend: str, ranks: int, run: int = 0) -> tuple[np.ndarray, np.ndarray]:
        record = folder / f"losses-{backend}-{ranks}-{run}.json"
        with open(f"{record}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not record.exists():
                flags = ("--shard", "random", "--batch-size", str(8 // ranks), "--record", str(record))
                launcher = "mpirun" if ranks > 1 else "alone"
                train("train_lm", *flags, backend=backend, ranks=ranks, launcher=launcher).check()
        recorded = json.loads(record.read_text())
        return np.array(recorded["train"]), np.array(list(recorded["held_out"].values()))

    return of


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ranks_equal_one_with_twice_the_batch(losses: Losses, backend: str) -> None:
    for together, alone in zip(losses(backend, 2), losses(backend, 1), strict=True):
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-4)
    assert alone[-1] < alone[0] - 0.5


@pytest.mark.parametrize("ranks", [1, 2])
def test_both_frameworks_follow_the_same_curve(losses: Losses, ranks: int) -> None:
    for one, other in zip(losses("torch", ranks), losses("tensorflow", ranks), strict=True):
        assert len(one) in (50, 3)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-3)


def test_a_pipeline_of_two_ranks_follows_one_rank(tmp_path: Path) -> None:
    """The same text, the same batches of 8: the curve of one process, from a model that no rank holds whole."""
    record, alone = tmp_path / "losses.json", tmp_path / "alone.json"
    common = ("--shard", "random", "--batch-size", "8", "--record")
    output = train("pipeline_lm", *common, str(record), "--microbatches", "3").check()
    assert re.search(r"of [\d,]+ parameters on rank 0: 0\.[3-7]", output)
    train("torch_lm", *common, str(alone), ranks=1, launcher="alone").check()
    one, other = (np.array(json.loads(path.read_text())["train"]) for path in (record, alone))
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_stages_of_keras_layers_follow_one_rank(losses: Losses, backend: str, tmp_path: Path) -> None:
    """By fit: training and evaluation, of micro-batches of unequal size."""
    record = tmp_path / "losses.json"
    flags = ("--pp", "2", "--microbatches", "3", "--shard", "random", "--batch-size", "8", "--record", str(record))
    train("train_lm", *flags, backend=backend).check()
    recorded = json.loads(record.read_text())
    for found, alone in zip((recorded["train"], [*recorded["held_out"].values()]), losses(backend, 1), strict=True):
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("backend", "update"), [("torch", "central"), ("tensorflow", "sharded")])
def test_where_updates_are_made_changes_no_loss(losses: Losses, backend: str, update: str, tmp_path: Path) -> None:
    record = tmp_path / "losses.json"
    flags = ("--update", update, "--shard", "random", "--batch-size", "4", "--record", str(record))
    train("train_lm", *flags, backend=backend).check()
    recorded = json.loads(record.read_text())
    local = losses(backend, 2)
    for found, wanted in zip((recorded["train"], [*recorded["held_out"].values()]), local, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("script", "backend"), [("torch_lm", "torch"), ("train_lm", "tensorflow")])
def test_ranks_that_do_not_wait_for_each_other_learn(script: str, backend: str) -> None:
    flags = ("--sync", "async", "--staleness", "4", "--batch-size", "4")
    output = train(script, *flags, backend=backend).check()
    before, after = map(float, re.search(r"held-out loss +([\d.]+) before, ([\d.]+) after 50 steps", output).groups())
    assert after < before - 0.5
    assert int(re.search(r"agreement +(\d+) rounds, [\d.]+ MB sent", output).group(1)) == 50


def test_the_same_seed_gives_the_same_losses(losses: Losses) -> None:
    for one, again in zip(losses("torch", 1), losses("torch", 1, run=1), strict=True):
        assert np.array_equal(one, again)


@pytest.mark.parametrize(
    ("script", "backend", "launcher", "flags"),
    [
        ("train_lm", "tensorflow", "horovodrun", ("--tp", "2")),
        ("torch_lm", "torch", "mpirun", ("--tp", "2")),
        (
            *("train_lm", "torch", "mpirun"),
            (
                "--tokenizer",
                "bpe",
                "--vocabulary",
                "600",
                "--lr",
                "3e-3",
                "--sync",
                "local-sgd",
                "--every",
                "5",
                "--wire",
                "int8",
            ),
        ),
        (
            *("torch_lm", "torch", "mpirun"),
            ("--sync", "diloco", "--every", "5", "--fragments", "2", "--overlap", "2", "--outer-momentum", "0.5"),
        ),
        (
            *("tensorflow_lm", "tensorflow", "mpirun"),
            ("--shard", "ordered", "--sync", "slowmo", "--every", "post-local:10,5", "--sync-warmup", "5"),
        ),
    ],
    ids=[
        "keras on tensorflow, tp",
        "torch, tp",
        "keras on torch, bpe, local SGD",
        "torch, DiLoCo",
        "tensorflow, SlowMo",
    ],
)
def test_learns_and_reports(script: str, backend: str, launcher: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    plot, logs, record = tmp_path / "loss.png", tmp_path / "logs", tmp_path / "losses.json"
    rounds = "--sync" in flags
    output = train(
        script,
        *(*flags, "--batch-size", "4", "--plot", str(plot), "--logdir", str(logs), "--record", str(record)),
        backend=backend,
        launcher=launcher,
        timeline=tmp_path / "trace.json" if rounds else None,
    ).check()
    assert re.search(r"2 ranks on (Keras|PyTorch|TensorFlow) \d", output)
    assert re.search(r"[\d,]{6,} parameters; \d+ documents, \d+ of them held out; [\d.]+ M tokens", output)
    per_rank, in_all = re.search(r"speed +([\d,]+) tokens/s per rank, ([\d,]+) tokens/s in all", output).groups()
    assert int(in_all.replace(",", "")) == pytest.approx(2 * int(per_rank.replace(",", "")), abs=2)
    before, after = map(float, re.search(r"held-out loss +([\d.]+) before, ([\d.]+) after 50 steps", output).groups())
    assert after < before - 0.5
    recorded = json.loads(record.read_text())
    assert len(recorded["train"]) == 50
    assert list(recorded["held_out"]) == ["0", "25", "50"]
    assert recorded["held_out"]["50"] == pytest.approx(after, abs=1e-4)
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(list(logs.glob("events.out.tfevents.*"))) == 1  # rank 0 alone writes
    assert_rounds_are_shown(rounds, output, logs, tmp_path)
    assert output.count("held-out loss") == 4  # and it alone prints: three evaluations and the summary
    assert "Traceback" not in output
    # horovodrun itself imports TensorFlow; it marks what the ranks write with "[1,rank]".
    written = [line for line in output.splitlines() if launcher != "horovodrun" or line.startswith("[1,")]
    assert not [line for line in written if "WARNING" in line]


def assert_rounds_are_shown(rounds: bool, output: str, logs: Path, folder: Path) -> None:
    """In the summary, in TensorBoard and in the timelines, where the plan has rounds; nowhere else."""
    shown = re.search(r"agreement +(\d+) rounds, ([\d.]+) MB sent", output)
    scalars = b"sync/drift" in next(logs.glob("events.out.tfevents.*")).read_bytes()
    traces = sorted(folder.glob("trace.rank*.json"))
    assert bool(shown) == scalars == bool(traces) == rounds
    if rounds:
        assert int(shown.group(1)) > 5
        assert float(shown.group(2)) > 0
        assert len(traces) == 2
        seconds = spent(merge(traces))
        assert all(s.computing > 0 and s.rounds > 0 and s.under_way > 0 for s in seconds.values())


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, (), "does not exist"),
        (b"", (), "is empty"),
        (b"\x7fELF\0\0\1", (), "is not text"),
        (b"a few words", (), "there are 1 to train on for 2 ranks"),
        (b"words and\n\n" * 20000, ("--batch-size", "9999"), "A batch cannot be larger than the data"),
        (b"words and\n\n" * 20000, ("--tokenizer", "words"), "'bytes' or 'bpe'; it is 'words'"),
        (b"words and\n\n" * 20000, ("--heads", "5"), "--width must be a multiple of --heads"),
        (b"words and\n\n" * 20000, ("--sync", "diloco", "--overlap", "40"), "overlap is 40 and every is 32"),
        (b"words and\n\n" * 20000, ("--tp", "3"), "divide the number of ranks; it is 3 of 2 ranks"),
    ],
    ids=[
        "missing",
        "empty",
        "binary",
        "too few documents",
        "batch too large",
        "unknown tokenizer",
        "heads",
        "plan",
        "tp",
    ],
)
def test_wrong_input_ends_the_job_with_one_line(
    content: bytes | None, flags: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    assert_refused(train("torch_lm", "--data", str(path), *flags), "torch_lm", message)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_input_ends_the_keras_job_too(backend: str) -> None:
    assert_refused(train("train_lm", "--data", "no such place", backend=backend), "train_lm", "does not exist")


def assert_refused(finished: Finished, script: str, message: str) -> None:
    assert finished.returncode == 2, finished.output
    lines = [line for line in finished.output.splitlines() if line.startswith(f"{script}.py: error: ")]
    assert any(message in line for line in lines)
    assert all(message in line or "another rank cannot start" in line for line in lines)
    assert "Traceback" not in finished.output
