"""Promises of the source: edits match exactly once or nothing is built, and only the pinned archive is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from hvdscale.errors import BuildError
from hvdscale.runtime.horovod_build import HOROVOD, Edit
from hvdscale.runtime.horovod_build.source import check_archive, environment, fetch_source, unpack
from hvdscale.runtime.process import Finished
from tests.core.fake_tools import lines_of, make_archive, make_files


def test_every_edit_is_applied(tmp_path: Path) -> None:
    source = make_archive(tmp_path / "index", make_files())
    root = unpack(source, tmp_path / "index" / source.archive, tmp_path, cuda=True)
    edits = HOROVOD.all_edits(True)
    for file in {edit.file for edit in edits}:
        edited = [lines_of(edit).replace(edit.find, edit.replace) for edit in edits if edit.file == file]
        assert (root / file).read_text() == "".join(["# before\n", *edited])


@pytest.mark.parametrize("edit", HOROVOD.edits, ids=lambda edit: edit.file)
@pytest.mark.parametrize(("spoil", "says"), [("without", "is there 0 times"), ("twice", "is there 2 times")])
def test_an_edit_that_does_not_match_once_stops_the_build(tmp_path: Path, edit: Edit, spoil: str, says: str) -> None:
    source = make_archive(tmp_path / "index", make_files(**{spoil: edit.file}))
    with pytest.raises(BuildError, match=says) as error:
        unpack(source, tmp_path / "index" / source.archive, tmp_path)
    assert edit.file in str(error.value)
    assert edit.why in str(error.value)


def test_an_edit_of_a_missing_file_stops_the_build(tmp_path: Path) -> None:
    files = make_files()
    del files["CMakeLists.txt"]
    source = make_archive(tmp_path / "index", files)
    with pytest.raises(BuildError, match=r"CMakeLists\.txt .* found no such file"):
        unpack(source, tmp_path / "index" / source.archive, tmp_path)


def test_another_archive_is_refused_with_both_hashes(tmp_path: Path) -> None:
    source = make_archive(tmp_path / "index", make_files())
    with pytest.raises(BuildError, match="Nothing was built") as error:
        check_archive(tmp_path / "index" / source.archive, HOROVOD.sha256)
    assert HOROVOD.sha256 in str(error.value)
    assert source.sha256 in str(error.value)


@pytest.mark.parametrize("field", ["file", "find", "replace"])
def test_the_digest_of_the_edits_changes_with_what_they_change(field: str) -> None:
    first, *others = HOROVOD.edits
    changed = replace(HOROVOD, edits=(replace(first, **{field: "other"}), *others))
    assert changed.edits_digest() != HOROVOD.edits_digest()


def test_the_digest_of_the_edits_ignores_their_reasons() -> None:
    reworded = replace(HOROVOD, edits=tuple(replace(edit, why="because") for edit in HOROVOD.edits))
    assert reworded.edits_digest() == HOROVOD.edits_digest()


@pytest.mark.parametrize(
    ("frameworks", "expected", "absent"),
    [
        (["torch"], {"HOROVOD_WITH_PYTORCH", "HOROVOD_WITHOUT_TENSORFLOW"}, {"HOROVOD_WITH_TENSORFLOW"}),
        (["tensorflow"], {"HOROVOD_WITHOUT_PYTORCH", "HOROVOD_WITH_TENSORFLOW"}, {"HOROVOD_WITH_PYTORCH"}),
        (["torch", "tensorflow"], {"HOROVOD_WITH_PYTORCH", "HOROVOD_WITH_TENSORFLOW"}, {"HOROVOD_WITHOUT_PYTORCH"}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_the_environment_names_each_framework_once(frameworks: list[str], expected: set[str], absent: set[str]) -> None:
    users = {"HOROVOD_WITHOUT_GLOO": "1", "HOROVOD_WITHOUT_PYTORCH": "1", "HOROVOD_WITH_TENSORFLOW": "1"}
    env = environment(users, frameworks, jobs=3)
    assert expected | {"HOROVOD_WITH_GLOO", "HOROVOD_WITH_MPI", "HOROVOD_WITHOUT_MXNET"} <= set(env)
    assert not (absent | {"HOROVOD_WITHOUT_GLOO"}) & set(env)


@pytest.mark.parametrize(("users", "expected"), [({}, "-j3"), ({"MAKEFLAGS": "-j1"}, "-j1")])
def test_the_users_number_of_jobs_wins(users: dict[str, str], expected: str) -> None:
    assert environment(users, ["torch"], jobs=3)["MAKEFLAGS"] == expected


def test_two_builds_may_fetch_at_once(tmp_path: Path) -> None:
    """Each has a folder of its own: the second comes and is done while the first is still at it."""
    source = make_archive(tmp_path / "index", make_files())
    served = (tmp_path / "index" / source.archive).read_bytes()
    cache = tmp_path / "cache"
    folders: list[Path] = []

    def pip(command: Sequence[str], folder: Path) -> Finished:
        target = Path(command[command.index("--dest") + 1]) / source.archive
        folders.append(target.parent)
        target.write_bytes(served[:100])
        if len(folders) == 1:
            assert fetch_source(source, cache, pip) == cache / source.archive
        assert target.read_bytes() == served[:100]
        target.write_bytes(served)
        return Finished(0, "", 0.0)

    assert fetch_source(source, cache, pip).read_bytes() == served
    assert len(set(folders)) == 2
    assert [path.name for path in cache.iterdir()] == [source.archive]
