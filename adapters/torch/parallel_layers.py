"""Linear and embedding layers whose weights are split over a team: Shoeybi et al., arXiv 1909.08053, section 3.

Each can be made directly, or out of a layer there is, in place (``split``): the layer and its parameters stay the same
objects, so that optimizers, hooks and tied weights that refer to them keep working.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvdscale.errors import PlanError
from hvdscale.model.layout import Split
from hvdscale.model.mesh import Mesh
from hvdscale.runtime.team import Team
from hvdscale.torch.teams import tensor_team
from hvdscale.torch.tensor_parallel import enter, exchanged, join, leave, part_of, team_dropout

__all__ = [
    "ColumnParallelLinear",
    "RowParallelLinear",
    "TeamDropout",
    "VocabParallelEmbedding",
    "keep_part",
    "sizes_of",
]


def sizes_of(split: Split, length: int, parts: int) -> tuple[int, ...]:
    """How many entries of an axis of ``length`` each rank of a team holds."""
    return tuple(sum(b - a for a, b in split.spans(length, parts, part)) for part in range(parts))


def keep_part(parameter: nn.Parameter | None, split: Split, team: Team) -> None:
    """Keep only this rank's part of a parameter, which stays the same object."""
    if parameter is None:
        return
    spans = split.spans(parameter.shape[split.axis], team.size, team.rank)
    pieces = [parameter.data.narrow(split.axis, a, b - a) for a, b in spans]
    parameter.data = torch.cat(pieces, split.axis).clone()
    parameter.grad = None


def _divide(layer: nn.Module, team: Team, **splits: Split) -> None:
    """Of the first rank's whole parameters, keep this rank's parts."""
    for name, parameter in layer.named_parameters():
        parameter.data = exchanged(parameter, team.first) if team.size > 1 else parameter.data
        if name in splits:
            keep_part(parameter, splits[name], team)


class ColumnParallelLinear(nn.Linear):
    """A linear layer whose outputs are split: ``float[..., in_features]`` to ``[..., out_features]``, or to a part.

    Args:
        in_features, out_features, bias, device, dtype: of the whole layer, as in ``nn.Linear``.
        mesh: whose tensor ranks share it.
        whole_output: give every rank all outputs; otherwise its own part alone, for a ``RowParallelLinear``.

    Raises:
        PlanError: fewer outputs than tensor ranks.
    """

    team: Team
    sizes: tuple[int, ...]  # outputs of each rank
    whole_output: bool

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mesh: Mesh,
        whole_output: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        team = tensor_team(mesh)
        _divide(self, team, weight=Split(0), bias=Split(0))
        ColumnParallelLinear.split(self, team, Split(0), whole_output)

    @staticmethod
    def split(layer: Any, team: Team, rows: Split, whole_output: bool) -> None:
        """Make ``layer``, whose weights are parts, one of these. ``rows`` is how the weight's first axis is divided."""
        sizes = sizes_of(rows, layer.out_features, team.size)
        layer.__class__ = ColumnParallelLinear
        layer.team, layer.sizes, layer.whole_output = team, sizes, whole_output
        layer.out_features = sizes[team.rank]

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(enter(x, self.team), self.weight, self.bias)
        return join(y, self.team, -1, self.sizes) if self.whole_output else y

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, whole_out_features={sum(self.sizes)}, whole_output={self.whole_output}"


class RowParallelLinear(nn.Linear):
    """A linear layer whose inputs are split: ``float[..., in_features]``, or a part, to ``[..., out_features]``.

    Every rank gets all outputs, and holds all of the bias.

    Args:
        in_features, out_features, bias, device, dtype: of the whole layer, as in ``nn.Linear``.
        mesh: whose tensor ranks share it.

    Raises:
        PlanError: fewer inputs than tensor ranks.
    """

    team: Team
    sizes: tuple[int, ...]  # inputs of each rank

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        mesh: Mesh,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        team = tensor_team(mesh)
        _divide(self, team, weight=Split(1))
        RowParallelLinear.split(self, team, Split(1))

    @staticmethod
    def split(layer: Any, team: Team, columns: Split) -> None:
        """Make ``layer``, whose weight is a part, one of these. ``columns`` is how its second axis is divided."""
        sizes = sizes_of(columns, layer.in_features, team.size)
        layer.__class__ = RowParallelLinear
        layer.team, layer.sizes = team, sizes
        layer.in_features = sizes[team.rank]

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] == sum(self.sizes):
            x = part_of(x, self.team, -1, self.sizes)
        elif x.shape[-1] != self.in_features:
            raise PlanError(
                f"A row parallel layer takes all {sum(self.sizes)} features or this rank's {self.in_features}; "
                f"{x.shape[-1]} came."
            )
        y = leave(F.linear(x, self.weight), self.team)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, whole_in_features={sum(self.sizes)}"


class VocabParallelEmbedding(nn.Embedding):
    """An embedding whose rows are split: ``int[...]`` to ``float[..., embedding_dim]``, whole on every rank.

    Args:
        num_embeddings, embedding_dim, padding_idx, sparse, device, dtype: of the whole layer, as in ``nn.Embedding``.
        mesh: whose tensor ranks share it.

    Raises:
        PlanError: fewer rows than tensor ranks.
    """

    team: Team
    start: int  # first row held here
    whole_embeddings: int

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        mesh: Mesh,
        sparse: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, sparse=sparse, device=device, dtype=dtype)
        team = tensor_team(mesh)
        _divide(self, team, weight=Split(0))
        VocabParallelEmbedding.split(self, team)

    @staticmethod
    def split(layer: Any, team: Team) -> None:
        """Make ``layer``, whose weight is a part, one of these."""
        if layer.max_norm is not None or layer.scale_grad_by_freq:
            raise PlanError(
                "A vocabulary parallel embedding takes neither max_norm nor scale_grad_by_freq: both look at all rows "
                "of a batch on each rank. Leave them out, or this layer whole."
            )
        ((start, stop),) = Split(0).spans(layer.num_embeddings, team.size, team.rank)
        layer.__class__ = VocabParallelEmbedding
        layer.team, layer.start, layer.whole_embeddings = team, start, layer.num_embeddings
        layer.num_embeddings = stop - start
        if layer.padding_idx is not None:
            layer.padding_idx = layer.padding_idx - start if start <= layer.padding_idx < stop else None

    def forward(self, ids: Tensor) -> Tensor:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.whole_embeddings:
            raise IndexError(f"ids lie in 0..{self.whole_embeddings - 1}; {int(ids.min())}..{int(ids.max())} came.")
        local = ids - self.start
        elsewhere = (local < 0) | (local >= self.num_embeddings)
        rows = F.embedding(local.masked_fill(elsewhere, 0), self.weight, self.padding_idx, sparse=self.sparse)
        return leave(rows.masked_fill(elsewhere.unsqueeze(-1), 0), self.team)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, whole_num_embeddings={self.whole_embeddings}"


class TeamDropout(nn.Dropout):
    """Dropout between split layers: the mask is that of one process, of which each rank uses its part."""

    team: Team
    sizes: tuple[int, ...]

    @staticmethod
    def split(layer: Any, team: Team, sizes: Sequence[int]) -> None:
        """Make ``layer`` one of these, over features of ``sizes``."""
        layer.__class__ = TeamDropout
        layer.team, layer.sizes = team, tuple(sizes)

    def forward(self, x: Tensor) -> Tensor:
        return team_dropout(x, self.p, self.team, -1, self.sizes) if self.training and self.p else x
