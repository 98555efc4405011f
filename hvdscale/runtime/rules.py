"""Open MPI's choice of all-reduce algorithm per message size, as the file its ``tuned`` component reads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["ring_from_bytes", "rules_path", "rules_text", "write_rules"]

# Numbers of Open MPI 4.1: collective 2 is all-reduce. Recursive doubling sends the fewest messages. Halving and
# doubling (Rabenseifner) sends fewer bytes in a few more messages, but both ways between the same two ranks at
# once: over TCP it took twice the ring's time. The ring sends the fewest bytes, one way round, in the most messages.
_ALLREDUCE = 2
_RECURSIVE_DOUBLING, _RING, _HALVING_AND_DOUBLING = 3, 4, 6

_HALVING_FROM_BYTES = 32 * 1024
_RING_SHARE_BYTES = 32 * 1024
_RANKS = (2, 4, 8, 16, 32, 64, 128, 256)


def ring_from_bytes(ranks: int) -> int:
    """The message from which the ring is worth its 2(n-1) messages: every rank's share is then 32 KiB or more."""
    return ranks * _RING_SHARE_BYTES


def rules_text() -> str:
    """The rules, a table for each number of ranks from which it holds.

    The format is a count before each list: collectives, communicator sizes, message sizes. A line for a message
    size reads ``<from bytes> <algorithm> <topology> <segment bytes>``; zeros leave the choice to Open MPI.
    """
    lines: list[object] = [1, _ALLREDUCE, len(_RANKS)]
    for ranks in _RANKS:
        by_size = {
            0: _RECURSIVE_DOUBLING,
            _HALVING_FROM_BYTES: _HALVING_AND_DOUBLING,
            ring_from_bytes(ranks): _RING,
        }
        lines += [ranks, len(by_size), *(f"{size} {algorithm} 0 0" for size, algorithm in by_size.items())]
    return "\n".join(map(str, lines)) + "\n"


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
