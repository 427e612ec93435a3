"""Relative positions by Shaw et al.: learned vectors for clipped distances, added to keys and to values."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.layers.attention_arguments import check_attention
from minillm.layers.positions.relative import relative_positions, relative_range
from minillm.layers.scaled_dot_product import attention_weights, weighted_sum


class ShawPositions(nn.Module):
    """Attention with relative position representations (Shaw et al. 2018, section 3, eq. 3 and 4).

    ``score_ij = q_i . (k_j + keys[r]) * scale`` and ``output_i = sum_j weight_ij (v_j + values[r])`` where r is the
    relative position ``j - i`` clipped to ``max_distance`` on both sides. The tables are shared by all heads.

    The vectors of all pairs, (query, key, head_dim), are never made: there are few distinct ones. A query is multiplied
    with the table once and its (query, table) products picked for each key; weights are summed for each row of the
    table and the (query, table) sums multiplied with the values' table. (The paper's section 3.3 keeps the vectors of
    all pairs and shares them between heads and texts; Huang et al. 2018, "Music Transformer", section 3.4, multiply
    with the table first.)

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
        key_length = key.size(2)
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
        low = min(low, high)  # without queries or keys there are no places between the two
        relative = relative_positions(query_length, key_length, offset=offset, device=query.device)
        rows = (relative.clamp(low, high) - low).expand(batch, n_heads, -1, -1)
        table = slice(low + k, high + k + 1)

        wide = torch.promote_types(query.dtype, torch.float32)
        along = (query.to(wide) * scale @ self.keys[table].to(wide).t()).gather(-1, rows)
        if causal:
            mask = relative <= 0 if mask is None else mask & (relative <= 0)
        weights, empty = attention_weights(
            query, key, mask=mask, bias=along if bias is None else along + bias, scale=scale
        )
        used = F.dropout(weights, dropout) if dropout else weights
        # Summed in the wide dtype: the far end of a row may be thousands of small weights.
        sums = used.new_zeros(batch, n_heads, query_length, high - low + 1).scatter_add(-1, rows, used)
        output = weighted_sum(used.to(value.dtype), value) + sums.to(value.dtype) @ self.values[table].to(value.dtype)
        output = output.masked_fill(empty, 0.0)
        return (output, weights.to(value.dtype).masked_fill(empty, 0.0)) if return_weights else output

    def extra_repr(self) -> str:
        return f"head_dim={self.keys.size(1)}, max_distance={self.max_distance}, bidirectional={self.bidirectional}"
