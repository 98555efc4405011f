"""Models that pipelines are tested with, and what one process gives for them: the same layers, one micro-batch after
another, with the random numbers of a pipeline."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvdscale.torch as hvd
from hvdscale.model.batch import cut
from hvdscale.torch.randomness import apart, reseed

SEED, SAMPLES = 11, 14


class Pair(nn.Module):
    """Gives a tuple: what follows takes it apart."""

    def forward(self, x: Tensor) -> Any:
        return {"x": x, "rest": (x.sign().long(), 0.5)}


class Unpair(nn.Module):
    def forward(self, given: Any) -> Tensor:
        sign, half = given["rest"]
        return given["x"] + half * sign


class Branches(nn.Module):
    """Residual connections, a parameter of its own, a shared weight and a function of torch: to be captured."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(12, width), nn.Linear(width, 12, bias=False)
        self.head.weight = self.embed.weight
        self.places = nn.Parameter(torch.randn(5, width))
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(6))
        self.gate = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        x = first = self.embed(tokens) + self.places
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        rows, length = x.shape[0], x.size(1)
        return self.head(torch.cat([x * self.gate(first).sigmoid(), first], 1).view(rows, 2, length, -1).mean(1))


def tokens(width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(12, (SAMPLES, 5), generator=generator), torch.randint(12, (SAMPLES, 5), generator=generator)


def vectors(width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(SAMPLES, width, generator=generator), torch.randn(SAMPLES, 3, generator=generator)


def plain(width: int = 6) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(width, 8)]
    for _ in range(4):
        layers += [nn.Tanh(), nn.Linear(8, 8)]
    return nn.Sequential(*layers, nn.Linear(8, 3))


def drawn(width: int = 6) -> nn.Sequential:
    """Dropout and batch normalisation, a nested group, an in-place activation at any cut."""
    middle = nn.Sequential(nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(8, 8))
    return nn.Sequential(
        nn.Linear(width, 8), middle, nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)
    )


def skipping(width: int = 6) -> nn.Sequential:
    far, near = hvd.Skip(), hvd.Skip()
    return nn.Sequential(
        nn.Linear(width, 8), far.push(), nn.Linear(8, 8), nn.Tanh(), near.push(), nn.Linear(8, 8), Pair(), Unpair(),
        nn.Linear(8, 8), near.pop(torch.mul), nn.Tanh(), nn.Linear(8, 8), far.pop(), nn.Linear(8, 3),
    )  # fmt: skip


def tied(width: int = 6) -> nn.Sequential:
    model = nn.Sequential(
        nn.Embedding(12, 8), *(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)), nn.Linear(8, 12)
    )
    model[-1].weight = model[0].weight
    return model


def images(width: int = 6) -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, width)), nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 4, 3), nn.Flatten(),
        nn.Linear(4 * (width - 2), 8), nn.Linear(8, 8), nn.Linear(8, 3),
    )  # fmt: skip


def mean_of_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


@dataclass(frozen=True)
class Model:
    """A way to build a model, the data it takes, its loss, and how it is sharded."""

    make: Callable[[], nn.Module]
    data: Callable[[int], tuple[Tensor, Tensor]] = vectors
    loss: Callable[[Any, Any], Tensor] = nn.functional.mse_loss
    by: str = "layers"


MODELS = {
    "plain": Model(plain),
    "drawn": Model(drawn),
    "skips": Model(skipping),
    "tied": Model(tied, tokens, mean_of_tokens),
    "convolutions": Model(images),
    "graph": Model(Branches, tokens, mean_of_tokens, "graph"),
}


def fresh(name: str) -> nn.Module:
    torch.manual_seed(5)
    return MODELS[name].make()


def alone(
    model: Model, whole: nn.Module, x: Tensor, y: Tensor, microbatches: int, step: int = 0, dp: int = 0
) -> tuple[float, nn.Module]:
    """Loss of a step of one process; gradients are added to those of ``whole``."""
    total = 0.0
    for m, piece in enumerate(cut(len(x), microbatches)):
        value: Any = x[piece]
        with apart():
            if model.by == "layers":
                for number, layer in enumerate(flat(whole)):
                    reseed(SEED, dp, step, m, number)
                    value = layer(value)
            else:
                value = whole(value)
        loss = model.loss(value, y[piece]) * (len(x[piece]) / len(x))
        loss.backward()
        total += loss.item()
    return total, whole


def flat(model: nn.Module) -> list[nn.Module]:
    if type(model) is not nn.Sequential:
        return [model]
    return [layer for child in model for layer in flat(child)]


def twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
