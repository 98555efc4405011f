"""Gradients on their way in a narrow wire format: buckets that leave in one order on every rank, during the backward
pass where ranks are on several hosts.

They travel in a thread, on one host too: one backward pass may end the gradients of two optimizers, in another order
on each rank, and none may keep the other's from leaving. What a round is, and when it is over, is the same as in
``Reducer``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

from hvdscale.errors import PlanError
from hvdscale.runtime.channel import Channel
from hvdscale.sync import EveryStep
from hvdscale.sync.gradient_mean import GradientMean, metrics_of
from hvdscale.sync.tensors import Role
from hvdscale.torch.channel import open_channel
from hvdscale.torch.gradients import Finish
from hvdscale.torch.reducer import Reducer
from hvdscale.torch.runtime import world
from hvdscale.torch.store import TensorList, embedding_weights, spec_of, state_of_arrays, state_of_tensors

__all__ = ["CodedReducer"]

_MESSAGES = 4  # over links between hosts, where one travels while the backward pass makes the next


class CodedReducer(Reducer):
    """Averages gradients in the wire format of ``plan``.

    Args:
        plan: says the format.
        model: to know embeddings, which go as float32, if known.
        arguments: those of ``Reducer``.
    """

    def __init__(self, plan: EveryStep, model: nn.Module | None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._wire = plan
        self._embeddings = embedding_weights(model)
        self._over_hosts = world().launch.spans_hosts
        self._channel: Channel | None = None
        self._mean: GradientMean | None = None  # of what was trainable last
        self._means: dict[tuple[int, ...], GradientMean] = {}  # of all that was: what coding lost waits for its turn
        # The round:
        self._ready: set[int] = set()
        self._sent = 0

    def open(self) -> None:
        """Open the channel. Collective: a copy, which one rank alone may make, does so when it is first used."""
        self._channel = open_channel(self._process_set, patient=self._over_hosts)

    def metrics(self) -> dict[str, float]:
        """``rounds``, ``bytes_sent`` and ``seconds`` waited."""
        return metrics_of(self._means.values())

    def state_dict(self) -> dict[str, Any]:
        """Of what is trainable now."""
        return state_of_tensors(self._averaging().state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._averaging().load_state_dict(state_of_arrays(state))

    def _averaging(self) -> GradientMean:
        if not self.busy:
            self._arrange()
        if self._mean is None:
            raise PlanError("Nothing that this optimizer was given wants gradients: there is nothing to average.")
        return self._mean

    def _plan(self, positions: list[int]) -> list[list[int]]:
        if not positions:
            return []
        if self._channel is None:
            self.open()
        assert self._channel is not None
        specs = [spec_of(self._names[p], self._parameters[p], self._role(p)) for p in positions]
        key, messages = tuple(positions), _MESSAGES if self._over_hosts else 1
        if key not in self._means:
            self._means[key] = GradientMean(self._wire, specs, self._channel, messages, beside=True)
        self._mean = self._means[key]
        self._specs = dict(zip(positions, specs, strict=True))
        self._values = [np.empty(fragment.size, np.float32) for fragment in self._mean.fragments]
        return [[positions[p] for p in fragment.positions] for fragment in self._mean.fragments]

    def _open(self) -> None:
        self._ready, self._sent = set(), 0
        super()._open()

    def _role(self, position: int) -> Role:
        return "embedding" if id(self._parameters[position]) in self._embeddings else "weight"

    def _launch(self, bucket: list[int]) -> None:
        message = self._bucket_of.get(bucket[0])
        if message is None:  # unfrozen in the middle of the round: it goes as it is, coded from the next one on
            super()._launch(bucket)
            return
        if message >= self._sent:
            self._ready.add(message)
        while self._sent in self._ready:
            self._ready.remove(self._sent)
            self._flights.append((self._buckets[self._sent], self._depart(self._sent)))
            self._sent += 1

    def _depart(self, message: int) -> Finish:
        assert self._mean is not None
        mean, bucket, values = self._mean, self._buckets[message], self._values[message]
        gradients = [self._dense(position) for position in bucket]
        tensors = TensorList([(self._specs[p], g) for p, g in zip(bucket, gradients, strict=True)])
        tensors.read(range(len(bucket)), values)
        sent = mean.send(message, values)

        def finish() -> list[Tensor]:
            tensors.write(range(len(bucket)), mean.wait(sent))
            return gradients

        return finish

    def _dense(self, position: int) -> Tensor:
        gradient = self._gradient(position)
        if gradient.is_sparse:
            if not self.reduction.sparse_as_dense:
                raise PlanError(
                    f'The gradient of {self._names[position]} is sparse; wire="{self._wire.wire}" codes dense ones. '
                    "Pass sparse_as_dense=True, or leave wire out."
                )
            gradient = self._parameters[position].grad = gradient.detach().to_dense()
        return gradient.detach()
