"""The examples start on all ranks or on none: what is wrong on one is told to every rank, before a step is taken."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hvdscale.errors import PlanError
from hvdscale.runtime.transport import Transport, run_loopback
from tests.core.test_text import EXAMPLES, flags

sys.path.insert(0, str(EXAMPLES))

from lm import together
from lm.batches import Share

TEXT = b"words and\n\n" * 20000


def start(ranks: int, given: Callable[[int], tuple[str, ...]]) -> list[Share | Exception]:
    """``load_together`` on every rank, as a thread, with ``given(rank)`` on its command line."""
    parsed = [flags(*given(rank)) for rank in range(ranks)]  # here: it borrows sys.argv

    def body(transport: Transport) -> Share:
        def mean(values: np.ndarray) -> np.ndarray:
            return np.mean([np.frombuffer(part) for part in transport.allgather(values.tobytes())], axis=0)

        return together.load_together(parsed[transport.rank], transport.rank, ranks, mean)

    return run_loopback(ranks, body)


def texts(folder: Path, *contents: bytes | None) -> list[str]:
    """A file called ``text`` for each rank, in a folder of its own, as on machines of their own."""
    paths = [folder / f"machine-{i}" / "text" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.parent.mkdir()
        if content is not None:
            path.write_bytes(content)
    return [str(path) for path in paths]


def test_the_same_text_on_every_machine(tmp_path: Path) -> None:
    paths = texts(tmp_path, TEXT, TEXT, TEXT)
    shares = start(3, lambda rank: ("--data", paths[rank]))
    assert all(isinstance(share, Share) for share in shares), shares


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_another_text_on_one_machine(odd: int, tmp_path: Path) -> None:
    paths = texts(tmp_path, *(TEXT[:-2] + (b"!\n" if rank == odd else b"\n\n") for rank in range(3)))
    for rank, result in enumerate(start(3, lambda rank: ("--data", paths[rank]))):
        assert isinstance(result, PlanError)
        assert f"different texts; rank {rank} has" in str(result)


def test_no_text_on_one_machine(tmp_path: Path) -> None:
    paths = texts(tmp_path, TEXT, None, TEXT)
    results = start(3, lambda rank: ("--data", paths[rank]))
    assert all(isinstance(result, PlanError) for result in results)
    said = [str(result) for result in results]
    assert "does not exist" in said[1]
    assert said[0] == said[2] == "another rank cannot start; it says why."


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (("--plot", "{file}/loss.png"), "cannot be made"),
        (("--logdir", "{file}/logs"), "cannot be made"),
        (("--record", "{file}/losses.json"), "cannot be made"),
        (("--plot", "{folder}"), "--plot names a file"),
        (("--plot", "{folder}/loss.word"), "--plot ends in one of .*png.*; it is '.*loss.word'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_could_not_be_written_is_said_first(output: tuple[str, str], says: str, tmp_path: Path) -> None:
    """Only rank 0 writes; it checks, and both end."""
    (path,) = texts(tmp_path, TEXT)
    flag, value = output
    first, second = start(2, lambda rank: ("--data", path, flag, value.format(file=path, folder=tmp_path)))
    with pytest.raises(PlanError, match=says):
        raise first
    assert isinstance(second, PlanError)


@pytest.mark.parametrize(("flag", "package"), [("--logdir", "tensorboard"), ("--plot", "matplotlib")])
def test_a_missing_package_comes_with_the_line_that_installs_it(
    flag: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    (path,) = texts(tmp_path, TEXT)
    first, second = start(2, lambda rank: ("--data", path, flag, str(tmp_path / "out.png")))
    with pytest.raises(PlanError, match=rf"{flag} needs {package}: pip install 'hvdscale\[viz\]'"):
        raise first
    assert isinstance(second, PlanError)
