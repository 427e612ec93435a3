"""Sides of the kernels' tiles, warps and pipeline stages, by head size, dtype and GPU: decided once, not searched for."""

from typing import Literal, NamedTuple

import torch

Direction = Literal["forward", "keys", "queries"]


class TileSizes(NamedTuple):
    """block_m queries by block_n keys; num_warps of a program; num_stages: tiles on their way from memory at one time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tile_sizes(direction, head_dim, dtype, capability, block) -> TileSizes:
    if capability == 0:
        return TileSizes(block or 32, block or 32, 4, 1)
    if direction == "forward":
        return TileSizes(128, 128 if head_dim <= 64 else 64, 4 if head_dim <= 64 else 8, 3)
    return TileSizes(64, 128, 8, 2) if direction == "keys" else TileSizes(128, 64, 8, 2)
