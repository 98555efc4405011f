"""The mean of the ranks' gradients at every step, in a narrow wire format.

Every rank sends its coded gradient, and keeps what coding lost for the next step. Each rank adds up one share of the
codes in float32, codes the sum, again with error feedback, and sends it round: the sum cannot overflow, and every rank
gets the same bits.

Seide, Fu, Droppo, Li and Yu, "1-bit stochastic gradient descent and its application to data-parallel distributed
training of speech DNNs", 2014; Karimireddy, Rebjock, Stich and Jaggi, "Error feedback fixes SignSGD and other gradient
compression schemes", arXiv 1901.09847.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from hvdscale.errors import DesyncError, StateError
from hvdscale.runtime import timeline
from hvdscale.runtime.channel import Channel
from hvdscale.sync.every_step import EveryStep
from hvdscale.sync.exchange import Mean
from hvdscale.sync.flight import Courier
from hvdscale.sync.fragments import cut
from hvdscale.sync.header import Float64s, Header, Meeting, Phase
from hvdscale.sync.state import check_origin, copy_into, origin, reading
from hvdscale.sync.tensors import TensorSpec, check_real
from hvdscale.update.outer import Float32s

__all__ = ["GradientMean", "metrics_of"]

_ROOM = 2.0**15  # of float16, whose largest value is 65504: what coding kept is added


class GradientMean:
    """Averages the gradients of ``specs``, the same on every rank of ``channel``, step by step.

    Args:
        plan: says the wire format.
        messages: in how many parts a step's gradients travel, those of the last tensors first, as backward passes
            make them.
        beside: in a thread of its own, while the backward pass goes on.

    Raises:
        PlanError: a tensor of complex numbers.
    """

    def __init__(
        self, plan: EveryStep, specs: Sequence[TensorSpec], channel: Channel, messages: int = 1, beside: bool = False
    ) -> None:
        check_real(specs, f'wire="{plan.wire}"')
        self._plan, self._specs, self._channel = plan, tuple(specs), channel
        self.fragments = tuple(reversed(cut(specs, min(messages, len(specs)), plan.codec)))
        self._means = [Mean(fragment, plan.codec, channel) for fragment in self.fragments]
        self._courier = Courier(channel, beside)
        self._sent = [0] * len(self.fragments)
        self._seconds = 0.0
        self._sent_before_bytes = 0  # by the run that this one resumes
        told = [(spec.name, spec.shape, spec.role) for spec in self._specs]
        self._digest = zlib.crc32(repr((told, messages)).encode())

    def send(self, message: int, values: Float32s) -> Future[Float32s]:
        """Begin to average ``values``, float32[n], of the tensors of ``fragments[message]``; in place.

        They are NaN afterwards where any rank's held NaN or infinity: on every rank, and nothing of them is kept.

        Raises (in the future):
            DesyncError: ranks are at different steps, or bring the gradients of different tensors.
        """
        mean, step = self._means[message], self._sent[message]
        self._sent[message] += 1
        with np.errstate(over="ignore"):
            square = float(np.dot(values, values))
        finite = bool(np.isfinite(square) or np.isfinite(values).all())
        if finite and not np.isfinite(square):  # more than float32 holds
            square = float(np.linalg.norm(values.astype(np.float64))) ** 2
        header = Header(step, message, Phase.TRAINING, step, 1.0, finite, square, float("nan"), self._digest)

        def travel() -> Float32s:
            meeting = self._meeting(self._channel.table(header.row()))
            with timeline.travel("gradients", round=step, fragment=message):
                if meeting.finite.all():
                    self._average(mean, values, meeting)
                else:
                    values[...] = np.nan
            return values

        began = time.monotonic()
        future = self._courier.run(travel)
        self._seconds += time.monotonic() - began
        return future

    def _meeting(self, table: Float64s) -> Meeting:
        first, *others = self._channel.ranks
        others = [rank for rank, digest in zip(others, table[1:, -1], strict=True) if digest != table[0, -1]]
        if others:
            raise DesyncError(
                f"Rank {first} brings the gradients of other tensors than {', '.join(map(str, others))}. Freeze and "
                "unfreeze the same parameters on every rank, and give every rank the same model=."
            )
        return Meeting(table, self._channel.ranks)

    def _average(self, mean: Mean, values: Float32s, meeting: Meeting) -> None:
        """Scaled by a power of two where float16 has no room: a loss scaler makes gradients of that size."""
        largest = float(np.sqrt(meeting.table[:, 6].max()))
        narrow = self._plan.wire == "fp16" and largest > _ROOM
        scale = np.float32(2.0 ** -np.ceil(np.log2(largest / _ROOM))) if narrow else np.float32(1)
        scaled = [values, *mean.arrays().values()] if narrow else []
        for array in scaled:
            array *= scale
        mean(values, meeting)
        values *= mean.factor(meeting)
        for array in scaled:
            array /= scale

    def wait(self, sent: Future[Float32s]) -> Float32s:
        """What was sent, once it is the mean."""
        began = time.monotonic()
        with timeline.span("wait for gradients"):
            values = sent.result()
        self._seconds += time.monotonic() - began
        return values

    def metrics(self) -> dict[str, float]:
        """``rounds``: steps averaged; ``bytes_sent`` by this rank; ``seconds`` the training thread waited for them."""
        sent_bytes = self._sent_before_bytes + self._channel.sent_bytes
        return {"rounds": self._sent[0], "bytes_sent": sent_bytes, "seconds": self._seconds}

    def state_dict(self) -> dict[str, Any]:
        """What coding lost so far, to go on bit-equal. Between two steps."""
        arrays = {name: array.copy() for name, array in self._arrays().items()}
        told = {"sent": list(self._sent), "metrics": self.metrics()}
        return {**origin(self._plan, self._specs, self._channel), **told, "arrays": arrays}

    @reading()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state of ``state_dict()``.

        Raises:
            StateError: it is another rank's, model's or plan's, or incomplete.
        """
        check_origin(state, origin(self._plan, self._specs, self._channel))
        if not state.get("sent"):
            raise StateError("The state of optimizer.sync does not say how many steps it comes after. Save it anew.")
        for name, array in self._arrays().items():
            copy_into(state.get("arrays", {}), name, array)
        self._sent = [int(state["sent"][0])] * len(self._sent)
        before = state.get("metrics") or self.metrics()  # not in states of older versions
        self._seconds = before["seconds"]
        self._sent_before_bytes += int(before["bytes_sent"] - self.metrics()["bytes_sent"])

    def _arrays(self) -> dict[str, Float32s]:
        return {
            f"gradients.{i}.{name}": array
            for i, mean in enumerate(self._means)
            for name, array in mean.arrays().items()
        }


def metrics_of(means: Iterable[GradientMean]) -> dict[str, float]:
    """``metrics()`` of several that share a channel, as of one; of none so far: zeros."""
    figures = [mean.metrics() for mean in means] or [{"rounds": 0, "bytes_sent": 0, "seconds": 0.0}]
    added = {name: sum(one[name] for one in figures) for name in ("rounds", "seconds")}
    return {**added, "bytes_sent": max(one["bytes_sent"] for one in figures)}  # what one resumed had sent included
