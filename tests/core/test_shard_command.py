"""``hvdscale shards``: the figures of the plan, for files and pipes."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest

from hvdscale.cli.main import main
from hvdscale.data import ShardPlan

KEYS = [f"document {i}" for i in range(500)]


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    path = tmp_path / "keys.txt"
    path.write_text("\n".join(KEYS) + "\n")
    return str(path)


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["shards", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("policy", ["hash", "ordered", "random"])
def test_figures_are_those_of_the_plan(keys_file: str, capsys: pytest.CaptureFixture[str], policy: str) -> None:
    plan = ShardPlan(500, 4, policy, seed=3, keys=KEYS if policy == "hash" else None, weights=[1, 2, 2, 1])
    after, move = plan.resize(5)
    shown = figures(
        capsys, keys_file, *("--shards", "4", "--policy", policy, "--seed", "3"), "--weights=1,2,2,1", "--resize=5"
    )
    assert (shown["n"], shown["sizes"]) == (500, plan.sizes().tolist())
    assert shown["resized"]["sizes"] == after.sizes().tolist()
    assert (shown["resized"]["moved"], shown["resized"]["least_possible"]) == (move.fraction, move.ideal)


def test_the_report_shows_sizes_bars_and_what_moves(keys_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["shards", keys_file, "--shards", "2", "--policy", "ordered", "--resize", "4"]) == 0
    shown = capsys.readouterr().out
    assert "500 samples over 2 shards (ordered): 250 to 250 each" in shown
    assert re.search(r"^ +0 +250 +#{40}$", shown, re.MULTILINE)
    assert "Resized to 4 shards: 50.00% of the samples move; between shards of exact size at least 50.00%" in shown


def test_the_report_names_the_key_that_weighs_most(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys").write_text("a\nb\nb\nc\n")
    assert main(["shards", str(tmp_path / "keys"), "--shards", "2"]) == 0
    assert "3 distinct keys; the most frequent, 'b', comes 2 times" in capsys.readouterr().out


def test_keys_as_long_as_books_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "books").write_text(f"{'b' * 10**6}\n{'b' * 10**6}\n")
    assert main(["shards", str(tmp_path / "books"), "--shards", "2"]) == 0
    assert re.search(r"most frequent, 'b{76}\.\.\., comes 2 times", capsys.readouterr().out)
    for more, message in (
        ("--unique", r"keys 0 and 1 are both b'b{75}\.\.\."),
        ("--keys=integers", r"1 is 'b{76}\.\.\.\."),
    ):
        assert main(["shards", str(tmp_path / "books"), "--shards", "2", more]) == 1
        assert re.search(message, shown := capsys.readouterr().err)
        assert len(shown) < 300


def test_a_terminal_without_the_letters_of_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("naïve\nnaïve\n日本\n")
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, "ascii"))
    assert main(["shards", str(tmp_path / "keys"), "--shards", "2"]) == 0
    assert b"the most frequent, 'na\\xefve', comes 2 times" in screen.getvalue()


def test_even_shards(keys_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = figures(capsys, keys_file, "--shards", "4", "--even", "--resize=5")
    assert (shown["sizes"], shown["resized"]["sizes"]) == ([125] * 4, [100] * 5)
    assert shown["resized"]["moved"] == 0.2


def test_integer_lines_are_integer_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "users").write_text("".join(f"{i}\n" for i in range(300)))
    shown = figures(capsys, str(tmp_path / "users"), "--shards", "3", "--keys", "integers")
    assert shown["sizes"] == ShardPlan(300, 3, "hash", keys=range(300)).sizes().tolist()


def test_several_files_and_a_pipe_are_one_text(
    keys_file: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\r\ntwo")))
    shown = figures(capsys, keys_file, "-", "--shards", "3")
    assert shown["sizes"] == ShardPlan(502, 3, "hash", keys=[*KEYS, "one", "two"]).sizes().tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["FILE", "--shards", "0"], "shards must be an integer in 1..65535; it is 0"),
        (["FILE", "--shards", "2", "--weights", "1,0"], "that of shard 1 is 0"),
        (["FILE", "--shards", "2", "--keys", "integers"], "line 1 is 'document 0'. Try --keys text"),
        (["FILE", "--shards", "2", "--resize-weights", "1,2"], "give that too"),
        (["FILE", "--shards", "2", "--policy", "random", "--unique"], "has keys to be unique"),
        (["FILE", "--shards", "2", "--policy", "ordered", "--even"], "by themselves"),
        (["FILE", "FILE", "--shards", "2", "--unique"], "500 repeat an earlier one"),
        (["missing.txt", "--shards", "2"], "missing.txt"),
        (["/", "--shards", "2"], "/ is a directory. Give its files: /*"),
    ],
)
def test_errors_are_one_message(
    keys_file: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["shards", *(keys_file if word == "FILE" else word for word in arguments)]) == 1
    assert message in capsys.readouterr().err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["shards", "--help"])
    assert end.value.code == 0
    assert "hvdscale shards keys.txt --shards 64 --resize 65" in capsys.readouterr().out
