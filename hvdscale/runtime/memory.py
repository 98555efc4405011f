"""Freed memory that stays in the process: a training step frees what the next one asks for again.

glibc gives memory back to the system when more than a few megabytes at the end of the heap are free, and the next step
faults every page in anew: a tenth of a small model's step. Its manual: "Malloc Tunable Parameters".
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

__all__ = ["TUNED", "Tuned", "keep_freed_memory", "set_by_user", "uses_glibc"]


@dataclass(frozen=True)
class Tuned:
    """A parameter of glibc's ``malloc``: its variable, its tunable, its number in ``malloc.h``, and our value."""

    variable: str
    tunable: str
    parameter: int
    value_bytes: int
    reason: str


TUNED = (
    Tuned(
        "MALLOC_TRIM_THRESHOLD_",
        "glibc.malloc.trim_threshold",
        -1,
        (1 << 31) - 1,
        "memory that a step frees is kept for the next one, which would fault its pages in anew; up to 2 GiB",
    ),
    Tuned(
        "MALLOC_MMAP_THRESHOLD_",
        "glibc.malloc.mmap_threshold",
        -3,
        32 << 20,
        "buffers below 32 MiB come from memory that is kept, not from the system and back each time",
    ),
)


def uses_glibc() -> bool:
    """Whether this process has glibc, whose ``malloc`` can be told so."""
    with suppress(AttributeError, ValueError, OSError):
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    return False


def set_by_user(env: Mapping[str, str]) -> dict[str, str]:
    """By variable: what the process was started with, in a variable of its own or among ``GLIBC_TUNABLES``."""
    listed = (pair.partition("=") for pair in env.get("GLIBC_TUNABLES", "").split(":"))
    tunables = {name: value for name, _, value in listed}
    found = {tuned.variable: tunables.get(tuned.tunable) or env.get(tuned.variable) for tuned in TUNED}
    return {variable: value for variable, value in found.items() if value is not None}


def keep_freed_memory(tuned: Tuned) -> bool:
    """Tell ``malloc`` of this process; whether it took the value."""
    return bool(ctypes.CDLL(None).mallopt(ctypes.c_int(tuned.parameter), ctypes.c_int(tuned.value_bytes)))
