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
        # In half precision scores would be rounded before the softmax, or overflow, and every key collects gradients
        # from many rows. On a CPU products in float32 are no slower either.
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        query, key, value = (tensor.to(self.dtype) for tensor in (query, key, value))
        self.query = query.reshape(n, self.n_heads // n_kv_heads, query_length, head_dim)  # (n, g, query_length, .)
        self.key = _dense_rows(key.reshape(n, key_length, head_dim))
        self.value = _dense_rows(value.reshape(n, key_length, value.size(3)))
        self.mask = None if mask is None else mask[(None,) * (4 - mask.dim())]
        self.bias = None if bias is None else bias[(None,) * (4 - bias.dim())]
        self.bias_shape = (1,) * 4 if self.bias is None else tuple(self.bias.shape)
        self.block_size, self.scale, self.dropout, self.seed = layout.block_size, scale, dropout, seed
        self.tiles = layout.masks.to(query.device)
        # Made once where many rows share a few; a pattern of many different tiles makes each row's anew.
        self.additive_tiles = self._additive(self.tiles) if len(self.tiles) <= 64 else None

    def rows_of(self, tensor: Tensor, row: LiveRow) -> Tensor:
        """The row's queries of (n, g, query_length, .) as one matrix for each key head: (n, g * rows, .)."""
        return tensor[:, :, row.start : row.stop].flatten(1, 2)

    def put(self, tensor: Tensor, row: LiveRow, part: Tensor) -> None:
        """The way back of ``rows_of``."""
        tensor[:, :, row.start : row.stop] = part.view(*tensor.shape[:2], row.stop - row.start, tensor.size(3))

    def live(self, tensor: Tensor, row: LiveRow) -> Tensor:
        """The row's live keys of (n, key_length, .) side by side; a single range of them is not copied."""
        if len(row.runs) == 1:
            return tensor[:, slice(*row.runs[0])]
        whole, ragged, tiles = self._tiles(tensor, row)
        gathered = whole.index_select(1, tiles).view(tensor.size(0), len(tiles) * self.block_size, tensor.size(2))
        return gathered if ragged is None else torch.cat((gathered, ragged), 1)

    def add_product(self, total: Tensor, row: LiveRow, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
        """``total[live keys] += scale * left^T right``: left (n, g * rows, live keys), right (n, g * rows, .)."""
        if len(row.runs) == 1:
            target = total[:, slice(*row.runs[0])]
            torch.baddbmm(target, left.mT, right, alpha=scale, out=target)
            return
        part = torch.bmm(left.mT, right)
        whole, ragged, tiles = self._tiles(total, row)
        n_whole = len(tiles) * self.block_size
        whole.index_add_(1, tiles, part[:, :n_whole].reshape(len(part), len(tiles), whole.size(2)), alpha=scale)
        if ragged is not None:
            ragged.add_(part[:, n_whole:], alpha=scale)

    def _tiles(self, tensor: Tensor, row: LiveRow) -> tuple[Tensor, Tensor | None, Tensor]:
        """Whole tiles of keys as rows, which of them the row needs, and the narrower last one if it needs that."""
        n, key_length, width = tensor.shape
        end = key_length - key_length % self.block_size
        whole = tensor[:, :end].view(n, end // self.block_size, self.block_size * width)
        ragged = tensor[:, end:] if row.runs[-1][1] > end else None
        return whole, ragged, row.tiles(self.block_size).to(tensor.device)

    def scores(self, row: LiveRow, queries: Tensor, keys: Tensor) -> Tensor:
        """Scaled, biased and masked scores of the row: (n, g * rows, live keys), for the caller to overwrite.

        In units of log 2, because ``exp2`` takes the same time everywhere; torch's ``exp`` on CPU is 15 to 150 times
        slower on -inf and on what underflows.
        """
        nothing = queries.new_zeros(1, 1, 1)
        scores = torch.baddbmm(nothing, queries, keys.mT, beta=0, alpha=self.scale * _LOG2_E)
        by_head = self._by_head(row, scores)
        if self.bias is not None:
            by_head.add_(_cut(self.bias, row), alpha=_LOG2_E)
        for first, width, numbers in row.partial:
            known = self.additive_tiles
            tiles = self._additive(self.tiles[numbers]) if known is None else known[numbers]
            beside = tiles.transpose(0, 1).flatten(1)  # as the keys are
            by_head[..., first : first + width] += beside[: row.stop - row.start, :width]
        if self.mask is not None:
            by_head += self._additive(_cut(self.mask, row))
        return scores

    def add_to_bias(self, d_bias: Tensor, row: LiveRow, d_scores: Tensor) -> None:
        """Add the row's part of the bias's gradient, summed over what the bias was broadcast over."""
        queries = slice(row.start, row.stop) if d_bias.size(2) > 1 else slice(None)
        target, part = d_bias[:, :, queries], self._by_head(row, d_scores)
        part = part.sum_to_size(*target.shape[:3], part.size(3) if target.size(3) > 1 else 1)
        if target.size(3) == 1:
            target += part
            return
        column = 0
        for start, stop in row.runs:
            target[..., start:stop] += part[..., column : column + stop - start]
            column += stop - start

    def kept(self, number: int, weights: Tensor) -> Tensor:
        """The dropout mask of row ``number``, scaled: the same numbers each time it is asked for."""
        generator = torch.Generator(weights.device).manual_seed(self.seed + number)
        return torch.empty_like(weights).bernoulli_(1 - self.dropout, generator=generator).div_(1 - self.dropout)

    def _additive(self, allowed: Tensor) -> Tensor:
        """0 where allowed, else -inf. On CPU adding it takes a thirtieth of ``masked_fill_`` with a broadcast mask."""
        return torch.zeros_like(allowed, dtype=self.dtype).masked_fill_(~allowed, -math.inf)

    def _by_head(self, row: LiveRow, scores: Tensor) -> Tensor:
        return scores.view(self.batch, self.n_heads, row.stop - row.start, row.n_keys)


def _dense_rows(tensor: Tensor) -> Tensor:
    """Copied if the heads of one token lie between those of the next: many rows read each key, far apart is slow."""
    return tensor if tensor.stride()[1:] == (tensor.size(2), 1) else tensor.contiguous()


def _cut(tensor: Tensor, row: LiveRow) -> Tensor:
    """A row of tiles out of something that broadcasts to (batch, n_heads, query_length, key_length)."""
    if tensor.size(2) > 1:
        tensor = tensor[:, :, row.start : row.stop]
    if tensor.size(3) == 1:
        return tensor
    parts = [tensor[..., start:stop] for start, stop in row.runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 3)
