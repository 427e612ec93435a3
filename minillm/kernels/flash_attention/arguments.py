"""What the flash attention kernels are told: the call's arguments under the kernels' names, strides, new memory."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.kernels import runtime
from minillm.kernels.flash_attention.tile_sizes import Direction, TileSizes, tile_sizes
from minillm.kernels.runtime import upcast, wide


class Call(NamedTuple):
    """What all of a call's kernels are told."""

    alibi_slopes: Tensor | None
    query_offsets: Tensor | None
    key_offsets: Tensor | None
    tables: Sequence[Tensor]
    scale: float
    left: int | None
    right: int | None
    max_query_length: int
    max_key_length: int

    def n_sequences(self, query: Tensor) -> int:
        return query.size(0) if self.query_offsets is None else self.query_offsets.size(0) - 1

    def tile_sizes(self, direction: Direction, query: Tensor) -> TileSizes:
        block = self.tables[6].size(-1) if self.tables else None
        return tile_sizes(direction, query.size(-1), query.dtype, runtime.compute_capability(query.device), block)

    def arguments(self, query: Tensor, key: Tensor, sizes: TileSizes, lists: Sequence[Tensor]) -> dict[str, Any]:
        bounds, tiles, numbers = lists or (None, None, None)
        return {
            "slopes_ptr": self.alibi_slopes,
            "query_offsets_ptr": self.query_offsets,
            "key_offsets_ptr": self.key_offsets,
            "bounds_ptr": bounds,
            "tiles_ptr": tiles,
            "numbers_ptr": numbers,
            "masks_ptr": self.tables[6] if self.tables else None,
            "group": query.size(-3) // max(1, key.size(-3)),
            "query_length": self.max_query_length,
            "key_length": self.max_key_length,
            "scale": self.scale,
            "left": self.left or 0,
            "right": self.right or 0,
            "HEAD_DIM": query.size(-1),
            "BLOCK_D": block_d(query),
            "BLOCK_M": sizes.block_m,
            "BLOCK_N": sizes.block_n,
            "LEFT": self.left is not None,
            "RIGHT": self.right is not None,
            "ALIBI": self.alibi_slopes is not None,
            "VARLEN": self.query_offsets is not None,
            "SPARSE": len(self.tables) > 0,
            "UPCAST": upcast(query.dtype),
            "WIDE": wide(query.dtype),
            "PRECISION": "ieee",
            "num_warps": sizes.num_warps,
            "num_stages": sizes.num_stages,
        }


def side_by_side(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension side by side in memory, as the kernels take it for granted."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def empty_as(tensor: Tensor) -> Tensor:
    """New memory in the same order of dimensions, if that leaves the last one side by side."""
    empty = torch.empty_like(tensor)
    return empty if empty.stride(-1) == 1 else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def empty_lse(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))


def block_d(query: Tensor) -> int:
    return max(16, 1 << (query.size(-1) - 1).bit_length())


def strides_of(**tensors: Tensor) -> dict[str, int]:
    """Strides by the kernels' names for them; a packed tensor has one batch, at stride 0."""
    strides: dict[str, int] = {}
    for name, tensor in tensors.items():
        batch, head, row = (0, *tensor.stride())[-4:-1]
        strides |= {f"{name}_stride_b": batch, f"{name}_stride_h": head}
        if name != "lse":
            strides[f"{name}_stride_{'n' if 'key' in name or 'value' in name else 'm'}"] = row
    return strides
