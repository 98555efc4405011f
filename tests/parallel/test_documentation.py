"""The examples of README.md do what they say, as they are written; those of the other pages are Python at least."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.documented import REPOSITORY, blocks, framework_of
from tests.launcher import launch


@pytest.mark.parametrize("frameworks", [("torch",), ("tensorflow", "keras")], ids="-".join)
def test_every_example_runs_and_the_ranks_agree(frameworks: tuple[str, ...]) -> None:
    wanted = {
        i: "trains together" if "Distributed" in block else "leaves the model alone"
        for i, block in enumerate(blocks(REPOSITORY / "README.md"), 1)
        if framework_of(block) in frameworks
    }
    assert "trains together" in wanted.values()
    env = {"KERAS_BACKEND": "tensorflow"}
    output = launch(["-m", "tests.documented", *frameworks], env=env, deadline_seconds=200).check()
    assert {int(i): said for i, said in re.findall(r"^example (\d+): (.+)$", output, re.M)} == wanted, output


@pytest.mark.parametrize("page", sorted(REPOSITORY.glob("docs/*.md")), ids=lambda page: page.name)
def test_examples_of_other_pages_are_python(page: Path) -> None:
    for number, block in enumerate(blocks(page), 1):
        compile(block, f"{page.name}, example {number}", "exec")
