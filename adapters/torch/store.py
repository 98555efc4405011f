"""A torch model and its optimizer as rounds see them: float32 vectors in, float32 vectors out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from hvdscale.sync.tensors import Role, Tensors, TensorSpec

__all__ = ["TensorList", "TorchStore", "embedding_weights", "spec_of", "state_of_arrays", "state_of_tensors"]


class TensorList:
    """Named tensors. One that is ``None`` is not there yet: it reads as zero and is not written."""

    def __init__(self, entries: Sequence[tuple[TensorSpec, Tensor | None]]) -> None:
        self.specs = [spec for spec, _ in entries]
        self._tensors = [tensor for _, tensor in entries]
        self._flat: dict[int, tuple[int, np.ndarray]] = {}  # by position: its address, and the tensor as an array

    @torch.no_grad()
    def read(self, positions: Sequence[int], out: np.ndarray) -> None:
        for tensor, part in self._beside(positions, out):
            if tensor is None:
                part.zero_()
            else:
                part.copy_(tensor.reshape(-1))

    @torch.no_grad()
    def write(self, positions: Sequence[int], values: np.ndarray) -> None:
        for tensor, part in self._beside(positions, values):
            if tensor is not None:
                tensor.copy_(part.view(tensor.shape))  # in place: whoever holds the tensor goes on holding it

    def view(self, position: int, writes: bool = False) -> np.ndarray | None:
        tensor = self._tensors[position]
        if tensor is None:
            return None
        lies_at, flat = self._flat.get(position, (0, None))
        if flat is None or lies_at != tensor.data_ptr():
            if not _lies_flat(tensor):
                return None
            flat = tensor.detach().numpy().reshape(-1)
            self._flat[position] = tensor.data_ptr(), flat  # which keeps the memory, so the address stays its own
        if writes:
            increment_version(tensor)  # autograd notices, as it does with copies
        return flat

    def keep(self) -> Callable[[], None]:
        kept = [(tensor, tensor.detach().clone()) for tensor in self._tensors if tensor is not None]

        @torch.no_grad()
        def put_back() -> None:
            for tensor, values in kept:
                tensor.copy_(values)

        return put_back

    def _beside(self, positions: Sequence[int], flat: np.ndarray) -> list[tuple[Tensor | None, Tensor]]:
        parts = torch.from_numpy(flat).split([self.specs[p].size for p in positions])
        return [(self._tensors[p], part) for p, part in zip(positions, parts, strict=True)]


class TorchStore:
    """What rounds touch of a torch model.

    Args:
        optimizer: holds the moments and the learning rate.
        named: trainable parameters of the optimizer by name, each once.
        model: for its buffers, and to know embeddings; without it no buffer is averaged.
    """

    def __init__(self, optimizer: Optimizer, named: Sequence[tuple[str, Tensor]], model: nn.Module | None) -> None:
        embeddings = embedding_weights(model)
        self._optimizer = optimizer
        self._named = list(named)
        self.weights: Tensors = TensorList(
            [(spec_of(name, p, "embedding" if id(p) in embeddings else "weight"), p) for name, p in named]
        )
        self.buffers: Tensors = TensorList(_buffers(model))

    def moments(self, positions: Sequence[int]) -> Tensors:
        state = self._optimizer.state
        keys = sorted({key for _, p in self._named for key, value in state.get(p, {}).items() if _is_moment(value, p)})
        entries = []
        for position in positions:
            name, parameter = self._named[position]
            for key in keys:
                value = state.get(parameter, {}).get(key)
                entries.append((spec_of(f"{name}.{key}", parameter, "moment"), value))
        return TensorList(entries)

    def forget_moments(self, positions: Sequence[int]) -> None:
        for position in positions:
            parameter = self._named[position][1]
            self._optimizer.state.pop(parameter, None)
            if isinstance(self._optimizer, torch.optim.Adagrad):  # alone makes its state with itself, not when it steps
                first = self._optimizer.defaults["initial_accumulator_value"]
                self._optimizer.state[parameter] |= {
                    "step": torch.tensor(0.0),
                    "sum": torch.full_like(parameter, first),
                }

    def begin_anew(self) -> None:
        self.forget_moments(range(len(self._named)))

    def lr(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])


def _lies_flat(tensor: Tensor) -> bool:
    """Whether it is float32 without gaps in the host's memory, and nothing but a tensor."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and tensor.device.type == "cpu" and tensor.dtype is torch.float32 and tensor.is_contiguous()


def state_of_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """A state of plain numbers and tensors: what ``torch.load`` reads without being told to trust the file."""
    return {**state, "arrays": {name: torch.from_numpy(array) for name, array in state["arrays"].items()}}


def state_of_arrays(state: Mapping[str, Any]) -> dict[str, Any]:
    """The same as the core knows it."""
    return {**state, "arrays": {name: np.asarray(array) for name, array in state.get("arrays", {}).items()}}


def spec_of(name: str, tensor: Tensor, role: Role) -> TensorSpec:
    """What a round is told of ``tensor``."""
    return TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), role)


def _is_moment(value: Any, parameter: Tensor) -> bool:
    """Step counters are no moments: they are whole numbers, the same on every rank that made the same steps."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == parameter.shape


def embedding_weights(model: nn.Module | None) -> set[int]:
    """The ``id`` of the weights of the model's embeddings."""
    modules = () if model is None else model.modules()
    return {id(module.weight) for module in modules if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}


def _buffers(model: nn.Module | None) -> list[tuple[TensorSpec, Tensor | None]]:
    """Floating-point buffers by name, each batch normalisation's mean and variance next to each other."""
    if model is None:
        return []
    roles: dict[int, Role] = {}
    for module in model.modules():
        mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
        if isinstance(mean, Tensor) and isinstance(variance, Tensor):
            roles |= {id(mean): "mean", id(variance): "variance"}
    # named_buffers gives a module's buffers in the order they were registered: the mean, then the variance.
    return [(spec_of(n, b, roles.get(id(b), "weight")), b) for n, b in model.named_buffers() if b.is_floating_point()]
