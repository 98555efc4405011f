"""A model of which each rank holds a part: what every kind of sharding has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from horovod.torch import ProcessSet
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdscale.errors import PlanError, StateError
from hvdscale.model.layout import Layout
from hvdscale.model.mesh import Mesh
from hvdscale.model.whole import gather_whole
from hvdscale.torch.optimizer_state import load_optimizer, save_optimizer
from hvdscale.torch.runtime import world
from hvdscale.torch.teams import data_ranks, team_along
from hvdscale.torch.tensor_parallel import exchanged

__all__ = ["ShardedModel", "check_optimizer", "clip_grad_norm_"]

# NumPy knows no bfloat16: what only moves goes as integers of the same width.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ShardedModel(ABC):
    """A model spread over ``mesh``. Names, and the whole state, are those of the model nobody has sharded.

    Attributes:
        mesh: the ranks as a grid.
        layout: where each parameter and buffer of the whole model lies.
        module: what this rank holds.
        data_ranks: the process set of the ranks that hold the same part as this one, on other data.
        rank: this one's number.
    """

    def __init__(self, mesh: Mesh, layout: Layout, module: nn.Module, local: Mapping[str, Tensor]) -> None:
        """``local``: this rank's tensors by their names in the whole model. Collective over all ranks."""
        self.mesh = mesh
        self.layout = layout
        self.module = module
        self.data_ranks: ProcessSet = data_ranks(mesh)
        self._local = dict(local)
        self._copy = team_along(mesh, "pp", "tp")  # the ranks that hold one whole model
        self.rank = world().rank

    @abstractmethod
    def train_step(self, x: Any, y: Any) -> Tensor:
        """The loss on one batch, on every rank; its gradients are in ``.grad``."""

    @abstractmethod
    def eval_step(self, x: Any, y: Any) -> Tensor:
        """The loss on one batch, on every rank; no gradients."""

    @abstractmethod
    def describe(self) -> str:
        """A table of what lies where."""

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters, each once, by their names in the whole model."""
        seen: set[int] = set()
        for name, tensor in self._local.items():
            if isinstance(tensor, nn.Parameter) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters, each once: what its optimizer takes."""
        for _, parameter in self.named_parameters():
            yield parameter

    def local_state_dict(self) -> dict[str, Tensor]:
        """This rank's tensors themselves, by their names in the whole model."""
        return dict(self._local)

    def train(self, mode: bool = True) -> ShardedModel:
        self.module.train(mode)
        return self

    def eval(self) -> ShardedModel:
        return self.train(False)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """All layers in evaluation mode; afterwards, each in the mode it was in."""
        training = [module for module in self.module.modules() if module.training]
        self.module.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.module.zero_grad(set_to_none)

    @torch.no_grad()
    def state_dict(self, root: int | None = None) -> dict[str, Tensor]:
        """The whole model, as its ``state_dict()`` was before it was sharded: on the CPU, bit-equal. Collective.

        Args:
            root: the one rank that gets it, where not every rank has room for it; others get ``{}``.

        Raises:
            PlanError: no such rank.
        """
        if root is not None:
            self.mesh.coordinates(root)
        joined = {name: self.join(name, self._local.get(name), root) for name in self.layout.names}
        return {name: tensor for name, tensor in joined.items() if tensor is not None}

    def join(
        self, name: str, tensor: Tensor | None, root: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor | None:
        """A whole parameter, or what is kept beside one, from its parts. Collective over the ranks of one copy.

        Args:
            tensor: this rank's part; ``None`` where it has none.
            root: the one rank that gets it; others get ``None``.
            dtype: left out: the parameter's.
        """
        if dtype is None:
            dtype = getattr(torch, self.layout[name].dtype) if tensor is None else tensor.dtype
        bits = _BITS[dtype.itemsize]
        held = torch.empty(0, dtype=dtype) if tensor is None else tensor.detach().to("cpu").contiguous()
        whole = gather_whole(self.layout, name, held.view(-1).view(bits).numpy(), self._copy, self.rank, root)
        return None if whole is None else torch.from_numpy(whole).view(dtype).clone()

    @torch.no_grad()
    def load_state_dict(self, whole: Mapping[str, Tensor]) -> None:
        """Take this rank's part of the whole model, in place. Nothing is sent: every rank reads the same state.

        Raises:
            StateError: other names or shapes than the whole model's.
        """
        self.layout.check_names(whole)
        for name, tensor in self._local.items():
            tensor.copy_(self.cut(name, whole[name]))

    def cut(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a whole parameter, or of what an optimizer keeps beside it.

        Raises:
            StateError: another shape.
        """
        placement = self.layout[name]
        if tuple(whole.shape) != placement.shape:
            raise StateError(f"{name} has shape {list(placement.shape)} in the whole model; {list(whole.shape)} came.")
        pieces = [whole.detach()[at] for at in self.layout.slices(name, self.rank)]
        return pieces[0] if placement.split is None else torch.cat(pieces, placement.split.axis)

    @torch.no_grad()
    def optimizer_state_dict(self, optimizer: Optimizer, root: int | None = None) -> dict[str, Any]:
        """``optimizer.state_dict()`` as it would be over the whole model's parameters, bit-equal. Collective.

        One process loads it into an optimizer over ``model.parameters()``, with the same groups if there are several:
        parameters are numbered in the order of the whole model, group by group.

        Args:
            optimizer: over this rank's parameters, distributed or not. Every rank of a pipeline has the same groups,
                some of them empty if need be.
            root: the one rank that gets it; others get ``{}``.

        Raises:
            StateError: parameters of another model, groups that differ from stage to stage, or state that is neither
                numbers, text nor tensors.
            PlanError: no such rank.
        """
        if root is not None:
            self.mesh.coordinates(root)
        return save_optimizer(self, optimizer, root)

    @torch.no_grad()
    def load_optimizer_state_dict(self, optimizer: Optimizer, whole: Mapping[str, Any]) -> None:
        """Take this rank's part of what ``optimizer_state_dict`` gave on any mesh, or one process's ``state_dict()``.

        Collective: ranks tell each other whose parameters are whose. Every one reads the same state.

        Raises:
            StateError: parameters of another model, other groups, or state of other shapes.
        """
        load_optimizer(self, optimizer, whole)

    def count(self) -> tuple[int, int]:
        """How many numbers the whole model's parameters are, and how many of them this rank holds; tied ones once."""
        names = [name for name, _ in self.named_parameters()]
        whole = sum(int(np.prod(self.layout[name].shape)) for name in names)
        return whole, sum(p.numel() for p in self.parameters())

    def norm(self, norm_type: float = 2.0) -> Tensor:
        """The norm of the gradients of the whole model, parameters that several ranks hold counted once. Collective."""
        norms = []
        for name, parameter in self.named_parameters():
            if parameter.grad is not None and self.layout.speaks(name, self.rank):
                own = parameter.grad.detach()
                own = own.coalesce().values() if own.is_sparse else own
                norms.append(float(torch.linalg.vector_norm(own.to(torch.float64), norm_type)))  # one copy at a time
        if norm_type == float("inf"):
            return torch.tensor(float(self._copy.largest(np.array(max(norms, default=0.0)))))
        total = self._copy.add(np.array(sum((n**norm_type for n in norms), 0.0)))
        return torch.tensor(float(total) ** (1.0 / norm_type))

    def largest_of_copy(self, value: Tensor) -> Tensor:
        """The largest over the ranks that hold one copy of the model, elementwise. Collective over them."""
        return exchanged(value, self._copy.largest)


def clip_grad_norm_(
    model: ShardedModel | nn.Module, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` over the whole of a sharded model. Collective over the ranks of one copy.

    Call it when gradients are reduced: after ``backward()``, or after ``optimizer.synchronize()``.

    Args:
        model: sharded, or any module.
        max_norm: gradients are scaled down to it.
        norm_type: 2, another number above 0, or infinity.
        error_if_nonfinite: raise where the norm is not finite.

    Returns:
        The norm before, the same on every rank.

    Raises:
        PlanError: a norm that cannot be.
        RuntimeError: a norm that is not finite, where that is asked for.
    """
    if not isinstance(model, ShardedModel):
        return nn.utils.clip_grad_norm_(model.parameters(), max_norm, norm_type, error_if_nonfinite)
    if not norm_type > 0 or not max_norm >= 0:
        raise PlanError(f"norm_type must be above 0 and max_norm at least 0; they are {norm_type} and {max_norm}.")
    total = model.norm(norm_type)
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(f"The gradients' norm of order {norm_type} is {float(total)}.")
    scale = min(1.0, max_norm / (float(total) + 1e-6)) if torch.isfinite(total) else float(max_norm / (total + 1e-6))
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(scale)
    return total


# By their names in lower case, since several libraries have them. The first looks at all parameters at once.
_ALL_AT_ONCE = ("lbfgs",)
_WHOLE = ("adafactor", "lamb", "lars", "muon")


def check_optimizer(optimizer: Optimizer, mesh: Mesh) -> None:
    """Raises PlanError where an optimizer looks at more of the model at a time than a rank of ``mesh`` holds of it."""
    names = {c.__name__.lower(): c.__name__ for c in type(optimizer).__mro__}
    looks = next((names[n] for n in (*_ALL_AT_ONCE, *(_WHOLE if mesh.tp > 1 else ())) if n in names), None)
    if looks:
        what = "all parameters at once" if looks.lower() in _ALL_AT_ONCE else "whole parameters"
        raise PlanError(
            f"{looks} looks at {what}, and each rank holds parts. Use one that looks at each number for itself: SGD, "
            "Adam, AdamW and others."
        )
    for parameter, state in optimizer.state.items():
        for value in state.values() if isinstance(state, dict) else ():
            if isinstance(value, Tensor) and value.dim() and value.shape != parameter.shape:
                raise PlanError(
                    f"The optimizer holds state of shape {list(value.shape)} for a parameter of which this rank has "
                    f"{list(parameter.shape)}. Make it after shard_model, from sharded.parameters()."
                )
