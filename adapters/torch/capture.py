"""The units of any model, found by tracing it with ``torch.fx``: one for each operation or layer of torch's own.

Where a submodule cannot be traced, it becomes one unit as a whole, with all that is inside.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from torch import fx, nn

from hvdscale.errors import PlanError
from hvdscale.model.pipeline import INPUT
from hvdscale.torch.program import Program, Unit, resolve

__all__ = ["capture"]

Whole = type[nn.Module] | str


def capture(model: nn.Module, whole: Collection[Whole] = ()) -> tuple[Program, tuple[str, ...]]:
    """The model's units, and the names of the submodules that had to stay in one piece.

    Args:
        whole: types or names of submodules that are not to be traced into, such as a block of a transformer.

    Raises:
        PlanError: the model's own ``forward`` cannot be traced: what stopped it, and what to do.
    """
    if not isinstance(model, nn.Module):
        raise PlanError(f'by="graph" takes an nn.Module; this is a {type(model).__name__}. A list goes by="layers".')
    kept: dict[str, str] = {}
    while True:
        tracer = _Tracer(whole, kept)
        try:
            graph = tracer.trace(model)
            break
        except Exception as error:
            if not tracer.blamed or tracer.blamed in kept:
                raise PlanError(_stopped(model, error)) from error
            kept[tracer.blamed] = str(error)
    return _program(model, graph), tuple(kept)


class _Tracer(fx.Tracer):
    """Notes the innermost submodule in which tracing failed."""

    def __init__(self, whole: Collection[Whole], kept: Collection[str]) -> None:
        super().__init__(autowrap_functions=())
        self._types = tuple(entry for entry in whole if isinstance(entry, type))
        self._names = {entry for entry in whole if isinstance(entry, str)} | set(kept)
        self.blamed = ""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        chosen = isinstance(m, self._types) or module_qualified_name in self._names
        return chosen or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.blamed = self.blamed or self.path_of_module(m)
            raise


def _stopped(model: nn.Module, error: Exception) -> str:
    where, trace = "", error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_name == "forward" and "torch/fx" not in code.co_filename:
            where = f" at {code.co_filename}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return (
        f"{type(model).__name__}.forward cannot be captured{where}: {error}. Its control flow must not depend on "
        "values of tensors. Move what does into a submodule, which then stays in one piece; or list the model's layers "
        'and use by="layers".'
    )


def _program(model: nn.Module, graph: fx.Graph) -> Program:
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    place: dict[fx.Node, int] = {}
    units: list[Unit] = []
    used: set[fx.Node] = _used(graph)
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr") or node not in used:
            continue
        if node.op == "output":
            if not isinstance(node.args[0], fx.Node) or place.get(node.args[0]) != len(units) - 1:
                units.append(_unit(node, inputs, place))
            continue
        units.append(_unit(node, inputs, place))
        place[node] = len(units) - 1
    return Program(model, tuple(units), {})


def _used(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that the output depends on."""
    used: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or any(user in used for user in node.users):
            used.add(node)
    return used


def _unit(node: fx.Node, inputs: list[fx.Node], place: dict[fx.Node, int]) -> Unit:
    """A node as a unit; parameters that it reads itself become part of it."""
    sources = list(node.all_input_nodes)
    reads = tuple(
        dict.fromkeys(INPUT if source in inputs else place[source] for source in sources if source.op != "get_attr")
    )
    attributes = tuple(str(source.target) for source in sources if source.op == "get_attr")
    module = str(node.target) if node.op == "call_module" else None

    def call(root: nn.Module, *values: Any) -> Any:
        given = dict(zip(reads, values, strict=True))

        def value_of(source: fx.Node) -> Any:
            if source.op == "get_attr":
                return resolve(root, str(source.target))
            if source in inputs:
                return _argument(given[INPUT], inputs, inputs.index(source))
            return given[place[source]]

        args, kwargs = fx.map_arg(node.args, value_of), fx.map_arg(node.kwargs, value_of)
        if module is not None:
            return resolve(root, module)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "output":
            return args[0]
        assert callable(node.target)
        return node.target(*args, **kwargs)

    return Unit(node.name, reads, call, (*((module,) if module is not None else ()), *attributes))


def _argument(given: Any, inputs: list[fx.Node], number: int) -> Any:
    """The argument of ``forward`` called like this input; a model with several takes a tuple or a dictionary."""
    if len(inputs) == 1:
        return given
    node = inputs[number]
    if isinstance(given, dict):
        return given[node.target] if node.target in given else node.args[0]
    values = tuple(given) if isinstance(given, (tuple, list)) else (given,)
    return values[number] if number < len(values) else node.args[0]
