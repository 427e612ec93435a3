"""The custom operator ``minillm::split_kv_decode``: how many pieces, memory and grids. It has no gradient."""

import math

import torch
from torch import Tensor

from minillm.kernels.runtime import launch, upcast

HEAD_DIMS = (16, 32, 64, 128, 256)
MOST_KEYS = 128  # in a tile
MOST_SPLITS = 128
SPLIT_KEYS = 256  # keys that make a piece worth its partial result


def default_splits(n_programs: int, capacity: int, n_multiprocessors: int) -> int:
    """Pieces of the cache such that every multiprocessor has two programs, each with at least 256 keys; at most 128.

    ``ceil(2 n_multiprocessors / n_programs)``, where ``n_programs`` is what there is without splitting: batch times
    key heads. A batch of 64 with 8 key heads fills an H100's 132 alone; one sequence with 8 leaves 124 of them idle.
    """
    wanted = -(-2 * n_multiprocessors // max(1, n_programs))
    return max(1, min(wanted, -(-capacity // SPLIT_KEYS), MOST_SPLITS))


def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; 1 for a CPU, which runs one program after the other."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def blocks(rows: int, head_dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Queries (of all heads of a group) that a program takes, and keys in a tile.

    Two tiles of keys and two of values are on their way at once: 16 KiB each fit every card. Without tensor cores, in
    float32, half of both: the compiler then holds more of them in registers, and these run out.
    """
    if dtype is torch.float32:
        most_rows, tile_bytes = 16, 8192
    else:
        most_rows, tile_bytes = (64 if head_dim <= 128 else 32), 16384
    block_keys = tile_bytes // (head_dim * dtype.itemsize)
    return min(most_rows, max(16, power_of_two(rows))), max(16, min(MOST_KEYS, block_keys))


def power_of_two(n: int) -> int:
    """The smallest power of two that is ``n`` or more."""
    return 1 << (n - 1).bit_length()


@torch.library.custom_op("minillm::split_kv_decode", mutates_args=())
def triton_split_kv_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    n_splits: int,
    scale: float,
    window: int | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    from minillm.kernels.flash_decode import kernel

    batch, n_heads, n_new, head_dim = query.shape
    n_kv_heads, capacity = key.shape[1], key.shape[2]
    rows = n_heads // n_kv_heads * n_new
    block_rows, block_keys = blocks(rows, head_dim, query.dtype)
    n_splits = max(1, min(n_splits, -(-capacity // block_keys)))  # more would have no keys
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # A single piece is the result.
    partial = output if n_splits == 1 else query.new_empty((n_splits, *query.shape), dtype=torch.float32)
    lse = query.new_empty((n_splits, *query.shape[:3]), dtype=torch.float32)
    launch(
        kernel.decode_splits,
        (batch * n_kv_heads, -(-rows // block_rows), n_splits),
        query,
        key,
        value,
        query if lengths is None else lengths,
        query if alibi_slopes is None else alibi_slopes.float().contiguous(),
        partial,
        lse,
        *query.stride(),
        *key.stride(),
        *value.stride(),
        0 if lengths is None else lengths.stride(0),
        batch,
        n_kv_heads,
        n_heads // n_kv_heads,
        n_new,
        capacity,
        window or 0,
        scale * math.log2(math.e),
        HAS_LENGTHS=lengths is not None,
        HAS_SLOPES=alibi_slopes is not None,
        HAS_WINDOW=window is not None,
        HEAD_DIM=head_dim,
        BLOCK_ROWS=block_rows,
        BLOCK_KEYS=block_keys,
        UPCAST=upcast(query.dtype),
        num_warps=4,
        num_stages=2,
    )
    if n_splits > 1:
        launch(
            kernel.merge_splits,
            (batch * n_heads * n_new,),
            partial,
            lse,
            output,
            batch * n_heads * n_new,
            n_splits,
            HEAD_DIM=head_dim,
            BLOCK_SPLITS=power_of_two(n_splits),
            SPLITS_AT_ONCE=min(16, power_of_two(n_splits)),
            num_warps=4,
        )
    return output


@triton_split_kv_decode.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    n_splits: int,
    scale: float,
    window: int | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    return torch.empty(query.shape, dtype=query.dtype, device=query.device)
