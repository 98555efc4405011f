"""Who holds what of a model in a pipeline: names by rank, shared parameters, memory made and given up."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from hvdscale.errors import PlanError
from hvdscale.model.layout import Layout, Placement, Split
from hvdscale.model.mesh import Mesh
from hvdscale.model.pipeline import Pipeline
from hvdscale.torch.lazy import materialise, materialise_own
from hvdscale.torch.program import Program, resolve
from hvdscale.torch.randomness import apart, reseed

__all__ = ["Names", "build", "give_up", "tie", "tied_parameters"]


class Names:
    """The tensors of the whole model by name, and which of them are one; taken before anything is moved."""

    def __init__(self, program: Program) -> None:
        self.whole: dict[str, Tensor] = program.root.state_dict(keep_vars=True)
        self.same: dict[int, list[str]] = {}
        for name, tensor in self.whole.items():
            self.same.setdefault(id(tensor), []).append(name)

    def layout(self, program: Program, pipeline: Pipeline, mesh: Mesh, splits: Mapping[str, Split]) -> Layout:
        """Where each tensor lies. Names of one shared tensor lie wherever one of them does.

        ``splits``: over the tensor ranks of a stage, by name.
        """
        ranks: dict[int, set[int]] = {}
        for unit, stage in zip(program.units, pipeline.part.part_of, strict=True):
            for tensor in program.tensors(unit).values():
                ranks.setdefault(id(tensor), set()).add(stage % pipeline.ranks)
        return Layout(
            mesh,
            tuple(
                Placement(
                    name,
                    tuple(tensor.shape),
                    str(tensor.dtype).removeprefix("torch."),
                    tuple(sorted(ranks.get(id(tensor), {0}))),  # what nothing uses stays on the first rank
                    splits.get(name),
                )
                for name, tensor in self.whole.items()
            ),
        )

    def local(self, layout: Layout, rank: int, known: dict[int, Tensor]) -> dict[str, Tensor]:
        """This rank's tensors by name; ``known``: those made here, by the ``id`` of what stood for them."""
        held = [name for name in layout.names if layout.holds(name, rank)]
        return {name: known.get(id(self.whole[name]), self.whole[name]) for name in held}


def tied_parameters(program: Program, names: Names) -> dict[int, str]:
    """Parameters that several units use: ``id`` -> their first name."""
    users: dict[int, set[int]] = {}
    for number, unit in enumerate(program.units):
        for tensor in program.tensors(unit).values():
            if isinstance(tensor, nn.Parameter):
                users.setdefault(id(tensor), set()).add(number)
    return {number: names.same[number][0] for number, some in users.items() if len(some) > 1 and number in names.same}


def tie(program: Program, groups: Iterable[Sequence[str]]) -> None:
    """Make the parameters of each group of names one.

    Raises:
        PlanError: a name that is no parameter, or shapes that differ.
    """
    for group in groups:
        found = [_parameter(program.root, name) for name in group]
        for name, (_, parameter) in zip(group, found, strict=True):
            if parameter.shape != found[0][1].shape or parameter.dtype != found[0][1].dtype:
                raise PlanError(
                    f"Tied parameters are one tensor; {group[0]} has shape {list(found[0][1].shape)} and {name} "
                    f"{list(parameter.shape)}."
                )
        for name, (module, _) in zip(group, found, strict=True):
            setattr(module, name.rpartition(".")[2], found[0][1])


def _parameter(root: nn.Module, name: str) -> tuple[nn.Module, nn.Parameter]:
    try:
        module, parameter = resolve(root, name.rpartition(".")[0]), resolve(root, name)
    except AttributeError:
        parameter = None
    if not isinstance(parameter, nn.Parameter):
        known = ", ".join([n for n, _ in root.named_parameters()][:5])
        raise PlanError(f"ties names parameters; {name!r} is none. The model has {known}, ...")
    return module, parameter


def build(program: Program, nodes: Collection[int], seed: tuple[int, ...]) -> dict[int, Tensor]:
    """Make what ``nodes`` use and has no memory yet, each from the random state of its place in the model.

    Returns:
        The new tensors by the ``id`` of what stood for them.
    """
    known: dict[int, Tensor] = {}
    with apart():
        for node in sorted(nodes):
            for name in program.units[node].holds:
                held = resolve(program.root, name)
                reseed(*seed, node)
                if not isinstance(held, nn.Module):  # a parameter by itself: the module it belongs to makes it
                    owner = name.rpartition(".")[0]
                    materialise_own(resolve(program.root, owner), owner, known)
                    continue
                if name in program.lazy:
                    held = _made(program, name, held, known)
                materialise(held, name, known)
    return known


def _made(program: Program, name: str, shapes: nn.Module, known: dict[int, Tensor]) -> nn.Module:
    """The layer that ``Lazy`` makes, in its place, with shared parameters of layers before it."""
    if not any(tensor.is_meta for tensor in (*shapes.parameters(), *shapes.buffers())):
        return shapes
    made = program.lazy[name].make()
    for (inner, before), (_, after) in zip(
        shapes.named_parameters(remove_duplicate=False), made.named_parameters(remove_duplicate=False), strict=True
    ):
        if id(before) in known:
            path, _, last = inner.rpartition(".")
            setattr(made.get_submodule(path), last, known[id(before)])
        else:
            known[id(before)] = after
    known |= {id(before): after for before, after in zip(shapes.buffers(), made.buffers(), strict=True)}
    path, _, last = name.rpartition(".")
    program.root.get_submodule(path)._modules[last] = made
    made.train(shapes.training)
    return made


def give_up(program: Program, nodes: Collection[int]) -> nn.Module:
    """Move to the meta device what ``nodes`` do not use; returns a module of what they do."""
    own: dict[int, Tensor] = {}
    held = nn.Module()
    for node in sorted(nodes):
        for name in program.units[node].holds:
            it = resolve(program.root, name)
            if isinstance(it, nn.Module):
                held._modules.setdefault(name.replace(".", "/"), it)
                own |= {id(t): t for t in (*it.parameters(), *it.buffers())}
            else:
                own[id(it)] = it
                if isinstance(it, nn.Parameter):
                    held._parameters.setdefault(name.replace(".", "/"), it)
    for module in program.root.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in own and not parameter.is_meta:
                module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in own and not buffer.is_meta:
                module._buffers[name] = buffer.to("meta")
    return held
