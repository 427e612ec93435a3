"""Tiles of the matrix products: how large, in how many stages, by how many warps. One table, read by every launch."""

from typing import NamedTuple

import torch

from minillm.kernels import runtime

PROGRAMS = 108  # multiprocessors of an A100; an H100 has 132. Fewer tiles than this leave some of them idle


class TileSizes(NamedTuple):
    """A program's tile (block_m, block_n) of the result, in steps of block_k along the inner dimension.

    ``num_stages`` steps are on their way from memory at once: shared memory holds (block_m + block_n) * block_k numbers
    for each. ``row_tiles``: rows of tiles that are done together, see ``tile_of`` in tile_product.py.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    row_tiles: int = 8

    def programs(self, n_rows: int, n_columns: int) -> int:
        return -(-n_rows // self.block_m) * -(-n_columns // self.block_n)

    def blocks(self) -> dict[str, int]:
        """The kernels' constants."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "ROW_TILES": self.row_tiles}

    def launch_options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


# Largest first: the largest tile reads least and is taken if it gives every multiprocessor one.
HOPPER = (  # 227 KiB of shared memory; wgmma wants 64 rows and a warp group of 4 warps for each
    TileSizes(128, 256, 64, num_warps=8, num_stages=4),
    TileSizes(128, 128, 64, num_warps=8, num_stages=4),
    TileSizes(64, 128, 64, num_warps=4, num_stages=4),
    TileSizes(64, 64, 64, num_warps=4, num_stages=4),
)
AMPERE = (  # within 99 KiB, what the consumer cards have, Ada's and Blackwell's too
    TileSizes(128, 128, 64, num_warps=8, num_stages=3),
    TileSizes(64, 128, 64, num_warps=4, num_stages=3),
    TileSizes(64, 64, 64, num_warps=4, num_stages=3),
)
FLOAT32 = (  # no tensor cores: full float32 products, one multiplication and addition at a time
    TileSizes(128, 64, 16, num_warps=8, num_stages=3),
    TileSizes(64, 32, 16, num_warps=4, num_stages=3),
)
INTERPRETED = (TileSizes(32, 32, 32, num_warps=4, num_stages=1, row_tiles=2),)


def candidates(dtype: torch.dtype, capability: int) -> tuple[TileSizes, ...]:
    """The tiles for this type on a GPU of this compute capability (90 for 9.0; 0: interpreted), largest first."""
    if capability == 0:
        return INTERPRETED
    if dtype is torch.float32:
        return FLOAT32
    # Data-centre Hopper and Blackwell; consumer Blackwell is 12.0, with the shared memory of the cards before it.
    return HOPPER if 90 <= capability < 120 else AMPERE


def tile_sizes(n_rows: int, n_columns: int, dtype: torch.dtype, device: torch.device) -> TileSizes:
    """The largest tile of which a result (n_rows, n_columns) gives every multiprocessor one; else the smallest."""
    table = candidates(dtype, runtime.compute_capability(device))
    return next((tile for tile in table if tile.programs(n_rows, n_columns) >= PROGRAMS), table[-1])
