"""``.grad`` where a rank holds only part of the reduced gradient: right where it can be, refused where it cannot.

A ``PlacedGradient`` looks like the whole gradient of its parameter and holds the elements this rank updates. Scaling,
clamping and a gradient scaler's check work element by element on what each rank holds; norms are those of the whole,
added up over ranks, so that ``torch.nn.utils.clip_grad_norm_`` is right. Everything else raises an error: a figure of
a part never passes for one of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from hvdscale.errors import PlanError

__all__ = ["Home", "PlacedGradient"]

aten: Any = torch.ops.aten

# Each element changes by itself, in place.
_IN_PLACE = {
    aten.mul_.Tensor,
    aten.mul_.Scalar,
    aten.div_.Tensor,
    aten.div_.Scalar,
    aten.neg_.default,
    aten.zero_.default,
    aten.clamp_.default,
    aten.clamp_min_.default,
    aten.clamp_max_.default,
    aten.nan_to_num_.default,
    aten._foreach_mul_.Scalar,
    aten._foreach_mul_.Tensor,
    aten._foreach_div_.Scalar,
    aten._foreach_div_.Tensor,
    aten._foreach_clamp_min_.Scalar,
    aten._foreach_clamp_max_.Scalar,
    aten._foreach_zero_.default,
}
_SAME = {aten.detach.default, aten.detach_.default, aten.alias.default}
_CHECK = aten._amp_foreach_non_finite_check_and_unscale_.default


class Home(Protocol):
    """The ranks that hold the parts. Its methods are collective."""

    def norms(self, order: float) -> dict[int, float]:
        """The norm of each gradient by ``id`` of its ``PlacedGradient``, over all ranks' elements."""
        ...

    def any_rank(self, flag: Tensor) -> None:
        """Make ``flag``, 0 or 1 on each rank, 1 everywhere if it is so anywhere."""
        ...

    def whole(self, gradient: PlacedGradient) -> Tensor:
        """The whole gradient, on every rank."""
        ...

    def changed(self) -> None:
        """Some gradient was written to on every rank: norms found before count no more."""
        ...


class PlacedGradient(Tensor):
    """Of the shape and dtype of its parameter.

    ``part``: the elements this rank holds, one-dimensional, perhaps none; float32 also for narrower parameters.
    ``owner``: name of the parameter.
    """

    part: Tensor
    home: Home
    owner: str

    @staticmethod
    def __new__(cls, parameter: Tensor, part: Tensor, home: Home, owner: str) -> PlacedGradient:
        made: PlacedGradient = Tensor._make_wrapper_subclass(
            cls, parameter.shape, dtype=parameter.dtype, device=parameter.device, requires_grad=False
        )
        made.part, made.home, made.owner = part, home, owner
        return made

    def __init__(self, *_: Any) -> None:
        """Everything is set by ``__new__``."""

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PlacedGradient({self.owner}, shape={list(self.shape)}, {self.part.numel()} elements on this rank)"

    def full_tensor(self) -> Tensor:
        """The whole reduced gradient, on every rank. Collective."""
        return self.home.whole(self)

    def numpy(self, *_: Any, **__: Any) -> Any:
        raise PlanError(_refusal("numpy", self))

    def tolist(self) -> Any:
        raise PlanError(_refusal("tolist", self))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _SAME:
            return args[0]
        if func in _IN_PLACE:
            return _in_place(func, args, kwargs)
        if func is aten.linalg_vector_norm.default and len(args) <= 2 and not kwargs.get("dim"):
            return _norm(args[0], args[1] if len(args) > 1 else kwargs.get("ord", 2))
        if func is aten._foreach_norm.Scalar:
            return [_norm(g, args[1] if len(args) > 1 else 2) for g in args[0]]
        if func is _CHECK:
            gradients, found, scale = args
            func([g.part for g in gradients], found, scale)
            gradients[0].home.any_rank(found)
            gradients[0].home.changed()
            return None
        raise PlanError(_refusal(func, _first(args)))


def _in_place(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    target, *others = args
    targets = target if isinstance(target, (list, tuple)) else [target]
    beside = [*others, *kwargs.values()]
    if not all(isinstance(t, PlacedGradient) for t in targets) or any(
        isinstance(o, (list, tuple)) or (isinstance(o, Tensor) and (o.dim() > 0 or isinstance(o, PlacedGradient)))
        for o in beside
    ):
        raise PlanError(_refusal(func, _first(args)))
    parts = [t.part for t in targets]
    func(parts if isinstance(target, (list, tuple)) else parts[0], *others, **kwargs)
    targets[0].home.changed()
    return target


def _norm(gradient: PlacedGradient, order: Any) -> Tensor:
    value = gradient.home.norms(float(order))[id(gradient)]
    dtype = gradient.part.dtype
    return torch.tensor(value, dtype=dtype, device=gradient.device)


def _first(args: Any) -> PlacedGradient | None:
    for value in args:
        if isinstance(value, PlacedGradient):
            return value
        if isinstance(value, (list, tuple)):
            found = _first(value)
            if found is not None:
                return found
    return None


def _refusal(func: Any, gradient: PlacedGradient | None) -> str:
    name = str(func).removeprefix("aten.").split(".")[0]
    if name == "add_":
        return (
            f"The gradient of {gradient.owner if gradient is not None else 'a parameter'} is reduced, and this rank "
            "holds part of it: neither another backward pass nor a script can add to it. Call optimizer.zero_grad() "
            "between steps; to accumulate gradients pass backward_passes_per_step; to add something of your own assign "
            "p.grad = p.grad.full_tensor() + ..., on every rank."
        )
    return (
        f"{name} of {gradient!r} would see this rank's part of the gradient alone. Scaling, clamping and norms work; "
        'for anything else call .full_tensor() on every rank, or use EveryStep(update="local").'
    )
