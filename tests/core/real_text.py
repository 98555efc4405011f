"""Lengths of real documents: the bytes of every source file of Python's own library."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

import numpy as np

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@functools.cache
def document_lengths() -> np.ndarray:
    """int64[documents]."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if not LEFT_OUT & set(p.relative_to(root).parts))
    return np.array([p.stat().st_size for p in files], np.int64)
