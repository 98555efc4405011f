"""Memory that the ranks of one host share: what one writes there the others read, without a message."""

from __future__ import annotations

import json
import mmap
import os
import secrets

import numpy as np
import numpy.typing as npt

from hvdscale.runtime.transport import Transport, broadcast

__all__ = ["shared_rows"]

Rows = npt.NDArray[np.uint8]

_PAGE_BYTES = mmap.PAGESIZE


def shared_rows(transport: Transport, rows: int, row_bytes: int) -> Rows | None:
    """uint8[rows, row_bytes or a little more], zeros, the same memory on every rank of ``transport``. Collective.

    Every rank gets ``None`` where one cannot reach it: not on one host, in containers that hide from each other, on a
    system that has no such memory, or short of it. The memory has no name that could outlive the job.
    """
    row_bytes = -(-max(row_bytes, 1) // _PAGE_BYTES) * _PAGE_BYTES
    token = secrets.token_bytes(16)
    # The token stands behind the last row, and tells this memory from that of an equally numbered process elsewhere.
    own = _create(rows * row_bytes, token) if transport.rank == 0 else None
    offer = broadcast(transport, json.dumps([os.getpid(), own, token.hex()]).encode())
    process, descriptor, token_hex = json.loads(offer)
    mapped = _map(process, descriptor, token_hex, rows * row_bytes)
    everyone = transport.allgather(b"\x01" if mapped is not None else b"\x00")
    if own is not None:
        os.close(own)
    if mapped is None or b"\x00" in everyone:
        return None
    return np.frombuffer(mapped, np.uint8, rows * row_bytes).reshape(rows, row_bytes)


def _create(size_bytes: int, token: bytes) -> int | None:
    """A file descriptor of that much memory, taken now: later there is no way to say that there is too little."""
    number = None
    try:
        number = os.memfd_create("hvdscale")
        os.posix_fallocate(number, 0, size_bytes + _PAGE_BYTES)
        os.pwrite(number, token, size_bytes)
    except (AttributeError, OSError):  # no Linux, or no memory
        if number is not None:
            os.close(number)
        return None
    return number


def _map(process: int, descriptor: int | None, token: str, size_bytes: int) -> mmap.mmap | None:
    if descriptor is None:
        return None
    try:
        number = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR)
    except OSError:
        return None
    try:
        if os.fstat(number).st_size != size_bytes + _PAGE_BYTES or os.pread(number, 16, size_bytes).hex() != token:
            return None
        return mmap.mmap(number, size_bytes + _PAGE_BYTES)
    except OSError:
        return None
    finally:
        os.close(number)
