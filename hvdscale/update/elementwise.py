"""Can an optimizer's state be cut? Only where each element's step depends on that element alone.

What is known to look at whole tensors is refused by name. Anything else that is not known to be element-wise is tried
on a small matrix: whole, and cut in two; the same steps must come out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from hvdscale.errors import PlanError

__all__ = ["check_elementwise"]

Steps = Callable[[list[npt.NDArray[np.float32]], list[list[npt.NDArray[np.float32]]]], list[npt.NDArray[np.float32]]]
"""``steps(tensors, gradients)``: the tensors after one step for each entry of ``gradients``, an array per tensor."""

_SHAPE = (4, 6)
_CUT = 9  # in the middle of a row
_TRIALS = 3


def check_elementwise(kind: str, update: str, known: frozenset[str], not_so: Mapping[str, str], steps: Steps) -> None:
    """Refuse an optimizer that cannot step on slices of its tensors.

    Args:
        kind: name of the optimizer's type.
        update: the plan's word, for the message.
        known: names of types that are element-wise.
        not_so: names of types that are not, and why.
        steps: steps of an optimizer of that type and its settings, on tensors of its own.

    Raises:
        PlanError: it names the optimizer and what its step looks at.
    """
    if kind in not_so:
        raise PlanError(_refusal(kind, update, not_so[kind]))
    if kind in known:
        return
    draw = np.random.default_rng(0)
    whole = draw.normal(size=_SHAPE).astype(np.float32)
    gradients = [draw.normal(size=_SHAPE).astype(np.float32) for _ in range(_TRIALS)]
    try:
        (together,) = steps([whole.copy()], [[g.copy()] for g in gradients])
        cut = steps(_pieces(whole), [_pieces(g) for g in gradients])
    except Exception as error:
        raise PlanError(
            _refusal(kind, update, f"a trial on slices ended in {type(error).__name__}: {error}")
        ) from error
    difference = float(np.abs(together.ravel() - np.concatenate([piece.ravel() for piece in cut])).max())
    if not difference <= 1e-5:
        raise PlanError(_refusal(kind, update, f"on slices its weights differ by {difference:.1e} after 3 steps"))


def _pieces(array: npt.NDArray[np.float32]) -> list[npt.NDArray[np.float32]]:
    flat = array.ravel()
    return [flat[:_CUT].copy(), flat[_CUT:].copy()]


def _refusal(kind: str, update: str, why: str) -> str:
    return (
        f'update="{update}" gives ranks slices of tensors, so an optimizer must treat each element by itself; {kind} '
        f'does not: {why}. Use an element-wise optimizer such as AdamW, or update="local".'
    )
