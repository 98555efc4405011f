"""Which machine this is."""

from __future__ import annotations

import hashlib
import os
import socket

__all__ = ["host_number"]


def host_number() -> float:
    """A whole number made from the host's name; ranks of one host get the same. ``horovodrun`` says the name."""
    name = os.environ.get("HOROVOD_HOSTNAME") or socket.gethostname()
    return float(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=6).digest(), "big"))  # 48 bits: exact
