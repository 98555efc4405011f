"""What a host has put on its link, as the kernel counts it at the interface."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["HEADER_BYTES", "Traffic"]

HEADER_BYTES = 14 + 20 + 32  # of a packet: Ethernet, IPv4, and TCP with time stamps


@dataclass(frozen=True)
class Traffic:
    """``total_bytes`` in ``packets``: data, the headers of every packet, and packets that only acknowledge."""

    total_bytes: int = 0
    packets: int = 0

    @classmethod
    def sent(cls, table: str) -> Traffic:
        """By ``eth0``, in the text of ``/proc/net/dev``; nothing where there is none."""
        found = [line.split(":")[1].split() for line in table.splitlines() if line.strip().startswith("eth0:")]
        return cls(int(found[0][8]), int(found[0][9])) if found else cls()

    @classmethod
    def sent_here(cls, process: int | str = "self") -> Traffic:
        """By the host that ``process`` runs on."""
        return cls.sent(Path(f"/proc/{process}/net/dev").read_text())

    def since(self, before: Traffic) -> Traffic:
        return Traffic(self.total_bytes - before.total_bytes, self.packets - before.packets)

    @property
    def data_bytes(self) -> int:
        """Without the headers: what programs gave TCP to send, sent again where it was lost."""
        return self.total_bytes - HEADER_BYTES * self.packets
