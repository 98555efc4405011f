"""What workers and servers write to each other: a head of numbers, a ledger of numbers, and weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from hvdscale.update.outer import Float32s

__all__ = ["Answer", "Ask", "Message"]

Bytes = npt.NDArray[np.uint8]
Float64s = npt.NDArray[np.float64]


class Ask(IntEnum):
    """What a worker asks of a server. ``READ`` is answered at once; the others when it is their turn."""

    PUSH = 0  # here is my change; give me the weights when nobody is too far behind
    READ = 1  # give me the weights
    FLUSH = 2  # here is my last change; give me the weights when everyone is here
    SAVE = 3  # give me what a checkpoint needs when everyone who trains is here
    LOAD = 4  # go on from this checkpoint when everyone who trains is here


class Answer(IntEnum):
    """What a server answers."""

    WEIGHTS = 10
    STATE = 11
    APART = 12  # everyone waits for something else; the ledger says for what
    MISCOUNT = 13  # a push was lost or came twice
    COUNTED_OUT = 14  # the others go on without this worker


_HEAD = 8  # float64 values


@dataclass
class Message:
    """One message.

    Args:
        kind: an ``Ask`` or an ``Answer``.
        clock: pushes the worker has made, this one included; in an answer those of the slowest that trains.
        weight: how much a push counts; in an answer unused.
        stale: pushes of others that moved the weights between the worker's last pull and its push.
        ledger: float64[k], what few numbers belong to the kind.
        values: float32[n], weights or a change of them; empty where there are none.
    """

    kind: int
    clock: int = 0
    weight: float = 0.0
    stale: int = 0
    ledger: Float64s = field(default_factory=lambda: np.zeros(0))
    values: Float32s = field(default_factory=lambda: np.zeros(0, np.float32))

    def encode(self) -> Bytes:
        """The message as uint8[64 + 8 k + 4 n]."""
        data = Message.blank(self.ledger.size, self.values.size)
        Message.parts(data)[2][:] = self.values
        return self.over(data)

    def over(self, data: Bytes) -> Bytes:
        """Write head and ledger into ``data``, made by ``blank`` for as many; its values stay."""
        head, ledger, values = Message.parts(data)
        head[:] = (self.kind, self.clock, self.weight, self.stale, ledger.size, values.size, 0, 0)
        ledger[:] = self.ledger
        return data

    @staticmethod
    def blank(ledger: int, values: int) -> Bytes:
        """Room for a message with so many numbers."""
        data = np.empty(8 * (_HEAD + ledger) + 4 * values, np.uint8)
        data[: 8 * _HEAD].view(np.float64)[4:6] = ledger, values
        return data

    @staticmethod
    def parts(data: Bytes) -> tuple[Float64s, Float64s, Float32s]:
        """Head, ledger and values of a message, as views."""
        head = data[: 8 * _HEAD].view(np.float64)
        end = 8 * (_HEAD + int(head[4]))
        return head, data[8 * _HEAD : end].view(np.float64), data[end:].view(np.float32)

    @staticmethod
    def decode(data: Bytes) -> Message:
        """The message in ``data``; ledger and values are views of it."""
        head, ledger, values = Message.parts(data)
        kind, clock, weight, stale = head[:4]
        return Message(int(kind), int(clock), float(weight), int(stale), ledger, values)
