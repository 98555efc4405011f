"""Promises about GPUs: NCCL is built where all it needs is here; else what is missing is named, and the way chosen."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hvdscale.errors import BuildError, WorldError
from hvdscale.runtime.gpu import Sight, agree_on_way, choose_way, look
from hvdscale.runtime.horovod_build import HOROVOD
from hvdscale.runtime.horovod_build.cache import build_facts, build_key
from hvdscale.runtime.horovod_build.cuda import choose_cuda, gpu_environment, torch_cuda
from hvdscale.runtime.horovod_build.source import fetch_source, unpack
from hvdscale.runtime.horovod_build.toolchain import Toolchain
from hvdscale.runtime.process import Finished
from hvdscale.runtime.transport import SoloTransport
from tests.core.fake_tools import make_archive, make_files, make_tools

HEADER = "#define NCCL_MAJOR 2\n#define NCCL_MINOR 28\n#define NCCL_PATCH 9\n"


@dataclass
class Machine:
    """A folder with a torch, CUDA toolkits and NCCL, as far as a test puts them there."""

    folder: Path

    def torch(self, cuda: str | None) -> None:
        package = self.folder / "site" / "torch"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "version.py").write_text(f"__version__ = '2.11.0'\ncuda: Optional[str] = {cuda!r}\n")

    def toolkit(self, name: str, release: str, headers: bool = True) -> Path:
        home = self.folder / name
        home.mkdir()
        make_tools(home / "bin", {"nvcc": "exit 1"})
        if headers:
            (home / "include").mkdir()
            major, minor = release.split(".")
            text = f"#define CUDART_VERSION  {1000 * int(major) + 10 * int(minor)}\n"
            (home / "include" / "cuda_runtime_api.h").write_text(text)
        return home

    def nccl(self, package: bool = True) -> Path:
        """In pip's folder, which has no libnccl.so; or in one of the user's."""
        home = self.folder / "site" / "nvidia" / "nccl" if package else self.folder / "nccl"
        for part in ("include", "lib"):
            (home / part).mkdir(parents=True)
        (home / "include" / "nccl.h").write_text(HEADER)
        (home / "lib" / "libnccl.so.2").touch()
        return home


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    site = tmp_path / "site"
    site.mkdir()
    real = importlib.util.find_spec

    def find_spec(name: str, package: str | None = None) -> importlib.machinery.ModuleSpec | None:
        if name in ("torch", "nvidia"):
            return importlib.machinery.PathFinder.find_spec(name, [str(site)])
        return real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    monkeypatch.setattr("hvdscale.runtime.horovod_build.cuda.SYSTEM", (tmp_path / "cuda", tmp_path / "usr"))
    return Machine(tmp_path)


@pytest.mark.parametrize("cuda", ["13.0", "12.8", None])
def test_which_cuda_torch_was_made_for_is_read_without_importing_it(machine: Machine, cuda: str | None) -> None:
    assert torch_cuda() is None
    machine.torch(cuda)
    before = set(sys.modules)
    assert torch_cuda() == cuda
    assert set(sys.modules) == before


def test_a_torch_without_cuda_leaves_nothing_to_choose(machine: Machine) -> None:
    machine.torch(None)
    machine.toolkit("cuda", "13.0")
    machine.nccl()
    for choice in ("auto", "none"):
        assert choose_cuda(choice, ["torch", "tensorflow"], {}) is None
        assert choose_cuda(choice, ["tensorflow"], {}) is None
    with pytest.raises(BuildError, match="installed here is not"):
        choose_cuda("nccl", ["torch"], {})
    with pytest.raises(BuildError, match="not among the frameworks"):
        choose_cuda("nccl", ["tensorflow"], {})
    with pytest.raises(BuildError, match="auto, none, nccl, not 'rocm'"):
        choose_cuda("rocm", ["torch"], {})


def test_where_all_is_here_nccl_is_built_and_recorded(machine: Machine, tmp_path: Path) -> None:
    machine.torch("13.0")
    home = machine.toolkit("cuda", "13.1")
    nccl = machine.nccl()
    cuda = choose_cuda("auto", ["torch"], {})
    assert cuda is not None
    assert cuda.text == "NCCL 2.28.9, CUDA 13.1"
    assert not cuda.note
    assert cuda == choose_cuda("nccl", ["torch"], {})
    users = {"HOROVOD_GPU_ALLREDUCE": "MPI", "HOROVOD_NCCL_LINK": "STATIC", "HOROVOD_BUILD_CUDA_CC_LIST": "90"}
    env = gpu_environment(users, cuda, tmp_path)
    assert env["HOROVOD_GPU_OPERATIONS"] == "NCCL"
    assert env["HOROVOD_CUDA_HOME"] == env["CUDA_HOME"] == str(home)
    assert env["HOROVOD_NCCL_INCLUDE"] == str(nccl / "include")
    assert (Path(env["HOROVOD_NCCL_LIB"]) / "libnccl.so").resolve() == nccl / "lib" / "libnccl.so.2"
    assert env["HOROVOD_NCCL_LINK"] == "SHARED"
    assert env["HOROVOD_BUILD_CUDA_CC_LIST"] == "90"
    assert "HOROVOD_GPU_ALLREDUCE" not in env
    assert env["HVDSCALE_GPU_RECORD"] == cuda.text


def test_none_builds_without_nccl_whatever_is_here(machine: Machine, tmp_path: Path) -> None:
    machine.torch("13.0")
    machine.toolkit("cuda", "13.0")
    machine.nccl()
    cuda = choose_cuda("none", ["torch"], {})
    assert cuda is not None
    assert (cuda.text, cuda.note) == ("none", "")
    env = gpu_environment({"HOROVOD_GPU_OPERATIONS": "NCCL"}, cuda, tmp_path)
    assert env == {"HVDSCALE_GPU_NONE": "1", "HVDSCALE_GPU_RECORD": "none"}
    assert gpu_environment({"HOROVOD_GPU_OPERATIONS": "NCCL"}, None, tmp_path) == {"HOROVOD_GPU_OPERATIONS": "NCCL"}


@pytest.mark.parametrize(
    ("toolkits", "nccl", "frameworks", "says"),
    [
        ([], True, ["torch"], ["CUDA toolkit 13", "no nvcc", "HOROVOD_CUDA_HOME"]),
        ([("cuda", "12.8", True)], True, ["torch"], ["CUDA toolkit 13", "is 12.8"]),
        ([("cuda", "13.0", False)], True, ["torch"], ["CUDA toolkit 13", "no nvcc"]),  # a script called nvcc
        ([("cuda", "13.0", True)], False, ["torch"], ["pip install nvidia-nccl-cu13"]),
        ([("cuda", "13.0", True)], True, ["torch", "tensorflow"], ["--frameworks torch"]),
        ([], False, ["torch"], ["CUDA toolkit 13", "nvidia-nccl-cu13"]),
    ],
)
def test_what_is_missing_is_a_line_or_where_nccl_was_asked_for_an_error(
    machine: Machine, toolkits: list[tuple[str, str, bool]], nccl: bool, frameworks: list[str], says: list[str]
) -> None:
    machine.torch("13.0")
    for toolkit in toolkits:
        machine.toolkit(*toolkit)
    if nccl:
        machine.nccl()
    cuda = choose_cuda("auto", frameworks, {})
    assert cuda is not None
    assert cuda.text == "none"
    assert "\n" not in cuda.note
    with pytest.raises(BuildError, match="Nothing was changed") as error:
        choose_cuda("nccl", frameworks, {})
    for words in says:
        assert words in cuda.note
        assert words in str(error.value)


@pytest.mark.parametrize("name", ["HOROVOD_CUDA_HOME", "CUDA_HOME", "CUDA_PATH", "PATH"])
def test_the_users_toolkit_comes_before_the_systems(machine: Machine, name: str) -> None:
    machine.torch("12.8")
    machine.toolkit("cuda", "13.0")  # of another version than torch
    mine = machine.toolkit("mine", "12.9")
    nccl = machine.nccl(package=False)
    env = {name: str(mine / "bin" if name == "PATH" else mine), "HOROVOD_NCCL_HOME": str(nccl)}
    cuda = choose_cuda("nccl", ["torch"], env)
    assert cuda is not None
    assert cuda.toolkit == (mine, nccl / "lib" / "libnccl.so.2", nccl / "include")


def test_each_choice_has_a_wheel_of_its_own_and_a_cpu_torchs_is_found_again(machine: Machine) -> None:
    plain = Toolchain((("torch", "2.11.0"),), "g++", "cmake", "Open MPI 4.1.8")
    machine.torch("13.0")
    machine.toolkit("cuda", "13.0")
    machine.nccl()
    made = [choose_cuda(choice, ["torch"], {}) for choice in ("none", "nccl")]
    facts = [
        build_facts(HOROVOD, Toolchain(plain.frameworks, "g++", "cmake", plain.mpi, cuda)) for cuda in (None, *made)
    ]
    assert len({build_key(f) for f in facts}) == 3
    assert "gpu" not in facts[0]
    assert facts[0]["edits_sha256"] == HOROVOD.edits_digest() != facts[1]["edits_sha256"]


def test_edits_for_cuda_are_applied_where_torch_is_made_for_it(tmp_path: Path) -> None:
    source = make_archive(tmp_path / "index", make_files())
    for cuda in (False, True):
        root = unpack(source, tmp_path / "index" / source.archive, tmp_path / str(cuda), cuda)
        for edit in HOROVOD.cuda_edits:
            assert (edit.replace in (root / edit.file).read_text()) == cuda


def test_an_archive_that_was_brought_is_checked_and_kept(tmp_path: Path) -> None:
    source = make_archive(tmp_path / "index", make_files())

    def nothing(command: object, folder: object) -> Finished:
        raise AssertionError("nothing is to be fetched")

    brought = tmp_path / "usb.tar.gz"
    brought.write_bytes((tmp_path / "index" / source.archive).read_bytes())
    kept = fetch_source(source, tmp_path / "cache", nothing, brought)
    assert kept == tmp_path / "cache" / source.archive
    assert fetch_source(source, tmp_path / "cache", nothing) == kept
    brought.write_bytes(b"another")
    with pytest.raises(BuildError, match="but this file has"):
        fetch_source(source, tmp_path / "cache", nothing, brought)
    with pytest.raises(BuildError, match=r"no file .*Bring horovod-0\.28\.1\.tar\.gz"):
        fetch_source(source, tmp_path / "cache", nothing, tmp_path / "nowhere.tar.gz")


def sight(**other: Any) -> Sight:
    """A rank with one GPU of its own and a Horovod with NCCL, but for ``other``."""
    return Sight(**{"host": 1.0, "gpus": 1, "visible": "", "built": True, "nccl": True, "asked": "", **other})


@pytest.mark.parametrize(
    ("ranks", "way", "because"),
    [
        ([sight()], "direct", "by NCCL"),
        ([sight(), sight(host=2.0)], "direct", "by NCCL"),
        ([sight(gpus=2)] * 2, "direct", "by NCCL"),
        ([sight(visible="0"), sight(visible="1")], "direct", "by NCCL"),  # each was given its own
        ([sight()] * 2, "host", "2 ranks share a GPU"),
        ([sight(gpus=2)] * 5, "host", "3 ranks share a GPU"),
        ([sight(gpus=0)] * 2, "direct", "by NCCL"),  # nothing will travel
        ([sight(), sight(host=2.0, nccl=False)], "host", "built without NCCL"),
        ([sight(built=False, nccl=False)], "host", "--gpu nccl --install"),
        ([sight(), sight(asked="host")], "host", "set by you"),  # the variable reached one rank
        ([sight(asked="direct")] * 2, "direct", "set by you"),
        ([sight(nccl=False, asked="direct")], "direct", "set by you"),  # by an MPI that knows GPUs
    ],
)
def test_the_way_of_gpu_tensors_is_one_for_all_ranks(ranks: list[Sight], way: str, because: str) -> None:
    setting = choose_way(ranks)
    assert (setting.name, setting.value) == ("HVDSCALE_GPU", way)
    assert because in setting.reason
    assert (setting.origin == "user") == any(rank.asked for rank in ranks)


@pytest.mark.parametrize(
    ("ranks", "says"),
    [
        ([sight(built=False, nccl=False, asked="direct")], "--gpu nccl --install"),
        ([sight(), sight(built=False, nccl=False, asked="direct")], "--gpu nccl --install"),
        ([sight(asked="nvlink")], "direct or host, .*it is nvlink"),
        ([sight(asked="direct"), sight(asked="host")], "direct and host"),
    ],
)
def test_a_way_that_cannot_be_is_refused(ranks: list[Sight], says: str) -> None:
    with pytest.raises(WorldError, match=says):
        choose_way(ranks)


def test_ranks_tell_each_other_what_they_see() -> None:
    env = {"CUDA_VISIBLE_DEVICES": "2,3", "HVDSCALE_GPU": "host"}
    mine = look(2, True, False, env)
    assert mine == Sight(mine.host, 2, "2,3,", True, False, "host")
    assert agree_on_way(mine, SoloTransport()).value == "host"
    assert agree_on_way(sight(), SoloTransport()).value == "direct"
