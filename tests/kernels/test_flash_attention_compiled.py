"""What the compiler makes of the flash attention kernels for an A100 and an H100: no GPU is needed."""

from collections.abc import Sequence
from typing import get_args

import torch

from minillm.kernels.compile_only import SHARED_MEMORY, Launch, compile_only, recorded_launches
from minillm.kernels.flash_attention import BlockSparse, triton_flash_attention
from minillm.kernels.flash_attention.tile_sizes import SMALLEST_BLOCK, Direction, largest_sparse_block, tile_sizes

FORWARD, QUERIES, KEYS, DELTA = (
    f"flash_{name}" for name in ("forward", "backward_queries", "backward_keys", "backward_delta")
)

# Bytes a thread: values that the loop over masked tiles needs later, put aside while the loop over the others runs.
SPILLED = 100


def launches(
    capability: int, dtype: torch.dtype, head_dim: int, kernels: Sequence[str], *, group=1, packed=False, **settings
) -> list[Launch]:
    """What one call starts on a GPU of this capability, forward and backward."""
    length = 1024
    shape = (8, length) if packed else (2, 8, length)
    query = torch.empty(*shape, head_dim, dtype=dtype, requires_grad=True)
    key, value = (
        torch.empty(*shape[:-2], 8 // group, length, head_dim, dtype=dtype, requires_grad=True) for _ in range(2)
    )
    if packed:
        key, value = (torch.empty(8 // group, length, head_dim, dtype=dtype, requires_grad=True) for _ in range(2))
        offsets = torch.tensor([0, length // 2, length], dtype=torch.int32)
        settings |= {"query_offsets": offsets, "max_query_length": length // 2, "max_key_length": length // 2}
    with recorded_launches(capability) as recorded:
        output, _ = triton_flash_attention(query, key, value, **settings)
        torch.autograd.grad(output, [query, key, value], torch.empty_like(output))
    return [one for name in kernels for one in recorded if one.kernel.endswith(f":{name}")]


def sparse() -> BlockSparse:
    states = torch.randint(0, 3, (8, 8), dtype=torch.int8)
    return BlockSparse(states, torch.where(states == 1, 0, -1), torch.rand(1, 128, 128) < 0.5, 128)


def test_hopper(device):
    """wgmma for every product of 16-bit tensors, loads under way while it runs, nothing that matters spilled."""
    half, slopes = torch.bfloat16, torch.ones(8)
    compiled = compile_only(
        [
            *launches(90, half, 128, [FORWARD, QUERIES, KEYS], causal=True),
            *launches(90, half, 64, [KEYS], causal=True, window=256, alibi_slopes=slopes, group=4),
            *launches(90, half, 80, [FORWARD, DELTA], packed=True),
        ]
    )
    for kernel in compiled:
        assert kernel.shared <= SHARED_MEMORY[90], kernel.kernel
        assert kernel.spilled <= SPILLED, kernel.kernel
        if not kernel.kernel.endswith(DELTA):
            assert kernel.count("wgmma.mma_async") > 0, kernel.kernel
            assert kernel.count("cp.async") > 0, kernel.kernel


def test_ampere_and_consumer_gpus(device):
    """mma.sync, cp.async, and no more shared memory than a consumer's GPU has; float32 keeps its precision."""
    compiled = compile_only(
        [
            *launches(80, torch.float16, 128, [FORWARD, KEYS], causal=True),
            *launches(80, torch.bfloat16, 64, [QUERIES], sparse=sparse(), causal=True),
            *launches(80, torch.float32, 64, [FORWARD], causal=True),
        ]
    )
    for kernel, tensor_cores in zip(compiled, (True, True, True, False), strict=True):
        assert kernel.shared <= SHARED_MEMORY[86], kernel.kernel
        assert kernel.spilled <= SPILLED, kernel.kernel
        assert kernel.count("cp.async") > 0, kernel.kernel
        assert (kernel.count("mma.sync") > 0) == tensor_cores, kernel.kernel


def test_every_gpu_gets_tiles_that_tensor_cores_take():
    for capability in (80, 86, 90, 100, 120):
        for head_dim in (16, 64, 65, 128, 129, 256):
            for dtype in (torch.float32, torch.bfloat16):
                block = largest_sparse_block(head_dim, dtype, capability)
                for direction in get_args(Direction):
                    for sizes in (
                        tile_sizes(direction, head_dim, dtype, capability),
                        tile_sizes(direction, head_dim, dtype, capability, block),
                    ):
                        assert min(sizes.block_m, sizes.block_n) >= SMALLEST_BLOCK
                        assert sizes.block_m * sizes.block_n >= 32 * sizes.num_warps
                assert tile_sizes("keys", head_dim, dtype, capability, block)[:2] == (block, block)
