"""Layers that only the rank which runs them makes, so that no rank ever holds the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hvdscale.errors import PlanError

__all__ = ["Lazy", "has_meta", "materialise", "materialise_own"]


class Lazy:
    """A layer to be made later: ``Lazy(nn.Linear, 512, 512)``, or ``Lazy(lambda: MyBlock(...))``.

    Every rank makes it on the meta device to learn its shapes; its own rank then makes it with the random state of its
    place in the model, so the weights do not depend on how many ranks there are.
    """

    def __init__(self, factory: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> None:
        self._factory, self._args, self._kwargs = factory, args, kwargs

    def make(self) -> nn.Module:
        made = self._factory(*self._args, **self._kwargs)
        if not isinstance(made, nn.Module):
            raise PlanError(f"Lazy(...) makes an nn.Module; {self._factory!r} made a {type(made).__name__}.")
        return made

    def shapes(self) -> nn.Module:
        """The layer without memory."""
        with torch.device("meta"):
            return self.make()


def has_meta(module: nn.Module) -> bool:
    """Whether some parameter or buffer has no memory yet."""
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def materialise(
    module: nn.Module, name: str, known: dict[int, Tensor], made: Callable[[str, nn.Module], None] | None = None
) -> None:
    """Give the parameters and buffers of ``module`` that are on the meta device memory and their first values.

    Args:
        name: of the module, for messages.
        known: parameters made before by the ``id`` of what stood for them: shared ones are made once.
        made: is called with the name and the module inside whose values have just been made, before the next one's are.

    Raises:
        PlanError: a module that says not how its parameters begin.
    """
    for inner, part in module.named_modules():
        where = ".".join(filter(None, (name, inner)))
        if materialise_own(part, where, known) and made is not None:
            made(where, part)


def materialise_own(part: nn.Module, where: str, known: dict[int, Tensor]) -> bool:
    """``materialise`` what ``part`` holds itself, not in modules inside it; whether there was something to make."""
    own = {n: p for n, p in part.named_parameters(recurse=False, remove_duplicate=False) if p.is_meta}
    buffers = [n for n, b in part.named_buffers(recurse=False) if b.is_meta]
    if not own and not buffers:
        return False
    shared = {n: known[id(p)] for n, p in own.items() if id(p) in known}
    if len(shared) < len(own) or buffers:
        reset = getattr(part, "reset_parameters", None) or getattr(part, "_reset_parameters", None)
        if reset is None:
            raise PlanError(
                f"{where or 'The model'} ({type(part).__name__}) has {', '.join([*own, *buffers])} on the meta "
                "device and no reset_parameters() that would give them values. Add one, or build it off the meta "
                "device; a layer of a pipeline can be given as hvd.Lazy(...), too."
            )
        part.to_empty(device=torch.get_default_device(), recurse=False)
        if isinstance(part, nn.MultiheadAttention):  # its reset changes what its output layer drew
            materialise(part.out_proj, f"{where}.out_proj", known)
        reset()
    for n, tensor in shared.items():
        setattr(part, n, tensor)
    for n, before in own.items():
        known.setdefault(id(before), getattr(part, n))
    return True
