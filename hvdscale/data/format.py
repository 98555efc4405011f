"""The format ``shard-v1``: which sample goes where is frozen, so that saved states keep their meaning.

``vectors`` computes a few decisions of every kind; their digest is the fingerprint that states carry. A build that
decides otherwise, for whatever reason, has another fingerprint and refuses the state. The vectors of ``shard-v1``
are kept in ``tests/golden/shard-v1.json``. A change that alters them is a new format, with a new name.
"""

from __future__ import annotations

import json
from functools import lru_cache

import numpy as np
import xxhash

from hvdscale.data.certificate import known_total
from hvdscale.data.hashing import derive_words, hash_keys
from hvdscale.data.permutation import Permutation
from hvdscale.data.positional import Positional, layout_of
from hvdscale.data.types import Share
from hvdscale.data.units import owner_table

__all__ = ["EVEN_FORMAT", "FORMAT", "fingerprint", "vectors"]

FORMAT = "shard-v1"
EVEN_FORMAT = "even-v1"  # of how units go to shards that are even by their samples: not among the vectors
_RESIZED: tuple[Share, ...] = ((4, None), (7, None), (3, (1.0, 2.5, 3.0)))


def vectors() -> dict[str, list[int]]:
    """Decisions of every kind, by name."""
    found = {f"permutation of {n}": _order(n) for n in (1, 2, 5, 1000, 4097, 262145, 10**9, 2**40 + 1)}
    salt = derive_words(1, "golden")[0]
    found["words"] = derive_words(2, "golden", 12, 3).tolist()
    found["hashes of integers"] = hash_keys([0, 1, -1, 2**40], salt).tolist()
    found["hashes of strings"] = hash_keys(["", "a", "naïve", "x" * 300], salt).tolist()
    found["hashes of bytes"] = hash_keys([b"", b"a", b"\xff\x00" * 9], salt).tolist()
    for shares in (_RESIZED[:1], _RESIZED[:2], _RESIZED):
        name = " to ".join(str(shards) for shards, _ in shares)
        found[f"units, {name} shards"] = owner_table(shares)[::3641].tolist()
        for dealt in (False, True):
            layout = layout_of(23, shares, dealt)
            found[f"{'random' if dealt else 'ordered'}, {name} shards"] = layout.place(np.arange(23))[0].tolist()
    for dealt in (False, True):
        order = Permutation(23, (7, 2)) if dealt else None
        rest = Positional(layout_of(23, _RESIZED[:1], dealt), _RESIZED[:1], order).after(
            np.array([3, 1, 0, 6]), _RESIZED
        )
        found[f"{'random' if dealt else 'ordered'}, interrupted"] = rest.owner(np.arange(23)).tolist()
    found["certificate of 1000"] = [known_total(1000)]
    return found


def _order(n: int) -> list[int]:
    positions = np.unique(np.linspace(0, n - 1, min(n, 12)).astype(np.int64))
    return [int(sample) for sample in Permutation(n, (7, 2))(positions)]


@lru_cache(maxsize=1)
def fingerprint() -> str:
    """The digest of this build's vectors."""
    return xxhash.xxh3_64_hexdigest(json.dumps(vectors(), sort_keys=True).encode())
