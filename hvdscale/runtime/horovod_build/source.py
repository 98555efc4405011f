"""Horovod's source: fetched through pip, checked against a pinned hash, edited to compile on today's stack."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hvdscale.errors import BuildError
from hvdscale.runtime.process import Finished

__all__ = ["Edit", "Run", "Source", "check_archive", "environment", "fetch_source", "unpack"]

Run = Callable[[Sequence[str], Path], Finished]
"""Runs a command in a folder and keeps its output in the build's log."""


@dataclass(frozen=True)
class Edit:
    """One change to one file of the source: ``find`` must be there exactly once."""

    file: str
    find: str
    replace: str
    why: str

    def apply(self, root: Path) -> None:
        """Change the file under ``root``.

        Raises:
            BuildError: the file is missing, or ``find`` is there more than once or not at all.
        """
        path = root / self.file
        if not path.is_file():
            raise BuildError(
                f"The edit of {self.file} ({self.why}) found no such file in Horovod's source. {_OTHER_SOURCE}"
            )
        text = path.read_text()
        matches = text.count(self.find)
        if matches != 1:
            raise BuildError(
                f"The edit of {self.file} ({self.why}) must match exactly once; "
                f"{self.find.strip()!r} is there {matches} times. {_OTHER_SOURCE}"
            )
        path.write_text(text.replace(self.find, self.replace))


_OTHER_SOURCE = "Edits are made for one release of the source, and this is another one."


@dataclass(frozen=True)
class Source:
    """A release of Horovod: its version, the SHA-256 of its archive and the edits it needs to compile today."""

    version: str
    sha256: str
    edits: tuple[Edit, ...]
    cuda_edits: tuple[Edit, ...] = ()  # applied where torch is made for CUDA

    @property
    def archive(self) -> str:
        return f"horovod-{self.version}.tar.gz"

    def all_edits(self, cuda: bool) -> tuple[Edit, ...]:
        return (*self.edits, *(self.cuda_edits if cuda else ()))

    def edits_digest(self, cuda: bool = False) -> str:
        """SHA-256 of what the edits change (not of why)."""
        changes = [{k: v for k, v in asdict(edit).items() if k != "why"} for edit in self.all_edits(cuda)]
        return hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()


def check_archive(path: Path, expected_sha256: str) -> None:
    """Raise unless the file has the pinned hash.

    Raises:
        BuildError: with both hashes.
    """
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected_sha256:
        raise BuildError(
            f"{path.name} must have SHA-256\n  {expected_sha256}\nbut this file has\n  {found}\n"
            "Nothing was built from it. Check where it came from (pip's index: `pip config list`), then retry."
        )


def fetch_source(source: Source, folder: Path, run: Run, given: Path | None = None) -> Path:
    """The archive of ``source`` in ``folder``, fetched if it is not there, its hash checked either way.

    pip does the download, so that the user's index, proxy and certificates hold.

    Args:
        given: the archive, brought by the user to a machine that cannot fetch it.

    Raises:
        BuildError: pip cannot get it, or it is not the pinned file.
    """
    archive = folder / source.archive
    if given is not None:
        return _copied(source, given, folder)
    if archive.is_file():
        try:
            check_archive(archive, source.sha256)
        except BuildError:
            archive.unlink()  # a copy damaged on this disk; what pip serves is checked again below
        else:
            return archive
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="incoming-", dir=folder) as own:  # another build may be fetching too
        fetched = _download(source, Path(own), run)
        check_archive(fetched, source.sha256)
        fetched.replace(archive)
    return archive


def _copied(source: Source, given: Path, folder: Path) -> Path:
    if not given.is_file():
        raise BuildError(f"There is no file {given}. Bring {source.archive}, as the package index has it.")
    check_archive(given, source.sha256)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="incoming-", dir=folder) as own:
        copy = Path(own, source.archive)
        shutil.copyfile(given, copy)
        return copy.replace(folder / source.archive)


def _download(source: Source, incoming: Path, run: Run) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    pinned = incoming / "requirement.txt"
    pinned.write_text(f"horovod=={source.version} --hash=sha256:{source.sha256}\n")
    # With the hash pip refuses another file before it runs anything in it.
    finished = run([*pip, "--dest", str(incoming), "--require-hashes", "--requirement", str(pinned)], incoming)
    fetched = incoming / source.archive
    if finished.returncode == 0 and fetched.is_file():
        return fetched
    tail = "\n".join(finished.output.splitlines()[-5:])
    if "DO NOT MATCH THE HASHES" in finished.output:
        raise BuildError(
            f"{source.archive} must have SHA-256\n  {source.sha256}\nbut the package index served another file:\n"
            f"{tail}\nNothing in it was run. Check which index and mirror pip uses (`pip config list`), then retry."
        )
    raise BuildError(
        f"pip could not download the source of Horovod {source.version}:\n{tail}\n"
        "Check the network, the proxy and the index in `pip config list`, then retry."
    )


def unpack(source: Source, archive: Path, folder: Path, cuda: bool = False) -> Path:
    """Unpack into ``folder`` and apply the edits (``cuda``: those for a torch made for CUDA too); return the root.

    Raises:
        BuildError: an edit does not fit.
    """
    with tarfile.open(archive) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", lambda member, path: member)
        tar.extractall(folder)
    root = folder / archive.name.removesuffix(".tar.gz")
    for edit in source.all_edits(cuda):
        edit.apply(root)
    return root


def environment(base: Mapping[str, str], frameworks: Sequence[str], jobs: int) -> dict[str, str]:
    """The environment of the compilation: which frameworks, which controllers, how many jobs.

    The folder of this Python comes first on PATH, so that ``mpicxx`` and ``cmake`` of the same environment win.
    """
    names = {"torch": "PYTORCH", "tensorflow": "TENSORFLOW"}
    chosen = {f"HOROVOD_{'WITH' if ours in frameworks else 'WITHOUT'}_{theirs}": "1" for ours, theirs in names.items()}
    kept = {key: value for key, value in base.items() if not key.startswith(("HOROVOD_WITH_", "HOROVOD_WITHOUT_"))}
    return {
        "MAKEFLAGS": f"-j{jobs}",
        **kept,
        **chosen,
        "HOROVOD_WITH_GLOO": "1",
        "HOROVOD_WITH_MPI": "1",
        "HOROVOD_WITHOUT_MXNET": "1",
        # Gloo asks for a CMake so old that CMake 4 refuses it.
        "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
    }
