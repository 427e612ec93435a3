"""Block-sparse attention as the kernels read it: for each tile of queries the live tiles of keys, and the reverse."""

from dataclasses import dataclass

import torch
from torch import Tensor

_PARTIAL, _FULL = 1, 2


@dataclass(frozen=True, eq=False)
class BlockSparse:
    """Which tiles of an attention matrix are alive, the same for every sequence and head.

    states: int8 (rows, columns), 0 for a dead tile, 1 for one with a mask, 2 for one in which every pair is allowed.
    mask_numbers: int64 (rows, columns), for a tile in state 1 its place in ``masks``.
    masks: boolean (n, block_size, block_size), True where the query (second dimension) may look at the key (third).
    block_size: side of a tile; the last row and column of tiles may reach beyond the last query and key.
    """

    states: Tensor
    mask_numbers: Tensor
    masks: Tensor
    block_size: int

    def kernel_block(self, largest: int) -> int:
        """Side of the tiles that the kernels take: the largest power of two that divides block_size, or ``largest``."""
        return min(largest, self.block_size & -self.block_size)


def block_tables(
    sparse: BlockSparse, block: int, query_length: int, key_length: int, left: int | None, right: int | None
) -> list[Tensor]:
    """Seven tensors: for the queries' side bounds, tiles and mask numbers, the same for the keys' side, and the masks.

    A layout's tile is cut into tiles of side ``block``, which divides it. A row's live tiles stand in one list, those
    that need no mask first; ``bounds`` int32 (rows, 3) says where its part begins, where the tiles without a mask end,
    and where it ends. ``tiles`` and ``numbers`` int32 (live tiles,): the tile on the other side and its mask. Masks:
    uint8 (n + 1, block, block), the last of ones, for a tile that only a ragged edge or the band cuts. The band:
    a query looks at ``left`` keys before its own place and ``right`` after it, None for all.
    """
    rows, columns = -(-query_length // block), -(-key_length // block)
    parts = sparse.block_size // block
    n_masks = sparse.masks.size(0)
    device = sparse.states.device
    # masks (n, row of parts, block, column of parts, block) -> one for each part of each mask, and one of ones
    masks = sparse.masks.view(n_masks, parts, block, parts, block).transpose(2, 3).reshape(-1, block, block)
    masks = torch.cat([masks, masks.new_ones(1, block, block)])
    ones = masks.size(0) - 1
    states = sparse.states.repeat_interleave(parts, 0).repeat_interleave(parts, 1)[:rows, :columns]
    numbers = sparse.mask_numbers.repeat_interleave(parts, 0).repeat_interleave(parts, 1)[:rows, :columns]
    row = torch.arange(rows, device=device)[:, None]
    column = torch.arange(columns, device=device)[None, :]
    numbers = (numbers * parts + row % parts) * parts + column % parts
    numbers = torch.where(states == _PARTIAL, numbers, ones)

    # The pairs that exist, in the keys' coordinates: places first ... last, keys low ... high.
    first = row * block + key_length - query_length
    last = (first + block).clamp(max=key_length) - 1
    low = column * block
    high = (low + block).clamp(max=key_length) - 1
    live = (states != 0) & masks.any(2).any(1)[numbers]
    masked = ~masks.all(2).all(1)[numbers] | (low + block > key_length) | (first + block > key_length)
    if right is not None:
        live, masked = live & (low <= last + right), masked | (high > first + right)
    if left is not None:
        live, masked = live & (high >= first - left), masked | (low < last - left)

    row, column = live.nonzero(as_tuple=True)
    masked, numbers = masked[row, column].long(), numbers[row, column].int()
    tables = []
    for own, other, n_own in ((row, column, rows), (column, row, columns)):
        kind = 2 * own + masked
        order = kind.argsort(stable=True)
        ends = torch.nn.functional.pad(kind.bincount(minlength=2 * n_own).cumsum(0), (1, 0))
        bounds = torch.stack([ends[0:-1:2], ends[1::2], ends[2::2]], 1)
        tables += [bounds.int(), other[order].int(), numbers[order]]
    return [*tables, masks.to(torch.uint8)]
