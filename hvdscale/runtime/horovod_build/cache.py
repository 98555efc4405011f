"""The per-user store of built wheels: one folder per key, made complete elsewhere and renamed into place."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdscale.runtime.horovod_build.source import Source
from hvdscale.runtime.horovod_build.toolchain import Toolchain

__all__ = ["RECORD", "BuiltWheel", "Store", "build_facts", "build_key", "cache_folder", "sha256_of"]

RECORD = "build.json"


@dataclass(frozen=True)
class BuiltWheel:
    """A finished wheel, what it was made from, and whether it was already there."""

    path: Path
    record: Mapping[str, Any]
    reused: bool


def cache_folder(env: Mapping[str, str]) -> Path:
    """``$XDG_CACHE_HOME/hvdscale/horovod``, by default under ``~/.cache``."""
    base = env.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "hvdscale" / "horovod"


def build_facts(source: Source, toolchain: Toolchain) -> dict[str, Any]:
    """Everything a wheel depends on: two builds with equal facts are interchangeable."""
    cuda = toolchain.cuda
    return {
        "horovod": source.version,
        "source_sha256": source.sha256,
        "edits_sha256": source.edits_digest(cuda is not None),
        "frameworks": dict(toolchain.frameworks),
        "python": str(sysconfig.get_config_var("SOABI")),
        "platform": sysconfig.get_platform(),
        "mpi": toolchain.mpi,
        **({} if cuda is None else {"gpu": cuda.text}),
    }


def build_key(facts: Mapping[str, Any]) -> str:
    """16 hexadecimal digits that name the facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Store:
    """Wheels under one folder. Only whole ones are ever visible."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the only build of ``key``; another process waits here, then finds the wheel."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{key}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def find(self, key: str) -> BuiltWheel | None:
        """The stored wheel, or ``None`` if there is none or it no longer has the hash it was stored with."""
        entry = self.folder / key
        try:
            record = json.loads((entry / RECORD).read_text())
            wheel = entry / record["wheel"]
            intact = sha256_of(wheel) == record["wheel_sha256"]
        except (OSError, ValueError, KeyError):
            return None
        return BuiltWheel(wheel, record, reused=True) if intact else None

    @contextmanager
    def workspace(self, key: str) -> Iterator[Path]:
        """A temporary folder on the same disk, under the lock of ``key``: others there are of interrupted builds.

        They are cleared before, for their room, and once more after: a compiler whose build was killed may go on
        writing for a while.
        """
        self._clear_workspaces(key)
        try:
            yield Path(tempfile.mkdtemp(prefix=f"{key}.building-", dir=self.folder))
        finally:
            self._clear_workspaces(key)

    def _clear_workspaces(self, key: str) -> None:
        for folder in self.folder.glob(f"{key}.building-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def put(self, key: str, wheel: Path, record: Mapping[str, Any], workspace: Path) -> BuiltWheel:
        """Store ``wheel`` with its record: complete in ``workspace``, then renamed into place."""
        entry = workspace / "entry"
        entry.mkdir()
        full = {**record, "wheel": wheel.name, "wheel_sha256": sha256_of(wheel)}
        wheel.replace(entry / wheel.name)
        (entry / RECORD).write_text(json.dumps(full, indent=2) + "\n")
        target = self.folder / key
        if target.exists():
            target.replace(workspace / "previous")
        entry.replace(target)
        return BuiltWheel(target / wheel.name, full, reused=False)
