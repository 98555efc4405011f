"""A model as a list of units, each of which reads the outputs of earlier ones: what stages are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hvdscale.errors import PlanError
from hvdscale.model.pipeline import INPUT
from hvdscale.torch.lazy import Lazy
from hvdscale.torch.randomness import reseed
from hvdscale.torch.skips import Pop, Push

__all__ = ["Program", "Unit", "from_layers", "resolve"]


@dataclass(frozen=True)
class Unit:
    """One step of a model.

    Args:
        name: in messages and tables.
        reads: the units (``INPUT``: the model's input) whose outputs it takes.
        call: ``call(root, *values) -> value``.
        holds: names in the root of the modules, parameters and buffers it uses.
    """

    name: str
    reads: tuple[int, ...]
    call: Callable[..., Any]
    holds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Program:
    """Units in the order in which they run; the last one gives the model's output.

    Args:
        root: holds all modules under the names of the unsharded model; some may be on the meta device.
        lazy: by name, what makes a module of the root that stands there without memory.
    """

    root: nn.Module
    units: tuple[Unit, ...]
    lazy: dict[str, Lazy]

    @property
    def complaint(self) -> str:
        return ""

    def tensors(self, unit: Unit) -> dict[str, Tensor]:
        """Parameters and persistent buffers that a unit uses, by their names in the unsharded model."""
        found: dict[str, Tensor] = {}
        for name in unit.holds:
            held = resolve(self.root, name)
            if isinstance(held, nn.Module):
                found |= held.state_dict(prefix=f"{name}." if name else "", keep_vars=True)
            else:
                found[name] = held
        return found

    def seeds(self, nodes: Sequence[int], place: tuple[int, ...]) -> tuple[int, ...]:
        """Each unit draws from the random state of its place."""
        return place

    def run(self, nodes: Sequence[int], values: dict[int, Any], seeds: tuple[int, ...] | None) -> None:
        """Add the outputs of units ``nodes`` to ``values``."""
        for node in nodes:
            unit = self.units[node]
            if seeds is not None:
                reseed(*seeds, node)
            values[node] = unit.call(self.root, *(values[source] for source in unit.reads))

    def buffers(self, nodes: Sequence[int]) -> list[Tensor]:
        """Of the modules of these units."""
        held = [resolve(self.root, name) for node in nodes for name in self.units[node].holds]
        return list({id(b): b for it in held if isinstance(it, nn.Module) for b in it.buffers()}.values())


def resolve(root: nn.Module, name: str) -> Any:
    """The module, parameter or buffer called ``name``."""
    found: Any = root
    for part in filter(None, name.split(".")):
        found = getattr(found, part)
    return found


def from_layers(model: Any) -> Program:
    """The units of an ``nn.Sequential`` or a list of layers, each reading the one before it.

    Raises:
        PlanError: something that is no layer, or a skip that is popped but not pushed.
    """
    lazy: dict[str, Lazy] = {}
    if isinstance(model, nn.Sequential):
        root: nn.Module = model
        layers = list(_flattened(model, ""))
    elif isinstance(model, (list, tuple)) and model:
        root, layers = nn.Module(), []
        for number, entry in enumerate(model):
            name, layer = _named(number, entry)
            if isinstance(layer, Lazy):
                lazy[name] = layer
                layer = layer.shapes()
            if isinstance(layer, nn.Module):
                _place(root, name, layer)
                layers += (
                    _flattened(layer, name)
                    if isinstance(layer, nn.Sequential) and name not in lazy
                    else [(name, layer)]
                )
            elif callable(layer):
                layers.append((name, layer))
            else:
                raise PlanError(f"A layer is a module, a function or hvd.Lazy(...); number {number} is {layer!r}.")
    else:
        raise PlanError(
            f'by="layers" takes an nn.Sequential or a list of layers; this is a {type(model).__name__}. List its '
            'layers ([("embed", model.embed), ...]), or use by="graph".'
        )
    return Program(root, _chain(layers), lazy)


def _named(number: int, entry: Any) -> tuple[str, Any]:
    """A layer may come with its name in the unsharded model."""
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str):
        return entry
    return str(number), entry


def _flattened(model: nn.Sequential, prefix: str) -> list[tuple[str, Any]]:
    layers: list[tuple[str, Any]] = []
    for name, layer in model._modules.items():  # named_children() leaves out a layer that stands there a second time
        full = f"{prefix}.{name}" if prefix else name
        layers += _flattened(layer, full) if type(layer) is nn.Sequential else [(full, layer)]
    return layers


def _place(root: nn.Module, name: str, layer: nn.Module) -> None:
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    if last in root._modules:
        raise PlanError(f"Layers have names of their own; {name!r} is used twice.")
    root.add_module(last, layer)


def _chain(layers: Sequence[tuple[str, Any]]) -> tuple[Unit, ...]:
    units: list[Unit] = []
    pushed: dict[int, int] = {}  # id of the skip -> the unit that pushed it
    for place, (name, layer) in enumerate(layers):
        reads: tuple[int, ...] = (place - 1 if place else INPUT,)
        if isinstance(layer, Push):
            pushed[id(layer.skip)] = place
            units.append(Unit(name, reads, lambda root, x: x))
        elif isinstance(layer, Pop):
            if id(layer.skip) not in pushed:
                raise PlanError(f"A skip is pushed before it is popped; layer {name} pops one that no layer pushed.")
            reads = (*reads, pushed.pop(id(layer.skip)))
            inner = f"{name}.combine" if isinstance(layer.combine, nn.Module) else None
            units.append(_call(name, reads, layer.combine, inner))
        else:
            units.append(_call(name, reads, layer, name if isinstance(layer, nn.Module) else None))
    return tuple(units)


def _call(name: str, reads: tuple[int, ...], layer: Callable[..., Any], module: str | None) -> Unit:
    if module is None:
        return Unit(name, reads, lambda root, *values: layer(*values))
    # By name: a layer without memory is replaced when it is made.
    return Unit(name, reads, lambda root, *values: resolve(root, module)(*values), (module,))
