"""What each unit of a model costs: parameters, and where there is a sample of its input, time and activations."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from hvdscale.model.pipeline import INPUT
from hvdscale.model.survey import Cost, Reading
from hvdscale.torch.bundles import NESTS
from hvdscale.torch.lazy import has_meta
from hvdscale.torch.program import Program

__all__ = ["measure", "readings"]

_REPEATS = 3


def readings(program: Program) -> list[Reading]:
    """The program's units as the planner reads them; parameters by their ``id``."""
    found = []
    for unit in program.units:
        tensors = {id(t): t for t in program.tensors(unit).values() if isinstance(t, nn.Parameter)}
        found.append(Reading(unit.name, unit.reads, {key: t.nbytes for key, t in tensors.items()}))
    return found


def measure(program: Program, sample: Any) -> list[Cost]:
    """Run the model unit by unit: forward and backward in seconds, or in operations where weights have no memory.

    Args:
        sample: one micro-batch of the model's input.
    """
    on_meta = has_meta(program.root)
    values: dict[int, Any] = {INPUT: NESTS.map(lambda t: t.to("meta"), sample) if on_meta else sample}
    state = {name: b.clone() for name, b in program.root.named_buffers()} if not on_meta else {}
    costs = []
    for number, unit in enumerate(program.units):
        given = [NESTS.map(_leaf, values[source]) for source in unit.reads]
        cost = Cost()
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
            start = _now(program.root)
            with saved_tensors_hooks(note, lambda tensor: tensor):
                if on_meta:
                    with counter:
                        output = unit.call(program.root, *given)
                else:
                    output = unit.call(program.root, *given)
            cost.kept_bytes = sum(kept.values())
            tensors: list[Tensor] = []
            NESTS.pack(output, tensors)
            cost.output_bytes = sum(t.nbytes for t in tensors)
            if on_meta:
                cost.work = 3.0 * counter.get_total_flops()
            else:
                _backward(program, number, given, tensors)
                times.append(_now(program.root) - start)
        if times:
            cost.work = min(times)
        values[number] = NESTS.map(lambda t: t.detach(), output)
        costs.append(cost)
    with torch.no_grad():
        for name, buffer in program.root.named_buffers():
            if name in state:
                buffer.copy_(state[name])
    return costs


def _now(model: nn.Module) -> float:
    """Seconds, once what was asked of the model's device is done."""
    device = next((p.device for p in model.parameters()), None)
    if device is not None and device.type not in ("cpu", "meta"):
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_(tensor.is_floating_point())


def _backward(program: Program, number: int, given: Sequence[Any], tensors: Sequence[Tensor]) -> None:
    """Gradients as the backward pass computes them, thrown away."""
    roots = [t for t in tensors if t.requires_grad]
    wanted = [t for t in program.tensors(program.units[number]).values() if t.requires_grad]
    for value in given:
        NESTS.pack(value, wanted)
    wanted = [t for t in wanted if t.requires_grad]
    if roots and wanted:
        torch.autograd.grad(roots, wanted, [torch.ones_like(t) for t in roots], allow_unused=True)
