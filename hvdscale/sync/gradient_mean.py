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
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from hvdscale.errors import PlanError
from hvdscale.runtime import timeline
from hvdscale.runtime.channel import Channel
from hvdscale.sync.every_step import EveryStep
from hvdscale.sync.exchange import Mean
from hvdscale.sync.flight import Courier
from hvdscale.sync.fragments import cut
from hvdscale.sync.header import Header, Meeting, Phase
from hvdscale.sync.state import check_origin, copy_into, origin
from hvdscale.sync.tensors import TensorSpec
from hvdscale.update.outer import Float32s

__all__ = ["GradientMean"]


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
        odd = next((spec for spec in specs if spec.dtype.startswith("complex")), None)
        if odd is not None:
            raise PlanError(
                f'wire="{plan.wire}" sends real numbers, and {odd.name} is {odd.dtype}. Leave wire out: Horovod adds '
                "complex numbers as they are."
            )
        self._plan, self._specs, self._channel = plan, tuple(specs), channel
        self.fragments = tuple(reversed(cut(specs, min(messages, len(specs)), plan.codec)))
        self._means = [Mean(fragment, plan.codec, channel) for fragment in self.fragments]
        self._courier = Courier(channel, beside)
        self._sent = [0] * len(self.fragments)
        self._seconds = 0.0

    def send(self, message: int, values: Float32s) -> Future[Float32s]:
        """Begin to average ``values``, float32[n], of the tensors of ``fragments[message]``; in place.

        They are NaN afterwards where any rank's held NaN or infinity: on every rank, and nothing is kept of that step.

        Raises (in the future):
            DesyncError: ranks are at different steps.
        """
        mean, step = self._means[message], self._sent[message]
        self._sent[message] += 1
        square = float(np.dot(values, values))
        finite = bool(np.isfinite(square) or np.isfinite(values).all())
        header = Header(step, message, Phase.TRAINING, step, 1.0, finite, square, float("nan"), 0)

        def travel() -> Float32s:
            meeting = Meeting(self._channel.table(header.row()), self._channel.ranks)
            with timeline.travel("gradients", round=step, fragment=message):
                if meeting.finite.all():
                    mean(values, meeting)
                    values[...] *= mean.factor(meeting)
                else:
                    values[...] = np.nan
            return values

        began = time.monotonic()
        future = self._courier.run(travel)
        self._seconds += time.monotonic() - began
        return future

    def wait(self, sent: Future[Float32s]) -> Float32s:
        """What was sent, once it is the mean."""
        began = time.monotonic()
        with timeline.span("wait for gradients"):
            values = sent.result()
        self._seconds += time.monotonic() - began
        return values

    def metrics(self) -> dict[str, float]:
        """``rounds``: steps averaged; ``bytes_sent`` by this rank; ``seconds`` the training thread waited for them."""
        return {"rounds": self._sent[0], "bytes_sent": self._channel.sent_bytes, "seconds": self._seconds}

    def state_dict(self) -> dict[str, Any]:
        """What coding lost so far, to go on bit-equal. Between two steps."""
        arrays = {name: array.copy() for name, array in self._arrays().items()}
        return {**origin(self._plan, self._specs, self._channel), "sent": list(self._sent), "arrays": arrays}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state of ``state_dict()``.

        Raises:
            StateError: it is another rank's, model's or plan's.
        """
        check_origin(state, origin(self._plan, self._specs, self._channel))
        for name, array in self._arrays().items():
            copy_into(state["arrays"], name, array)
        self._sent = [int(state["sent"][0])] * len(self._sent)

    def _arrays(self) -> dict[str, Float32s]:
        return {
            f"gradients.{i}.{name}": array
            for i, mean in enumerate(self._means)
            for name, array in mean.arrays().items()
        }
