"""Which layers of a torch module are split by features, and how: by the user's rules, or by what is known of models.

``rules="auto"`` knows ``nn.MultiheadAttention``, attention written out over linear layers in a module that says how
many heads it has, MLPs, and the vocabulary's embedding and head.

A layer with three times as many outputs as inputs that is split by heads is taken to hold all queries, then all keys,
then all values; one that is called ``query_key_value``, the three of each head side by side. ``"auto"`` goes by names
alone: the shape does not tell.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from hvdscale.errors import PlanError
from hvdscale.model.layout import Split
from hvdscale.model.rules import (
    FUSED,
    HEADS,
    INTERLEAVED,
    OUTPUTS,
    PAIRS,
    SEPARATE,
    Rules,
    match_rules,
    nothing_found,
)

__all__ = ["Part", "find_parts", "splittable"]

_ELEMENTWISE = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU, nn.SELU, nn.Mish, nn.Softplus,
    nn.Hardswish, nn.Hardsigmoid, nn.Identity, nn.Dropout,
)  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What becomes of one layer.

    Args:
        role: ``"column"``, ``"row"``, ``"vocab"``, ``"attention"`` or ``"dropout"``.
        split: of its weight.
        whole_output: of a column: every rank gets all outputs.
        heads: of a column by heads: the module that counts them, and the name it has for their number.
        of: of a dropout: the column whose outputs it acts on.
    """

    role: str
    split: Split
    whole_output: bool = True
    heads: tuple[str, str] | None = None
    of: str = ""


def splittable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that can be split, by name. One that has several names has the first."""
    kinds = (nn.Linear, nn.Embedding, nn.MultiheadAttention)
    inside = {id(m.out_proj) for m in model.modules() if type(m) is nn.MultiheadAttention}
    return {n: m for n, m in model.named_modules() if type(m) in kinds and id(m) not in inside}


def find_parts(model: nn.Module, rules: Rules) -> dict[str, Part]:
    """What becomes of each layer that is split, by its name.

    Raises:
        PlanError: rules that match nothing, or that cannot be carried out.
    """
    layers = splittable(model)
    if rules == "auto":
        parts = dict(_known(model, layers))
        if not parts:
            raise nothing_found(list(layers))
    else:
        roles = match_rules(rules, list(layers))
        parts = {name: _ruled(model, name, layers[name], roles) for name in roles}
    return dict(_with_dropout(model, {name: parts[name] for name in layers if name in parts}))


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


def _child(parent: str, name: str) -> str:
    return f"{parent}.{name}".lstrip(".")


def _ruled(model: nn.Module, name: str, layer: nn.Module, roles: Mapping[str, str]) -> Part:
    role, parent = roles[name], _parent(name)
    if isinstance(layer, nn.MultiheadAttention):
        if role != "heads":
            raise PlanError(f"{name} is an nn.MultiheadAttention, which is split by heads. Say 'heads', not {role!r}.")
        return Part("attention", Split(0))
    if isinstance(layer, nn.Embedding):
        if role != "vocab":
            raise PlanError(f"{name} is an embedding, which is split by its rows. Say 'vocab', not {role!r}.")
        return Part("vocab", Split(0))
    assert isinstance(layer, nn.Linear)
    module = model.get_submodule(parent)
    said = _heads_of(module)
    beside = {other: r for other, r in roles.items() if _parent(other) == parent}
    if role == "row":
        if "heads" in beside.values() and said is not None:
            return Part("row", Split(1, 1, layer.in_features // getattr(module, said)))
        return Part("row", Split(1))
    if role == "vocab":
        return Part("column", Split(0), whole_output=False)
    if role == "heads":
        if said is None:
            raise PlanError(
                f"{name} is to be split by heads, and its module says nowhere how many there are: it has none of the "
                f"attributes {', '.join(HEADS)}."
            )
        return _by_heads(name, layer, module, said)
    if isinstance(module, nn.Sequential):
        follower = _follower(module, name.rpartition(".")[2])
        before_row = follower is not None and roles.get(_child(parent, follower)) == "row"
    else:
        before_row = "row" in beside.values()
    if before_row and said is not None and layer.out_features in (layer.in_features, 3 * layer.in_features):
        raise PlanError(
            f"{name} gives the features of {getattr(module, said)} attention heads ({type(module).__name__}.{said}), "
            "which stay together. Say 'heads', not 'column'."
        )
    return Part("column", Split(0), whole_output=not before_row)


def _follower(module: nn.Sequential, child: str) -> str | None:
    """The linear layer that the outputs of ``child`` reach through elementwise functions alone."""
    after = list(module.named_children())
    names = [name for name, _ in after]
    for name, layer in after[names.index(child) + 1 :]:
        if type(layer) is nn.Linear:
            return name
        if not isinstance(layer, _ELEMENTWISE):
            return None
    return None


def _with_dropout(model: nn.Module, parts: dict[str, Part]) -> Iterator[tuple[str, Part]]:
    """The parts, and the dropout that acts on the outputs of columns which are parts."""
    for name, part in parts.items():
        yield name, part
        if part.role != "column" or part.whole_output or part.heads:
            continue
        parent = _parent(name)
        module = model.get_submodule(parent)
        inside = Part("dropout", part.split, of=name)
        if isinstance(module, nn.Sequential):
            children = list(module.named_children())
            first = [child for child, _ in children].index(name.rpartition(".")[2])
            for child, layer in children[first + 1 :]:
                if not isinstance(layer, _ELEMENTWISE):
                    break
                if type(layer) is nn.Dropout:
                    yield _child(parent, child), inside
        elif isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
            yield _child(parent, "dropout"), inside


def _heads_of(module: nn.Module) -> str | None:
    return next((name for name in HEADS if isinstance(getattr(module, name, None), int)), None)


def _by_heads(name: str, layer: nn.Linear, parent: nn.Module, attribute: str) -> Part:
    heads = getattr(parent, attribute)
    matrices = 3 if layer.out_features == 3 * layer.in_features else 1
    if layer.out_features % (matrices * heads):
        raise PlanError(f"{name} has {layer.out_features} outputs, which {heads} heads do not share evenly.")
    sections = 1 if name.rpartition(".")[2] in INTERLEAVED else matrices
    split = Split(0, sections, layer.out_features // (sections * heads))
    return Part("column", split, whole_output=False, heads=(_parent(name), attribute))


def _known(model: nn.Module, layers: dict[str, nn.Module]) -> Iterator[tuple[str, Part]]:
    linear = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    for name, layer in layers.items():
        if isinstance(layer, nn.MultiheadAttention) and layer.bias_k is None and not layer.add_zero_attn:
            yield name, Part("attention", Split(0))
    taken: set[str] = set()
    for name, module in model.named_modules():
        if type(module) is nn.MultiheadAttention:
            continue
        children = {c: linear[n] for c, _ in module.named_children() if (n := _child(name, c)) in linear}
        found = dict(_attention(module, children))
        if isinstance(module, nn.Sequential):
            found |= dict(_in_sequence(module, children))
        found |= {c: part for c, part in _by_name(children) if c not in found}
        for child, part in found.items():
            heads = (name, part.heads[1]) if part.heads else None
            taken.add(_child(name, child))
            yield _child(name, child), Part(part.role, part.split, part.whole_output, heads)
    tables = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Embedding)}
    for name, layer in linear.items():
        shape = (layer.out_features, layer.in_features)
        matching = [n for n, table in tables.items() if (table.num_embeddings, table.embedding_dim) == shape]
        if matching and name not in taken:
            yield name, Part("column", Split(0))
            yield matching[0], Part("vocab", Split(0))  # others of the same size may be places: left whole


def _attention(module: nn.Module, children: dict[str, nn.Linear]) -> Iterator[tuple[str, Part]]:
    attribute = _heads_of(module)
    out = next((c for c in children if c in OUTPUTS), None)
    if attribute is None or out is None:
        return
    width = children[out].in_features
    named = [c for c in (*FUSED, *INTERLEAVED) if c in children]
    fused = [c for c in named if children[c].out_features == 3 * children[c].in_features == 3 * width]
    separate = next((names for names in SEPARATE if all(c in children for c in names)), ())
    inputs = fused[:1] if len(fused) == 1 else list(separate)
    if not inputs or any(children[c].out_features not in (width, 3 * width) for c in inputs):
        return
    for c in inputs:
        yield c, _by_heads(c, children[c], module, attribute)
    yield out, Part("row", Split(1, 1, width // getattr(module, attribute)))


def _in_sequence(module: nn.Sequential, children: dict[str, nn.Linear]) -> Iterator[tuple[str, Part]]:
    taken: set[str] = set()
    for first in children:
        second = _follower(module, first)
        if first in taken or second is None or children[second].in_features != children[first].out_features:
            continue
        taken.add(second)
        yield first, Part("column", Split(0), whole_output=False)
        yield second, Part("row", Split(1))


def _by_name(children: dict[str, nn.Linear]) -> Iterator[tuple[str, Part]]:
    for outputs, inputs in PAIRS:
        if inputs in children and all(c in children for c in outputs):
            hidden = children[inputs].in_features
            if all(children[c].out_features == hidden for c in outputs):
                for c in outputs:
                    yield c, Part("column", Split(0), whole_output=False)
                yield inputs, Part("row", Split(1))
                return
