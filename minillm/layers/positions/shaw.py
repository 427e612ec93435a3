"""Relative positions by Shaw et al.: learned vectors for clipped distances, added to keys and to values."""

import math
from typing import Literal, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.layers.positions.relative import relative_positions, relative_range
from minillm.layers.scaled_dot_product import check_attention


class ShawPositions(nn.Module):
    """Attention with relative position representations (Shaw et al. 2018, section 3, eq. 3 and 4).

    ``score_ij = q_i . (k_j + keys[r]) * scale`` and ``output_i = sum_j weight_ij (v_j + values[r])`` where r is the
    relative position ``j - i`` clipped to ``max_distance`` on both sides. The tables are shared by all heads.

    The vectors of all pairs, (query, key, head_dim), are never made: there are few distinct ones. A query is multiplied
    with the table once and its (query, table) products picked for each key; weights are summed for each row of the
    table and the (query, table) sums multiplied with the values' table (section 3.3 for the first half).

    Args:
        head_dim: of query, key and value.
        max_distance: k; positions further away share the vector of distance k.
        bidirectional: False keeps only the rows for the past, and keys to the right use that of distance 0.

    Attributes: ``keys`` and ``values``, (2k + 1, head_dim) with row r + k for relative position r; (k + 1, head_dim) if
    not bidirectional.
    """

    def __init__(self, head_dim: int, max_distance: int, *, bidirectional: bool = True) -> None:
        super().__init__()
        if head_dim < 1 or max_distance < 1:
            raise ValueError(f"head_dim and max_distance must be at least 1, got {head_dim} and {max_distance}")
        self.max_distance, self.bidirectional = max_distance, bidirectional
        rows = 2 * max_distance + 1 if bidirectional else max_distance + 1
        self.keys = nn.Parameter(torch.empty(rows, head_dim))
        self.values = nn.Parameter(torch.empty(rows, head_dim))
        nn.init.normal_(self.keys, std=0.02)
        nn.init.normal_(self.values, std=0.02)

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = ...,
        bias: Tensor | None = ...,
        causal: bool = ...,
        scale: float | None = ...,
        dropout: float = ...,
        return_weights: Literal[False] = ...,
        offset: int | None = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = ...,
        bias: Tensor | None = ...,
        causal: bool = ...,
        scale: float | None = ...,
        dropout: float = ...,
        return_weights: Literal[True],
        offset: int | None = ...,
    ) -> tuple[Tensor, Tensor]: ...
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        return_weights: bool = False,
        offset: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Arguments and results of :func:`scaled_dot_product_attention`, in whose place it stands (``attend``).

        ``offset`` is the place of the first query counted from the first key, for relative positions and ``causal``;
        None: the last query stands at the last key.
        """
        check_attention(query, key, value, mask, bias, dropout)
        batch, n_heads, query_length, head_dim = query.shape
        n_kv_heads, key_length = key.shape[1], key.shape[2]
        if head_dim != self.keys.size(1) or value.size(3) != head_dim:
            raise ValueError(
                f"query, key and value must have head_dim={self.keys.size(1)}, "
                f"got {head_dim} in query and key, {value.size(3)} in value"
            )
        scale = 1 / math.sqrt(head_dim) if scale is None else scale

        # Of the table only the rows that some pair uses: for a single query, or before k tokens, these are not all.
        k = self.max_distance
        low, high = (max(-k, min(k, place)) for place in relative_range(query_length, key_length, offset))
        if causal or not self.bidirectional:
            low, high = min(low, 0), min(high, 0)
        relative = relative_positions(query_length, key_length, offset=offset, device=query.device)
        rows = (relative.clamp(low, high) - low).expand(batch, n_heads, -1, -1)
        table = slice(low + k, high + k + 1)

        group_rows = (n_heads // n_kv_heads) * query_length
        grouped = query.reshape(batch, n_kv_heads, group_rows, head_dim)
        scores = (grouped @ key.transpose(-2, -1)).view(batch, n_heads, query_length, key_length)
        scores = (scores + (query @ self.keys[table].to(query.dtype).t()).gather(-1, rows)) * scale
        scores = scores if scores.dtype is torch.float64 else scores.float()
        if bias is not None:
            scores = scores + bias
        if causal:
            mask = relative <= 0 if mask is None else mask & (relative <= 0)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        empty = scores.amax(-1, keepdim=True) == -math.inf  # such rows would become 0/0: their weights are zeros
        weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)

        used = F.dropout(weights, dropout) if dropout else weights
        # Summed in the wide dtype: the far end of a row may be thousands of small weights.
        sums = used.new_zeros(batch, n_heads, query_length, high - low + 1).scatter_add(-1, rows, used)
        output = used.to(value.dtype).reshape(batch, n_kv_heads, group_rows, key_length) @ value
        output = output.view(query.shape) + sums.to(value.dtype) @ self.values[table].to(value.dtype)
        return (output, weights.to(value.dtype)) if return_weights else output

    def extra_repr(self) -> str:
        return f"head_dim={self.keys.size(1)}, max_distance={self.max_distance}, bidirectional={self.bidirectional}"
