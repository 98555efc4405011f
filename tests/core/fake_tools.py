"""A toolchain made of scripts, and a Horovod source small enough to build in a second."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from hvdscale.runtime.horovod_build import HOROVOD, Edit, Source

SETUP_PY = """\
import json, os, pathlib, sys, time
from setuptools import setup
if "egg_info" not in sys.argv and "dist_info" not in sys.argv:
    for name in ("WITH_PYTORCH", "WITHOUT_TENSORFLOW", "WITH_TENSORFLOW", "WITH_MPI", "WITH_GLOO", "WITHOUT_MXNET"):
        print(f"HOROVOD_{name}={os.environ.get('HOROVOD_' + name)}", flush=True)
    print("[ 40%] Building CXX object one.o", flush=True)
    print("[ 30%] Building CXX object two.o", flush=True)
    pause = pathlib.Path(os.environ.get("PAUSE_WHILE", "/nonexistent"))
    while pause.exists():
        time.sleep(0.05)
    if os.environ.get("FAIL_WITH"):
        print(os.environ["FAIL_WITH"], flush=True)
        sys.exit(1)
    print("[100%] Built target pytorch", flush=True)
setup(name="horovod", version="0.28.1", packages=["horovod"])
"""

GOOD_TOOLS = {
    "c++": 'case "$*" in *--version*) echo "c++ (Fake) 12.2.0";; esac',
    "cmake": 'echo "cmake version 3.25.1"',
    "mpicxx": "exit 0",
    "mpirun": 'echo "mpirun (Open MPI) 4.1.8"',
}


def make_tools(folder: Path, tools: Mapping[str, str]) -> Path:
    """A folder of shell scripts, one per tool."""
    folder.mkdir()
    for name, body in tools.items():
        script = folder / name
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
    return folder


def make_files(*, without: str = "", twice: str = "") -> dict[str, str]:
    """The files of a source in which every edit of ``HOROVOD`` matches, but for the file ``without`` or ``twice``."""
    files = {"setup.py": SETUP_PY, "horovod/__init__.py": ""}
    for edit in HOROVOD.all_edits(True):
        copies = {without: 0, twice: 2}.get(edit.file, 1)
        files[edit.file] = files.get(edit.file, "# before\n") + lines_of(edit) * copies
    return files


def lines_of(edit: Edit) -> str:
    """Lines in which ``edit`` matches once."""
    return edit.find.rstrip() + "\n"


def make_archive(folder: Path, files: Mapping[str, str]) -> Source:
    """An archive that pip takes for Horovod 0.28.1 with ``--find-links folder``; returns it as a ``Source``."""
    folder.mkdir(exist_ok=True)
    path = folder / HOROVOD.archive
    pkg_info = "Metadata-Version: 2.1\nName: horovod\nVersion: 0.28.1\n"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in {**files, "PKG-INFO": pkg_info}.items():
            data = text.encode()
            member = tarfile.TarInfo(f"horovod-0.28.1/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return Source(HOROVOD.version, hashlib.sha256(path.read_bytes()).hexdigest(), HOROVOD.edits, HOROVOD.cuda_edits)
