"""``nn.MultiheadAttention`` with its heads split over a team: each rank attends with its own heads.

Shoeybi et al., arXiv 1909.08053, section 3. Heads may be uneven; the number of heads must be at least that of ranks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hvdscale.errors import PlanError
from hvdscale.model.layout import Split
from hvdscale.runtime.team import Team
from hvdscale.torch.parallel_layers import sizes_of
from hvdscale.torch.tensor_parallel import enter, join, leave, team_dropout

__all__ = ["HeadParallelAttention"]


class HeadParallelAttention(nn.MultiheadAttention):
    """Takes and gives what ``nn.MultiheadAttention`` does; ``in_proj_weight`` and ``out_proj.weight`` are parts."""

    team: Team
    heads: tuple[int, ...]  # of each rank

    @staticmethod
    def split(layer: Any, team: Team) -> None:
        """Make ``layer`` one of these.

        Raises:
            PlanError: it has what cannot be split.
        """
        if layer.bias_k is not None or layer.add_zero_attn:
            raise PlanError(
                "Attention with add_bias_kv or add_zero_attn cannot be split by heads. Leave both out, or the layer."
            )
        heads = sizes_of(Split(0), layer.num_heads, team.size)
        layer.__class__ = HeadParallelAttention
        layer.team, layer.heads = team, heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        unbatched = query.dim() == 2
        if unbatched:
            query, key, value = (t.unsqueeze(0 if self.batch_first else 1) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (
            t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in self._project(query, key, value)
        )  # [batch, own heads, length, head_dim]
        mask = self._mask(attn_mask, key_padding_mask, query.shape[0], q.dtype)
        p = self.dropout if self.training else 0.0
        weights = None
        if need_weights or p:
            scores = (q / math.sqrt(self.head_dim)) @ k.transpose(-2, -1)  # [batch, own heads, queries, keys]
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            if p:
                weights = team_dropout(weights, p, self.team, 1, self.heads)
            y = weights @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask)
        y = leave(F.linear(y.transpose(1, 2).flatten(-2), self.out_proj.weight), self.team)
        y = y if self.out_proj.bias is None else y + self.out_proj.bias
        # In memory the sequence comes first, as torch leaves it: dropout that follows draws its mask in that order.
        y = y.transpose(0, 1).contiguous()
        if self.batch_first:
            y = y.transpose(0, 1)
        whole_weights = self._whole(weights, average_attn_weights) if need_weights and weights is not None else None
        if unbatched:
            y = y.squeeze(0 if self.batch_first else 1)
            whole_weights = None if whole_weights is None else whole_weights.squeeze(0)
        return y, whole_weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        biases: tuple[Tensor | None, ...] = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        if self.in_proj_weight is not None:
            if query is key and key is value:  # what enters once is added up once
                return F.linear(enter(query, self.team), self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        inputs = zip((query, key, value), weights, biases, strict=True)
        return tuple(F.linear(enter(x, self.team), weight, bias) for x, weight, bias in inputs)

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of the own heads: [batch or 1, own heads or 1, queries or 1, keys]."""
        masks = []
        if attn_mask is not None:
            whole = _additive(attn_mask, dtype)
            if whole.dim() == 3:  # [batch * heads, queries, keys]
                first = sum(self.heads[: self.team.rank])
                whole = whole.unflatten(0, (batch, sum(self.heads)))[:, first : first + self.heads[self.team.rank]]
            masks.append(whole)
        if padding is not None:
            masks.append(_additive(padding, dtype)[:, None, None, :])
        return sum(masks) if masks else None  # type: ignore[return-value]

    def _whole(self, weights: Tensor, average: bool) -> Tensor:
        if average:
            return leave(weights.sum(1), self.team) / sum(self.heads)
        return join(weights, self.team, 1, self.heads)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -math.inf)
    return mask.to(dtype)
