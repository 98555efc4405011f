"""Lengths of documents: the bytes of every source file of Python's own library, and a draw that looks like them."""

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


def drawn_lengths(documents: int = 734) -> np.ndarray:
    """int64[documents]: the same on every machine, log-normal with the mean and spread of Python 3.11's library."""
    return np.random.default_rng(0).lognormal(8.73, 1.56, documents).astype(np.int64) + 1
