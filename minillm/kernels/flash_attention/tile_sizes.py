"""Sides of the kernels' tiles, warps and pipeline stages by head size, dtype and GPU: decided once, not searched for.

A program keeps its accumulators in registers (255 a thread at most) and the tiles it multiplies in shared memory
(99 KiB on a consumer's GPU, 163 on an A100, 227 on an H100). Hopper's matrix instruction takes 64 rows from four warps
together and wants wide tiles; with heads of 64, where exponentials cost as much as products, there is room for two
programs on a multiprocessor, one of which multiplies while the other exponentiates.
"""

from typing import Literal, NamedTuple

import torch

Direction = Literal["forward", "queries", "keys"]
SMALLEST_BLOCK = 16  # a side that tensor cores take


class TileSizes(NamedTuple):
    """block_m queries by block_n keys; warps of a program; stages: tiles on their way from memory at one time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# For heads of up to 64, 128 and 256.
_Table = dict[Direction, tuple[TileSizes, TileSizes, TileSizes]]
_HOPPER: _Table = {
    "forward": (TileSizes(128, 64, 4, 3), TileSizes(128, 128, 8, 2), TileSizes(128, 64, 8, 2)),
    "queries": (TileSizes(128, 64, 8, 3), TileSizes(128, 64, 8, 2), TileSizes(64, 64, 8, 2)),
    "keys": (TileSizes(64, 128, 8, 2), TileSizes(64, 128, 8, 2), TileSizes(32, 64, 8, 2)),
}
_OTHER: _Table = {  # within what a consumer's GPU has
    "forward": (TileSizes(128, 64, 4, 3), TileSizes(128, 64, 8, 2), TileSizes(64, 32, 8, 2)),
    "queries": (TileSizes(128, 64, 8, 2), TileSizes(64, 64, 8, 2), TileSizes(64, 32, 8, 1)),
    "keys": (TileSizes(64, 64, 8, 2), TileSizes(64, 64, 8, 2), TileSizes(32, 32, 8, 1)),
}
_FLOAT32: _Table = {  # without tensor cores, which would round to TF32
    "forward": (TileSizes(32, 32, 4, 2), TileSizes(32, 32, 4, 2), TileSizes(32, 32, 8, 1)),
    "queries": (TileSizes(32, 32, 4, 2), TileSizes(32, 32, 8, 1), TileSizes(32, 16, 8, 1)),
    "keys": (TileSizes(32, 32, 8, 1), TileSizes(32, 32, 8, 1), TileSizes(16, 32, 8, 1)),
}
_SPARSE: _Table = {  # square, any GPU
    "forward": (TileSizes(64, 64, 4, 3), TileSizes(64, 64, 4, 2), TileSizes(32, 32, 4, 2)),
    "queries": (TileSizes(64, 64, 8, 2), TileSizes(64, 64, 8, 2), TileSizes(32, 32, 4, 1)),
    "keys": (TileSizes(64, 64, 8, 2), TileSizes(64, 64, 8, 2), TileSizes(32, 32, 8, 1)),
}
_INTERPRETED = TileSizes(32, 32, 4, 1)  # small tensors shall have several tiles and a ragged edge


def tile_sizes(
    direction: Direction, head_dim: int, dtype: torch.dtype, capability: int, block: int | None = None
) -> TileSizes:
    """For the forward pass, or for the gradient of queries or of keys and values.

    capability: 90 for a GPU of compute capability 9.0, 0 under the interpreter. block: side of the tiles where
    block-sparse lists of tiles give it.
    """
    size_class = 0 if head_dim <= 64 else 1 if head_dim <= 128 else 2
    if block is not None:
        of_one = _FLOAT32 if dtype is torch.float32 else _SPARSE
        return of_one[direction][size_class]._replace(block_m=block, block_n=block)
    if capability == 0:
        return _INTERPRETED
    if dtype is torch.float32:
        return _FLOAT32[direction][size_class]
    return (_HOPPER if 90 <= capability < 120 else _OTHER)[direction][size_class]


def largest_sparse_block(head_dim: int, dtype: torch.dtype, capability: int) -> int:
    """Side of the largest square tile that all kernels can hold."""
    if capability == 0:
        return _INTERPRETED.block_m
    widest = _SPARSE["forward"][0 if head_dim <= 128 else 2].block_m
    return widest // 2 if dtype is torch.float32 else widest
