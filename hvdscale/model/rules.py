"""Which layers are split by features, and how: the user's patterns matched against the names of a model's layers.

Megatron's roles (Shoeybi et al., arXiv 1909.08053): ``"column"`` splits a layer's outputs, ``"row"`` its inputs,
``"heads"`` its outputs by whole attention heads, ``"vocab"`` the rows of an embedding or the outputs of a head.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from hvdscale.errors import PlanError

__all__ = [
    "FUSED",
    "HEADS",
    "INTERLEAVED",
    "OUTPUTS",
    "PAIRS",
    "ROLES",
    "SEPARATE",
    "Role",
    "Rules",
    "check_rules",
    "match_rules",
    "nothing_found",
]

Role = Literal["column", "row", "heads", "vocab"]
ROLES: tuple[Role, ...] = get_args(Role)
Rules = Mapping[str, Role] | Literal["auto"]

# What models call the layers of a transformer block, for rules="auto".
HEADS = ("heads", "num_heads", "n_head", "n_heads", "num_attention_heads")
OUTPUTS = ("out", "out_proj", "proj", "c_proj", "o_proj", "wo", "dense")
# Queries, keys and values in one matrix: one after the other, each with all heads; or the three of each head together.
FUSED = ("qkv", "qkv_proj", "to_qkv", "c_attn", "in_proj", "Wqkv")
INTERLEAVED = ("query_key_value",)  # GPT-NeoX, BLOOM, Falcon
SEPARATE = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v"), ("wq", "wk", "wv"))
PAIRS = (  # what splits outputs, then what splits inputs
    (("linear1",), "linear2"),
    (("fc1",), "fc2"),
    (("c_fc",), "c_proj"),
    (("gate_proj", "up_proj"), "down_proj"),
    (("up_proj",), "down_proj"),
    (("w1", "w3"), "w2"),
    (("w1",), "w2"),
    (("wi",), "wo"),
    (("fc_in",), "fc_out"),
    (("dense_h_to_4h",), "dense_4h_to_h"),
)

_SHOWN = 40


def check_rules(rules: object) -> Rules:
    """``rules`` as they are.

    Raises:
        PlanError: neither ``"auto"`` nor a mapping from patterns to roles.
    """
    if rules == "auto":
        return "auto"
    if not isinstance(rules, Mapping) or not rules:
        raise PlanError(
            f'rules is "auto", or a dictionary from patterns of layer names to one of {", ".join(map(repr, ROLES))}; '
            f"it is {rules!r}."
        )
    for pattern, role in rules.items():
        if not isinstance(pattern, str) or role not in ROLES:
            raise PlanError(
                f"rules map patterns such as 'blocks.*.mlp.0' to one of {', '.join(map(repr, ROLES))}; they hold "
                f"{pattern!r}: {role!r}."
            )
    checked: Rules = dict(rules)
    return checked


def match_rules(rules: Mapping[str, Role], names: Sequence[str]) -> dict[str, Role]:
    """The role of each layer that a pattern matches, in the order of ``names``; of two patterns the first counts.

    Patterns are those of a shell: ``*`` is anything, ``[ab]`` one of these.

    Args:
        rules: checked.
        names: of the layers that can be split.

    Raises:
        PlanError: a pattern that matches no layer.
    """
    for pattern in rules:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise PlanError(f"The rule {pattern!r} matches no layer that can be split. {_those(names)}")
    roles: dict[str, Role] = {}
    for name in names:
        for pattern, role in rules.items():
            if fnmatch.fnmatchcase(name, pattern):
                roles[name] = role
                break
    return roles


def nothing_found(names: Sequence[str]) -> PlanError:
    """The error where ``rules="auto"`` knows nothing in the model."""
    error: PlanError = PlanError(
        'rules="auto" found no transformer block, MLP or vocabulary in this model. Name layers yourself, '
        f'rules={{"pattern": "column" | "row" | "heads" | "vocab"}}. {_those(names)}'
    )
    return error


def _those(names: Sequence[str]) -> str:
    if not names:
        return "The model has none."
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"Those are: {', '.join(names[:_SHOWN])}{more}."
