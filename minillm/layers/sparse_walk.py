"""How block-sparse attention walks over the rows of tiles: what its forward and its backward share."""

import math

import torch
from torch import Tensor

from minillm.layers.block_layout import BlockLayout, LiveRow

_LOG2_E = math.log2(math.e)


class Walk:
    """The tensors by groups of heads, and how a row of tiles is cut out of them."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        layout: BlockLayout,
        scale: float,
        dropout: float,
        seed: int,
    ) -> None:
        self.batch, self.n_heads, query_length, head_dim = query.shape
        n_kv_heads, key_length = key.shape[1:3]
        n = self.batch * n_kv_heads
        self.query = query.reshape(n, self.n_heads // n_kv_heads, query_length, head_dim)  # (n, g, query_length, .)
        self.key = key.reshape(n, key_length, head_dim)
        self.value = value.reshape(n, key_length, value.size(3))
        self.mask = None if mask is None else mask[(None,) * (4 - mask.dim())]
        self.bias = None if bias is None else bias[(None,) * (4 - bias.dim())]
        self.bias_shape = (1,) * 4 if self.bias is None else tuple(self.bias.shape)
        self.scale, self.dropout, self.seed = scale, dropout, seed
        self.accumulate = torch.float64 if query.dtype is torch.float64 else torch.float32
        self.tiles = self._additive(layout.masks.to(query.device))

    def rows_of(self, tensor: Tensor, row: LiveRow) -> Tensor:
        """The row's queries of (n, g, query_length, .) as one matrix for each key head: (n, g * rows, .)."""
        return tensor[:, :, row.start : row.stop].flatten(1, 2)

    def put(self, tensor: Tensor, row: LiveRow, part: Tensor) -> None:
        """The way back of ``rows_of``."""
        tensor[:, :, row.start : row.stop] = part.view(part.size(0), tensor.size(1), -1, part.size(2))

    def scores(self, row: LiveRow, queries: Tensor, keys: Tensor) -> Tensor:
        """Scaled, biased and masked scores of the row: (n, g * rows, live keys), for the caller to overwrite.

        In units of log 2, because ``exp2`` takes the same time everywhere; torch's ``exp`` on CPU is 60 to 300 times
        slower on -inf and on what underflows.
        """
        nothing = queries.new_zeros(1, 1, 1)
        scores = torch.baddbmm(nothing, queries, keys.mT, beta=0, alpha=self.scale * _LOG2_E).to(self.accumulate)
        by_head = self._by_head(scores)
        if self.bias is not None:
            by_head.add_(_cut(self.bias, row), alpha=_LOG2_E)
        for first, width, numbers in row.partial:
            tiles = self.tiles[numbers].transpose(0, 1).flatten(1)  # side by side, as the keys are
            by_head[..., first : first + width] += tiles[: row.stop - row.start, :width]
        if self.mask is not None:
            by_head += self._additive(_cut(self.mask, row))
        return scores

    def add_to_bias(self, d_bias: Tensor, row: LiveRow, d_scores: Tensor) -> None:
        """Add the row's part of the bias's gradient, summed over what the bias was broadcast over."""
        queries = slice(row.start, row.stop) if d_bias.size(2) > 1 else slice(None)
        target, part = d_bias[:, :, queries], self._by_head(d_scores)
        part = part.sum_to_size(*target.shape[:3], part.size(3) if target.size(3) > 1 else 1)
        if target.size(3) == 1:
            target += part
        elif isinstance(row.keys, slice):
            target[..., row.keys] += part
        else:
            target.index_add_(3, row.keys.to(target.device), part)

    def kept(self, number: int, weights: Tensor) -> Tensor:
        """The dropout mask of row ``number``, scaled: the same numbers each time it is asked for."""
        generator = torch.Generator(weights.device).manual_seed(self.seed + number)
        return torch.empty_like(weights).bernoulli_(1 - self.dropout, generator=generator).div_(1 - self.dropout)

    def _additive(self, allowed: Tensor) -> Tensor:
        """0 where allowed, else -inf. On CPU adding it takes a thirtieth of ``masked_fill_`` with a broadcast mask."""
        return torch.zeros_like(allowed, dtype=self.accumulate).masked_fill_(~allowed, -math.inf)

    def _by_head(self, scores: Tensor) -> Tensor:
        return scores.view(self.batch, self.n_heads, -1, scores.size(-1))


def live(tensor: Tensor, row: LiveRow, dim: int = 1) -> Tensor:
    """The row's live keys of ``tensor`` side by side; a single range of them is not copied."""
    if isinstance(row.keys, slice):
        return tensor.narrow(dim, row.keys.start, row.keys.stop - row.keys.start)
    return tensor.index_select(dim, row.keys.to(tensor.device))


def add_product(total: Tensor, row: LiveRow, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    """``total[live keys] += scale * left^T right`` for left (n, g * rows, live keys) and right (n, g * rows, .)."""
    if isinstance(row.keys, slice) and total.dtype == left.dtype:
        target = total[:, row.keys]
        torch.baddbmm(target, left.mT, right, alpha=scale, out=target)
    elif isinstance(row.keys, slice):
        total[:, row.keys].add_(torch.bmm(left.mT, right), alpha=scale)
    else:
        part = torch.bmm(left.mT, right).to(total.dtype)
        total.index_add_(1, row.keys.to(total.device), part, alpha=scale)


def _cut(tensor: Tensor, row: LiveRow) -> Tensor:
    """A row of tiles out of something that broadcasts to (batch, n_heads, query_length, key_length)."""
    if tensor.size(2) > 1:
        tensor = tensor[:, :, row.start : row.stop]
    return tensor if tensor.size(3) == 1 else live(tensor, row, 3)
