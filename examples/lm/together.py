"""Starting the language model examples on all ranks or on none: what one rank lacks, every rank is told at once."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from hvdscale.errors import PlanError
from lm.batches import Share, load_share
from lm.flags import check_flags

Mean = Callable[[np.ndarray], np.ndarray]
"""The average of a float64 vector over the ranks."""


def load_together(flags: argparse.Namespace, rank: int, ranks: int, mean: Mean) -> Share:
    """Check the command line and the places to write to, and load this rank's share of the text.

    Raises:
        PlanError: on every rank, if something is wrong on one of them or they read different texts.
    """
    problem, share = "", None
    try:
        check_flags(flags)
        if rank == 0:  # which alone writes
            check_outputs(flags)
        share = load_share(flags, rank, ranks)
    except PlanError as error:
        problem = str(error)
    if _anywhere(bool(problem), mean) or share is None:
        raise PlanError(problem or "another rank cannot start; it says why.")
    # Parts of 16 bits: their mean is exact, so it is this rank's own where all ranks have the same.
    parts = np.frombuffer(share.digest, np.uint16).astype(np.float64)
    if _anywhere(bool((mean(parts) != parts).any()), mean):
        raise PlanError(
            f"The ranks read different texts; rank {rank} has {share.description}. "
            "Give every machine the same files, and with --data left out the same Python."
        )
    return share


def _anywhere(here: bool, mean: Mean) -> bool:
    return float(mean(np.array([here], np.float64))[0]) > 0


def check_outputs(flags: argparse.Namespace) -> None:
    """Raises PlanError now for what could not be written at the end."""
    for flag, package in (("logdir", "tensorboard"), ("plot", "matplotlib")):
        if getattr(flags, flag) and importlib.util.find_spec(package) is None:
            raise PlanError(f"--{flag} needs {package}: pip install 'hvdscale[viz]'")
    if flags.logdir:
        _check_writable("logdir", Path(flags.logdir))
    for flag in ("plot", "record"):
        if getattr(flags, flag):
            path = Path(getattr(flags, flag))
            if path.is_dir():
                raise PlanError(f"--{flag} names a file; {str(path)!r} is a folder.")
            _check_writable(flag, path.absolute().parent)
    if flags.plot:
        from matplotlib.figure import Figure

        known = Figure().canvas.get_supported_filetypes()
        if Path(flags.plot).suffix.lower().removeprefix(".") not in known:
            raise PlanError(f"--plot ends in one of {', '.join(sorted(known))}; it is {flags.plot!r}.")


def _check_writable(flag: str, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PlanError(f"--{flag}: the folder {str(folder)!r} cannot be made ({error.strerror}).") from None
    if not os.access(folder, os.W_OK):
        raise PlanError(f"--{flag}: no permission to write into {str(folder)!r}.")
