"""What each unit of a model costs: parameters, and where there is a sample of its input, time and activations."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from hvdscale.model.graph import Edge, Graph, Node
from hvdscale.model.pipeline import INPUT
from hvdscale.runtime.transport import Transport, broadcast
from hvdscale.torch.bundles import map_tensors, pack
from hvdscale.torch.lazy import has_meta
from hvdscale.torch.program import Program

__all__ = ["graph_of"]

_REPEATS = 3


@dataclass
class _Cost:
    """Of one unit for one micro-batch: seconds (or multiplications), kept bytes, output bytes."""

    work: float = 0.0
    kept_bytes: int = 0
    output_bytes: int = 0


def graph_of(program: Program, sample: Any, ties: Mapping[int, str], transport: Transport) -> Graph:
    """The model as the planner sees it; the same on every rank. Collective.

    Args:
        sample: one micro-batch of the model's input, or ``None``: then work goes by parameters.
        ties: names of shared parameters by their ``id``.
    """
    costs = [_Cost() for _ in program.units]
    if sample is not None:
        if transport.rank == 0:
            costs = _measured(program, sample)
        rows = json.dumps([[cost.work, cost.kept_bytes, cost.output_bytes] for cost in costs]).encode()
        costs = [_Cost(*row) for row in json.loads(broadcast(transport, rows))]
    nodes = []
    for unit, cost in zip(program.units, costs, strict=True):
        tensors = {id(t): t for t in program.tensors(unit).values() if isinstance(t, nn.Parameter)}
        size = sum(t.nbytes for t in tensors.values())
        shared = {ties[number]: t.nbytes for number, t in tensors.items() if number in ties}
        nodes.append(Node(unit.name, cost.work if sample is not None else float(size), size, cost.kept_bytes, shared))
    edges = [
        Edge(source, target, costs[source].output_bytes)
        for target, unit in enumerate(program.units)
        for source in unit.reads
        if source != INPUT
    ]
    return Graph(tuple(nodes), tuple(edges))


def _measured(program: Program, sample: Any) -> list[_Cost]:
    """Run the model unit by unit: forward and backward in seconds, or in operations where weights have no memory."""
    on_meta = has_meta(program.root)
    values: dict[int, Any] = {INPUT: map_tensors(lambda t: t.to("meta"), sample) if on_meta else sample}
    state = {name: b.clone() for name, b in program.root.named_buffers()} if not on_meta else {}
    costs = []
    for number, unit in enumerate(program.units):
        given = [map_tensors(_leaf, values[source]) for source in unit.reads]
        cost = _Cost()
        times = []
        for _ in range(1 if on_meta else _REPEATS):
            owned = {t.untyped_storage()._cdata for t in program.tensors(unit).values()}
            kept: dict[int, int] = {}

            def note(tensor: Tensor, owned: set[int] = owned, kept: dict[int, int] = kept) -> Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in owned:
                    kept[storage._cdata] = storage.nbytes()
                return tensor

            counter = FlopCounterMode(display=False)
            start = time.perf_counter()
            with saved_tensors_hooks(note, lambda tensor: tensor):
                if on_meta:
                    with counter:
                        output = unit.call(program.root, *given)
                else:
                    output = unit.call(program.root, *given)
            cost.kept_bytes = sum(kept.values())
            tensors: list[Tensor] = []
            pack(output, tensors)
            cost.output_bytes = sum(t.nbytes for t in tensors)
            if on_meta:
                cost.work = 3.0 * counter.get_total_flops()
            else:
                _backward(program, number, given, tensors)
                times.append(time.perf_counter() - start)
        if times:
            cost.work = min(times)
        values[number] = map_tensors(lambda t: t.detach(), output)
        costs.append(cost)
    with torch.no_grad():
        for name, buffer in program.root.named_buffers():
            if name in state:
                buffer.copy_(state[name])
    return costs


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _backward(program: Program, number: int, given: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Gradients as the backward pass computes them, thrown away."""
    roots = [t for t in tensors if t.requires_grad]
    wanted = [t for t in program.tensors(program.units[number]).values() if t.requires_grad]
    for value in given:
        pack(value, wanted)
    wanted = [t for t in wanted if t.requires_grad]
    if roots and wanted:
        torch.autograd.grad(roots, wanted, [torch.ones_like(t) for t in roots], allow_unused=True)
