"""Open MPI's choice of all-reduce algorithm per message size, as the file its ``tuned`` component reads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["RING_FROM_BYTES", "rules_path", "rules_text", "write_rules"]

RING_FROM_BYTES = 64 * 1024

# Numbers of Open MPI 4.1: collective 2 is all-reduce; algorithm 3 recursive doubling (fewest messages),
# 4 the ring (fewest bytes, each host adds up only its share).
_ALLREDUCE, _RECURSIVE_DOUBLING, _RING = 2, 3, 4


def rules_text() -> str:
    """The rules: recursive doubling for small messages, from ``RING_FROM_BYTES`` on the ring.

    The format is a count before each list: collectives, communicator sizes, message sizes. A line for a message
    size reads ``<from bytes> <algorithm> <topology> <segment bytes>``; zeros leave the choice to Open MPI.
    """
    by_size = (f"0 {_RECURSIVE_DOUBLING} 0 0", f"{RING_FROM_BYTES} {_RING} 0 0")
    from_ranks = 2
    return "\n".join(map(str, (1, _ALLREDUCE, 1, from_ranks, len(by_size), *by_size))) + "\n"


def rules_path(env: Mapping[str, str] | None = None) -> Path:
    """Where the rules go: a folder only this user can write, in the cache or, failing that, a temporary one."""
    env = os.environ if env is None else env
    cache = Path(env.get("XDG_CACHE_HOME") or Path(env.get("HOME") or "/nonexistent") / ".cache")
    for folder in (cache / "hvdscale", Path(tempfile.gettempdir()) / f"hvdscale-{os.getuid()}"):
        if _private(folder):
            return folder / "allreduce-rules.conf"
    return Path(tempfile.mkdtemp(prefix="hvdscale-")) / "allreduce-rules.conf"


def _private(folder: Path) -> bool:
    """Make ``folder`` if need be; whether it is ours alone to write."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return False
    is_ours = status.st_uid == os.getuid() and not status.st_mode & 0o022
    return is_ours and folder.is_dir() and not folder.is_symlink() and os.access(folder, os.W_OK)


def write_rules(path: Path) -> None:
    """Put the rules at ``path``. Ranks write the same bytes; none ever reads half a file."""
    number, fresh = tempfile.mkstemp(prefix=path.name, dir=path.parent)
    with os.fdopen(number, "w") as file:
        file.write(rules_text())
    Path(fresh).replace(path)
