"""Skip connections in a list of layers: what one layer gives, a later one takes, whatever stages they are on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hvdscale.errors import PlanError

__all__ = ["Pop", "Push", "Skip"]


class Skip:
    """A value that goes round the layers in between.

    ``[a, skip.push(), b, c, skip.pop(torch.add)]`` computes ``c(b(a(x))) + a(x)``. The list runs as it is in an
    ``nn.Sequential``; sharded, the value goes from the one stage to the other at once.
    """

    def __init__(self) -> None:
        self.value: Any = None

    def push(self) -> Push:
        """A layer that keeps what it gets, and passes it on."""
        return Push(self)

    def pop(self, combine: Callable[[Any, Any], Any] = torch.add) -> Pop:
        """A layer that gives ``combine(x, kept)``; ``combine`` may be a module with parameters."""
        return Pop(self, combine)


class Push(nn.Module):
    """Made by ``Skip.push``."""

    def __init__(self, skip: Skip) -> None:
        super().__init__()
        self.skip = skip

    def forward(self, x: Any) -> Any:
        self.skip.value = x
        return x


class Pop(nn.Module):
    """Made by ``Skip.pop``."""

    def __init__(self, skip: Skip, combine: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.skip = skip
        self.combine = combine

    def forward(self, x: Any) -> Any:
        if self.skip.value is None:
            raise PlanError("A skip is pushed before it is popped; put skip.push() earlier in the list of layers.")
        kept, self.skip.value = self.skip.value, None
        return self.combine(x, kept)
