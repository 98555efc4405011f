"""This rank's stages of a pipeline in TensorFlow: the verbs that the core's executor calls.

A stage is one graph. Run under a tape it hands out what its backward pass needs, which the tape keeps until then; so
nothing is computed twice, and both passes are one call each.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from hvdscale.model.batch import Batch
from hvdscale.model.mean_check import mean_error
from hvdscale.model.pipeline import INPUT, Pipeline
from hvdscale.model.verbs import Bundle, Bytes, Spec, Units
from hvdscale.tensorflow.bundles import NESTS

__all__ = ["TensorFlowStages"]

Given = Any  # a tensor, or an array: what arrives lies in the memory it was received into


@dataclass
class _Kept:
    """What is kept of a forward pass until its backward pass."""

    inputs: dict[int, Bundle[Given]]
    sources: dict[int, list[tf.Tensor]] = field(default_factory=dict)  # those whose gradients go back
    outputs: dict[int, list[tf.Tensor]] = field(default_factory=dict)  # those whose gradients come back
    loss: tf.Tensor | None = None
    tape: tf.GradientTape | None = None


class TensorFlowStages:
    """Implements ``hvdscale.model.steps.Stages`` for tensors.

    Backward passes are not divided: ``backward_input`` does all, and ``backward_weight`` nothing.

    Args:
        units: the whole model; those of this rank's stages have their weights.
        pipeline: how it is cut.
        loss: of the model's output and the target: a mean.
        count: over how many terms the loss of a target is the mean; ``None``: its samples.
        parameters: this rank's trainable variables.
        tied: this rank's copy of each shared parameter, in the order of ``pipeline.ties``; ``None`` for others'.
    """

    def __init__(
        self,
        units: Units[tf.Variable],
        pipeline: Pipeline,
        loss: Callable[[Any, Any], Any],
        count: Callable[[Any], Any] | None,
        parameters: Sequence[tf.Variable],
        tied: Sequence[tf.Variable | None],
    ) -> None:
        self._units, self._pipeline, self._loss, self._tied = units, pipeline, loss, tied
        self._count, self._parameters = count or NESTS.rows, parameters
        self._gradients: dict[int, Any] = {}  # by id of the variable
        self._graphs: dict[tuple[int, bool], Any] = {}  # by stage, and whether it learns
        self._kept: dict[tuple[int, int], _Kept] = {}
        self._batch = Batch((), (), (), False, ())
        self.losses: dict[int, float] = {}
        self.error = ""

    def begin(self, batch: Batch) -> None:
        self._batch = batch
        self._kept.clear()
        self.losses, self.error = {}, ""

    def forget(self) -> None:
        self._gradients.clear()

    def take_gradients(self) -> list[Any]:
        """Of the parameters, in their order; they begin anew."""
        gradients = [self._gradients.get(id(parameter)) for parameter in self._parameters]
        self.forget()
        return gradients

    def forward(
        self, stage: int, microbatch: int, inputs: Mapping[int, Bundle[Given]], keep: bool
    ) -> Mapping[int, Bundle[Given]]:
        kept = _Kept(dict(inputs))
        bundles = self._run(stage, microbatch, kept, keep)
        if self._batch.trains:
            self._kept[stage, microbatch] = kept if keep else _Kept(dict(inputs))
        return bundles

    def recompute(self, stage: int, microbatch: int) -> None:
        buffers = self._units.buffers(self._pipeline.part.parts[stage])
        before = [tf.identity(buffer) for buffer in buffers]
        self._run(stage, microbatch, self._kept[stage, microbatch], True)
        for buffer, value in zip(buffers, before, strict=True):  # they have counted this micro-batch already
            buffer.assign(value)

    def backward(
        self, stage: int, microbatch: int, gradients: Mapping[int, Sequence[Given]]
    ) -> Mapping[int, Sequence[Given]]:
        kept = self._kept.pop((stage, microbatch))
        assert kept.tape is not None, "a forward pass that is kept comes before"
        roots: list[tf.Tensor] = []
        starts: list[tf.Tensor] = []
        for target, tensors in kept.outputs.items():
            roots += tensors
            starts += [tf.convert_to_tensor(gradient) for gradient in gradients[target]]
        if kept.loss is not None:
            share = self._batch.shares[microbatch] * self._batch.scale
            roots.append(kept.loss)
            starts.append(tf.fill(kept.loss.shape, tf.cast(share, kept.loss.dtype)))
        inputs = [tensor for tensors in kept.sources.values() for tensor in tensors]
        found = kept.tape.gradient(roots, [*inputs, *self._parameters], starts) if roots else None
        found = found or [None] * (len(inputs) + len(self._parameters))
        for parameter, gradient in zip(self._parameters, found[len(inputs) :], strict=True):
            if gradient is not None:
                self._gradients[id(parameter)] = _sum(self._gradients.get(id(parameter)), gradient)
        left = iter(found[: len(inputs)])
        return {
            source: [_or_zeros(next(left), tensor) for tensor in tensors] for source, tensors in kept.sources.items()
        }

    backward_input = backward

    def backward_weight(self, stage: int, microbatch: int) -> None:
        """Nothing is left to do."""

    def tied_gradient(self, number: int) -> Given:
        parameter = self._tied[number]
        assert parameter is not None, "another rank holds this one"
        return tf.convert_to_tensor(_or_zeros(self._gradients.get(id(parameter)), parameter))

    def set_tied_gradient(self, number: int, parts: Sequence[Given]) -> None:
        total = tf.convert_to_tensor(parts[0])
        for part in parts[1:]:
            total += part
        self._gradients[id(self._tied[number])] = total

    def ready(self, stage: int) -> None:
        """Gradients are handed to the optimizer, which reduces them."""

    def spec(self, tensor: Given) -> Spec:
        dtype = tf.as_dtype(tensor.dtype)
        return Spec(tuple(tensor.shape), dtype.name, dtype.is_floating)

    def view(self, tensor: Given) -> Bytes:
        if isinstance(tensor, tf.Tensor):
            narrow = tf.bitcast(tensor, tf.uint16) if tensor.dtype == tf.bfloat16 else tensor  # no buffer knows it
            tensor = np.asarray(memoryview(narrow))
        view: Bytes = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        return view

    def empty(self, spec: Spec) -> Given:
        return np.empty(spec.shape, tf.as_dtype(spec.dtype).as_numpy_dtype)

    def _run(self, stage: int, microbatch: int, kept: _Kept, keep: bool) -> dict[int, Bundle[Given]]:
        """One pass through the graph of a stage; with a tape, if its backward pass will follow."""
        batch, last = self._batch, stage == self._pipeline.stages - 1
        values: dict[str, Any] = {}
        for source, bundle in kept.inputs.items():
            tensors = [tf.convert_to_tensor(tensor) for tensor in bundle.tensors]
            kept.sources[source] = [tensor for tensor in tensors if tensor.dtype.is_floating]
            packed = json.loads(bundle.structure)
            for node, one in zip(self._pipeline.crossing[source, stage], packed, strict=True):
                values[str(node)] = NESTS.unpack(one, tensors)
        if stage == 0:
            values[str(INPUT)] = batch.x[microbatch]
        target = batch.y[microbatch] if last else None
        seeds = None
        if batch.trains:
            seeds = self._units.seeds(self._pipeline.part.parts[stage], (*batch.seed, microbatch))
            seeds = tf.constant(seeds, tf.int32)
        graph = self._graph(stage, batch.trains)
        if keep and batch.trains:
            kept.tape = tf.GradientTape(watch_accessed_variables=False)
            with kept.tape:
                for tensor in (*self._parameters, *(t for some in kept.sources.values() for t in some)):
                    kept.tape.watch(tensor)
                outputs, loss, output = graph(values, target, seeds)
        else:
            outputs, loss, output = graph(values, target, seeds)
        self.error = self.error or self._units.complaint
        if last:
            self._note_loss(loss, output, target, microbatch, kept)
        return {int(to): self._bundle(int(to), given, kept) for to, given in outputs.items()}

    def _bundle(self, target: int, given: Sequence[Any], kept: _Kept) -> Bundle[Given]:
        tensors: list[tf.Tensor] = []
        packed = [NESTS.pack(value, tensors) for value in given]
        kept.outputs[target] = [tensor for tensor in tensors if tensor.dtype.is_floating]
        return Bundle(tuple(tensors), json.dumps(packed))

    def _graph(self, stage: int, learns: bool) -> Any:
        """The stage as one function: values of what it reads -> what goes to each later stage, the loss, the output."""
        if (stage, learns) in self._graphs:
            return self._graphs[stage, learns]
        nodes = self._pipeline.part.parts[stage]
        leaving = {to: crossing for (source, to), crossing in self._pipeline.crossing.items() if source == stage}
        last = stage == self._pipeline.stages - 1

        def run(given: dict[str, Any], target: Any, seeds: Any) -> Any:
            values = {int(node): value for node, value in given.items()}
            self._units.run(nodes, values, seeds)
            outputs = {str(to): [values[node] for node in crossing] for to, crossing in leaving.items()}
            if not last:
                return outputs, None, None
            output = values[len(self._pipeline.part.part_of) - 1]
            return outputs, tf.convert_to_tensor(self._loss(output, target)), output

        self._graphs[stage, learns] = tf.function(run, autograph=False, reduce_retracing=True)
        return self._graphs[stage, learns]

    def _note_loss(self, loss: tf.Tensor, output: Any, target: Any, microbatch: int, kept: _Kept) -> None:
        if self._batch.check and not microbatch:
            count = self._count
            twice = lambda t: tf.concat([t, t], 0)  # noqa: E731
            self.error = self.error or mean_error(self._loss, count, output, target, NESTS, twice)
        if not self.error and any(length != 1 for length in loss.shape):
            self.error = f"loss returns one number, a mean; it returned a tensor of shape {list(loss.shape)}."
        share = self._batch.shares[microbatch]
        if share:  # else no term of the mean: its own loss may be 0 / 0
            self.losses[microbatch] = float(tf.reduce_sum(loss)) * share
            kept.loss = loss


def _sum(before: Any, gradient: Any) -> Any:
    """Slices stay slices, one behind another, as they are in a batch that is not divided."""
    if before is None:
        return gradient
    if isinstance(before, tf.IndexedSlices) and isinstance(gradient, tf.IndexedSlices):
        rows = tf.concat([before.indices, gradient.indices], 0)
        return tf.IndexedSlices(tf.concat([before.values, gradient.values], 0), rows, before.dense_shape)
    return tf.convert_to_tensor(before) + tf.convert_to_tensor(gradient)


def _or_zeros(gradient: Any, like: Any) -> Any:
    return tf.zeros_like(like) if gradient is None else gradient
