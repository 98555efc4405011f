"""This rank's stages of a pipeline in torch: the verbs that the core's executor calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hvdscale.model.batch import Batch
from hvdscale.model.mean_check import mean_error
from hvdscale.model.pipeline import INPUT, Pipeline
from hvdscale.model.verbs import Bundle, Bytes, Spec, Units
from hvdscale.torch.bundles import NESTS
from hvdscale.torch.deferred import WeightsLater
from hvdscale.torch.host import in_memory
from hvdscale.torch.randomness import apart

__all__ = ["TorchStages"]


@dataclass
class _Kept:
    """What is kept of a forward pass until its backward pass."""

    inputs: dict[int, Bundle[Tensor]]
    outputs: dict[int, list[Tensor]] = field(default_factory=dict)  # those whose gradients come back
    loss: Tensor | None = None
    later: WeightsLater | None = None


class TorchStages:
    """Implements ``hvdscale.model.verbs.Verbs`` for tensors.

    Args:
        units: the whole model; those of this rank's stages have their weights.
        pipeline: how it is cut.
        loss: of the model's output and the target: a mean.
        count: over how many terms the loss of a target is the mean; ``None``: its samples.
        parameters: this rank's.
        tied: this rank's copy of each shared parameter, in the order of ``pipeline.ties``; ``None`` for others'.
    """

    def __init__(
        self,
        units: Units[Tensor],
        pipeline: Pipeline,
        loss: Callable[[Any, Any], Tensor],
        count: Callable[[Any], Any] | None,
        parameters: Sequence[Tensor],
        tied: Sequence[Tensor | None],
    ) -> None:
        self._units, self._pipeline, self._loss, self._tied = units, pipeline, loss, tied
        self._count, self._parameters = count or NESTS.rows, parameters
        self._part_of = pipeline.part.part_of
        self._splits = pipeline.method == "zb"
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._changing: dict[int, list[Tensor]] = {}  # by stage: buffers that a forward pass changes
        # Where this rank computes. Messages are received into the host's memory.
        self._device = next((p.device for p in parameters), torch.device("cpu"))
        self._before: list[Tensor | None] = []  # gradients of shared parameters from earlier steps
        self._batch = Batch((), (), (), False, ())
        self.losses: dict[int, float] = {}
        self.error = ""
        self.when_ready: Callable[[int], None] | None = None

    def begin(self, batch: Batch) -> None:
        """The next run is of this batch."""
        self._batch = batch
        self._kept.clear()
        self.losses, self.error = {}, ""
        if batch.trains:
            self._before = [None if p is None else p.grad for p in self._tied]
            for parameter in self._tied:
                if parameter is not None:
                    parameter.grad = None

    def forget(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def forward(
        self, stage: int, microbatch: int, inputs: Mapping[int, Bundle[Tensor]], keep: bool
    ) -> Mapping[int, Bundle[Tensor]]:
        kept = _Kept(dict(inputs))
        with torch.set_grad_enabled(self._batch.trains), apart() if self._batch.trains else nullcontext():
            values = self._run(stage, microbatch, kept)
            bundles = self._outputs(stage, values, kept)
            if stage == self._pipeline.stages - 1:
                self._evaluate(values[len(self._part_of) - 1], microbatch, kept)
        if keep or not self._batch.trains:
            self._kept[stage, microbatch] = kept
        else:
            self._kept[stage, microbatch] = _Kept(dict(inputs))
        if not self._batch.trains:
            del self._kept[stage, microbatch]
        return bundles

    def recompute(self, stage: int, microbatch: int) -> None:
        kept = self._kept[stage, microbatch]
        buffers = self._changing.get(stage, self._units.buffers(self._pipeline.part.parts[stage]))
        before = [(buffer, buffer.clone()) for buffer in buffers]
        with apart():
            values = self._run(stage, microbatch, kept)
            self._outputs(stage, values, kept)
            if stage == self._pipeline.stages - 1:
                self._evaluate(values[len(self._part_of) - 1], microbatch, kept)
        # Running statistics have counted this micro-batch already. They change without a new version of the tensor, and
        # must here too: the backward pass, which does not read them, would refuse to run.
        changed = [(buffer, value) for buffer, value in before if not torch.equal(buffer, value)]
        self._changing[stage] = [buffer for buffer, _ in changed]
        for buffer, value in changed:
            buffer.data.copy_(value)

    def backward(
        self, stage: int, microbatch: int, gradients: Mapping[int, Sequence[Tensor]]
    ) -> Mapping[int, Sequence[Tensor]]:
        given = self.backward_input(stage, microbatch, gradients)
        self.backward_weight(stage, microbatch)
        return given

    def backward_input(
        self, stage: int, microbatch: int, gradients: Mapping[int, Sequence[Tensor]]
    ) -> Mapping[int, Sequence[Tensor]]:
        kept = self._kept[stage, microbatch]
        roots: list[Tensor] = []
        starts: list[Tensor | None] = []
        for target, tensors in kept.outputs.items():
            roots += tensors
            starts += [start.to(root.device) for root, start in zip(tensors, gradients[target], strict=True)]
        if kept.loss is not None and kept.loss.requires_grad:
            roots.append(kept.loss)
            starts.append(None)
        if roots:
            torch.autograd.backward(roots, starts)
        given = {
            source: [t.grad if t.grad is not None else torch.zeros_like(t) for t in bundle.tensors if t.requires_grad]
            for source, bundle in kept.inputs.items()
        }
        kept.inputs, kept.outputs, kept.loss = {}, {}, None
        return given

    def backward_weight(self, stage: int, microbatch: int) -> None:
        kept = self._kept.pop((stage, microbatch))
        if kept.later is not None:
            kept.later.run()

    def take_gradients(self) -> list[Tensor | None]:
        """Of the parameters, in their order; they begin anew."""
        gradients = [parameter.grad for parameter in self._parameters]
        self.forget()
        return gradients

    def tied_gradient(self, number: int) -> Tensor:
        parameter = self._tied[number]
        assert parameter is not None, "another rank holds this one"
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def set_tied_gradient(self, number: int, parts: Sequence[Tensor]) -> None:
        parameter, before = self._tied[number], self._before[number]
        assert parameter is not None, "another rank holds this one"
        with torch.no_grad():
            total = parts[0].to(parameter.device, copy=True)
            for part in parts[1:]:
                total += part.to(parameter.device)
            parameter.grad = total if before is None else before.add_(total)

    def ready(self, stage: int) -> None:
        if self.when_ready is not None:
            self.when_ready(stage)

    def spec(self, tensor: Tensor) -> Spec:
        return Spec(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.requires_grad)

    def view(self, tensor: Tensor) -> Bytes:
        flat = in_memory(tensor).reshape(-1)
        view: Bytes = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
        return view

    def empty(self, spec: Spec) -> Tensor:
        return torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), requires_grad=spec.grad, device="cpu")

    def _run(self, stage: int, microbatch: int, kept: _Kept) -> dict[int, Any]:
        """Values of the stage's units, and of those it reads."""
        batch, values = self._batch, dict[int, Any]()
        for source, bundle in kept.inputs.items():
            packed = json.loads(bundle.structure)
            here = [tensor.to(self._device) for tensor in bundle.tensors]  # its gradient goes the way back
            for node, one in zip(self._pipeline.crossing[source, stage], packed, strict=True):
                values[node] = NESTS.unpack(one, here)
        if stage == 0:
            values[INPUT] = batch.x[microbatch]
        if self._splits and batch.trains:
            kept.later = WeightsLater()
        with kept.later or nullcontext():
            nodes = self._pipeline.part.parts[stage]
            seeds = self._units.seeds(nodes, (*batch.seed, microbatch)) if batch.trains else None
            self._units.run(nodes, values, seeds)
            self.error = self.error or self._units.complaint
        return values

    def _outputs(self, stage: int, values: Mapping[int, Any], kept: _Kept) -> dict[int, Bundle[Tensor]]:
        """What goes to each later stage, cut off from this stage's graph."""
        bundles = {}
        for (source, target), nodes in self._pipeline.crossing.items():
            if source != stage:
                continue
            tensors: list[Tensor] = []
            packed = [NESTS.pack(values[node], tensors) for node in nodes]
            kept.outputs[target] = [t for t in tensors if t.requires_grad]
            cut = tuple(t.detach().requires_grad_(t.requires_grad) for t in tensors)
            bundles[target] = Bundle(cut, json.dumps(packed))
        return bundles

    def _evaluate(self, output: Any, microbatch: int, kept: _Kept) -> None:
        target = self._batch.y[microbatch]
        if self._batch.check and not microbatch:
            with torch.no_grad():
                twice = lambda t: torch.cat([t, t])  # noqa: E731
                self.error = self.error or mean_error(self._loss, self._count, output, target, NESTS, twice)
        loss = self._loss(output, target)
        if not self.error and (not isinstance(loss, Tensor) or loss.numel() != 1):
            self.error = f"loss returns one number, a mean; it returned {loss!r}."[:400]
        if isinstance(loss, Tensor):
            loss = loss.sum() if loss.numel() != 1 else loss.reshape(())
            share = self._batch.shares[microbatch]
            if not share:
                return  # no term of the mean: its own loss may be 0 / 0
            self.losses[microbatch] = float(loss.detach()) * share
            kept.loss = loss * (share * self._batch.scale) if share * self._batch.scale != 1.0 else loss
