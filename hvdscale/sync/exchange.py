"""The mean of the ranks' pseudo-gradients, each in its wire format: sums are made in float32 and lose nothing twice."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from hvdscale.runtime.channel import Channel
from hvdscale.sync.fragments import Fragment
from hvdscale.sync.header import Float64s, Meeting, shares_of
from hvdscale.sync.wire import Codec
from hvdscale.update.outer import Float32s

__all__ = ["Exchange", "Mean"]


class Exchange(Protocol):
    """How what the ranks bring of one fragment becomes one, or, among neighbours, closer to one. Collective."""

    def arrays(self) -> dict[str, Float32s]:
        """What belongs into a checkpoint of this rank."""
        ...

    def __call__(self, values: Float32s, meeting: Meeting) -> None:
        """Replace ``values``, float32[n] and finite, by the ranks' mean, in the wire format of the plan."""
        ...

    def beside(self, values: Float32s, meeting: Meeting, votes: Float64s) -> None:
        """The same of any float32 vector, in float32, with ``votes``, float64[ranks]; a rank without may bring NaN."""
        ...

    def factor(self, meeting: Meeting) -> np.float32:
        """What ``values`` must still be multiplied by after the call, by whoever goes over them next."""
        ...


class Mean:
    """The mean over ``channel``. Keeps what the wire lost, to send it the next time.

    ``residual``, float32[coded], is what this rank's own messages lost; ``residual_of_sum`` what its share of the
    coded sum lost.
    """

    def __init__(self, fragment: Fragment, codec: Codec, channel: Channel) -> None:
        self._coded = fragment.coded
        self._codec = codec
        self._channel = channel
        lossy = bool(fragment.coded)
        self._share = -(-fragment.coded // (channel.size * codec.unit)) * codec.unit  # values each rank adds up
        self.residual = np.zeros(fragment.coded if lossy else 0, np.float32)
        self.residual_of_sum = np.zeros(self._share if lossy and codec.way == "scatter" else 0, np.float32)

    def arrays(self) -> dict[str, Float32s]:
        return {"residual": self.residual, "residual_of_sum": self.residual_of_sum}

    def __call__(self, values: Float32s, meeting: Meeting) -> None:
        if self._equal(meeting.shares):
            self._channel.allreduce(values)
        else:
            self.add(values, meeting.shares)

    def beside(self, values: Float32s, meeting: Meeting, votes: Float64s) -> None:
        self.add_exactly(values, shares_of(votes))

    def factor(self, meeting: Meeting) -> np.float32:
        return np.float32(meeting.shares[0] if self._equal(meeting.shares) else 1)

    def _equal(self, shares: Float64s) -> bool:
        """A plain sum does, and dividing it costs no pass of its own."""
        return not self._coded and bool(shares[0] and (shares == shares[0]).all())

    def add_exactly(self, values: Float32s, shares: Float64s) -> None:
        """Replace ``values`` by their mean over ranks weighted with ``shares``, in float32."""
        mine = np.float32(shares[self._channel.rank])
        if mine:
            values *= mine
        else:
            values[:] = 0
        if values.size:
            self._channel.allreduce(values)

    def add(self, values: Float32s, shares: Float64s) -> None:
        """The same in the wire format; ``values`` are finite."""
        self.add_exactly(values[self._coded :], shares)
        if not self._coded:
            return
        way = self._gather if self._codec.way == "gather" else self._scatter
        way(values[: self._coded], shares, votes=bool(shares[self._channel.rank]))

    def _gather(self, values: Float32s, shares: Float64s, votes: bool) -> None:
        code = np.zeros(self._codec.size(values.size), np.uint8)
        if votes:
            self._codec.take(self.residual, values, code)
        values[:] = 0
        for share, theirs in zip(shares, self._channel.allgather(code), strict=True):
            if share:
                self._codec.add(theirs, np.float32(share), values)

    def _scatter(self, values: Float32s, shares: Float64s, votes: bool) -> None:
        codes = np.zeros((self._channel.size, self._codec.size(self._share)), np.uint8)
        for rank, code in enumerate(codes if votes else ()):
            self._codec.take(self._for(rank, self.residual), self._for(rank, values), code)
        for share, theirs in zip(shares, self._channel.alltoall(codes), strict=True):
            if share:
                self._codec.add(theirs, np.float32(share), self.residual_of_sum)
        self._codec.take(self.residual_of_sum, None, codes[0])
        for rank, sums in enumerate(self._channel.allgather(codes[0])):
            self._codec.decode(sums, self._for(rank, values))

    def _for(self, rank: int, values: Float32s) -> Float32s:
        """The share of ``values`` that ``rank`` adds up; the last ranks' may be shorter, or empty."""
        return values[rank * self._share : (rank + 1) * self._share]
