"""Naming an optimizer's parameters: ranks recognise a gradient by its name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from hvdscale.errors import PlanError

__all__ = ["names_by_id", "parameter_names"]


def names_by_id(
    named_parameters: Iterable[tuple[str, Tensor]] | None, model: nn.Module | None
) -> dict[int, str] | None:
    """Name of each parameter by its ``id``, or ``None`` when the user named none.

    Raises:
        PlanError: entries that are not ``(name, parameter)``, or a name given twice.
    """
    if named_parameters is None:
        if model is None:
            return None
        named_parameters = model.named_parameters()
    pairs = list(named_parameters)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor)):
            raise PlanError(
                "named_parameters must be a sequence of tuples (name, parameter), usually "
                f"model.named_parameters(); it holds {type(pair).__name__}."
            )
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise PlanError(
            f"Parameter names must be unique; {', '.join(map(repr, sorted(repeated)))} appear more than once. "
            "When several models share an optimizer, put the model's name in front."
        )
    return {id(parameter): name for name, parameter in reversed(pairs)}  # of tied names the first one counts


def parameter_names(
    param_groups: list[dict[str, Any]], known: dict[int, str] | None, first_group: int = 0
) -> list[tuple[str, Tensor]]:
    """``(name, parameter)`` of these groups in order; named by their place when the user named none.

    Parameters of groups added later (``first_group`` > 0) may be of a module that was not there when the others were
    named: those the user has not named are named by their place too, which is the same on every rank.

    Raises:
        PlanError: the user named some parameters but not these.
    """
    named: list[tuple[str, Tensor]] = []
    unnamed: list[str] = []
    for i, group in enumerate(param_groups, first_group):
        given = group.get("param_names", [])
        for j, parameter in enumerate(group["params"]):
            if known is not None and id(parameter) in known:
                named.append((known[id(parameter)], parameter))
            elif known is None or first_group:
                named.append((given[j] if j < len(given) else f"parameter.{i}.{j}", parameter))
            else:
                unnamed.append(f"number {j} of group {i}, shape {list(parameter.shape)}")
    if unnamed:
        raise PlanError(
            f"named_parameters was given, but {len(unnamed)} parameters of the optimizer are not in it "
            f"({'; '.join(unnamed[:3])}{'; ...' if len(unnamed) > 3 else ''}). Name all of them, or none."
        )
    return named
