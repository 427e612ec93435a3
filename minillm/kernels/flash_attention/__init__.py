"""FlashAttention-2 as Triton kernels, forward and backward: the twin of :func:`minillm.layers.flash_attention`.

That function validates, dispatches and holds the loops to be read; here is what it dispatches to.
"""

import math

import torch
from torch import Tensor

from minillm.kernels import runtime
from minillm.kernels.flash_attention.block_tables import BlockSparse, block_tables
from minillm.kernels.flash_attention.launch import flash_attention_forward
from minillm.kernels.flash_attention.tile_sizes import SMALLEST_BLOCK, largest_sparse_block
from minillm.kernels.runtime import interpreted

__all__ = ["BlockSparse", "triton_flash_attention", "triton_refuses"]

_LARGEST_HEAD_DIM = 256
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def triton_refuses(query: Tensor, key: Tensor, value: Tensor, *, block_size: int | None = None) -> str | None:
    """Why the kernels cannot take these tensors, or block-sparse tiles of this size; None if they can."""
    head_dim = query.size(-1)
    if not query.dtype == key.dtype == value.dtype:
        return f"query, key and value must be of one dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
    if query.dtype not in _DTYPES and not (query.dtype is torch.float64 and interpreted()):
        return f"dtype must be float32, float16 or bfloat16 (float64 in the interpreter only), got {query.dtype}"
    if not 1 <= head_dim <= _LARGEST_HEAD_DIM:
        return f"head_dim must be in 1 ... {_LARGEST_HEAD_DIM}, got {head_dim}"
    if value.size(-1) != head_dim:
        return f"value_dim must equal head_dim = {head_dim}, got {value.size(-1)}"
    if block_size is not None and block_size % SMALLEST_BLOCK:
        return f"block_size must be a multiple of {SMALLEST_BLOCK}, the least that tensor cores take, got {block_size}"
    return None


def triton_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    sparse: BlockSparse | None = None,
    query_offsets: Tensor | None = None,
    key_offsets: Tensor | None = None,
    max_query_length: int | None = None,
    max_key_length: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention whose scores stay on the chip (Dao 2023, "FlashAttention-2", algorithms 1 and 2).

    Args:
        query: (batch, n_heads, query_length, head_dim), float32, float16 or bfloat16, any strides; head_dim up to 256.
        key, value: (batch, n_kv_heads, key_length, head_dim); n_kv_heads divides n_heads.
        causal, window: the last query stands at the last key. With ``causal`` a query sees its own key and
            those before it, or the last ``window`` of them; without it those with ``|place - key| < window``.
        alibi_slopes: (n_heads,): ``slope * |place - key|`` is taken from the scores. Constants, without a gradient.
        scale: of the scores; None is ``1 / sqrt(head_dim)``.
        sparse: the live tiles of a pattern; ``causal`` and ``window`` hide more on top.
        query_offsets, key_offsets: int32 or int64 (n_sequences + 1,): sequence i is the rows from offsets[i] up to
            offsets[i + 1] of packed tensors (n_heads, total, head_dim). ``key_offsets`` None: those of the queries.
        max_query_length, max_key_length: of the longest sequence; None looks, which waits for the GPU.

    A last dimension whose neighbours do not lie side by side in memory is copied first. float32 is multiplied in full
    precision, without TF32. Gradients do not depend on the order in which programs run.

    Returns: the output as ``query``, and in float32 the natural logarithm of the sum of exp of the scaled scores,
    (batch, n_heads, query_length) or (n_heads, total). A query that sees nothing gets zeros and -inf. Differentiable in
    both, once.

    Raises ValueError for what the kernels cannot take (:func:`triton_refuses`) and for shapes that do not fit.
    """
    problem = triton_refuses(query, key, value, block_size=None if sparse is None else sparse.block_size)
    if problem is None and query_offsets is not None and sparse is not None:
        problem = "sparse must be None for packed sequences: its tiles are those of one length"
    problem = problem or _misfit(query, key, value, alibi_slopes, query_offsets is not None)
    if problem is not None:
        raise ValueError(problem)
    if query_offsets is not None:
        key_offsets = query_offsets if key_offsets is None else key_offsets
        max_query_length = _longest(query_offsets) if max_query_length is None else max_query_length
        max_key_length = _longest(key_offsets) if max_key_length is None else max_key_length
    else:
        max_query_length, max_key_length = query.size(-2), key.size(-2)

    scale = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    if scale < 0:  # the kernels take the largest score for the one of the largest product
        query, scale = -query, -scale
    right = 0 if causal else None
    left = None
    if window is not None:
        left = min(window - 1, max_query_length + max_key_length)  # a larger one says the same and may overflow
        right = 0 if causal else left
    tables: list[Tensor] = []
    if sparse is not None:
        block = sparse.kernel_block(
            largest_sparse_block(query.size(-1), query.dtype, runtime.compute_capability(query.device))
        )
        tables = block_tables(sparse, block, max_query_length, max_key_length, left, right)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.detach().to(torch.promote_types(query.dtype, torch.float32)).contiguous()
    output, lse = flash_attention_forward(
        query,
        key,
        value,
        alibi_slopes,
        query_offsets,
        key_offsets,
        tables,
        scale,
        left,
        right,
        max_query_length,
        max_key_length,
    )
    return output, lse


def _misfit(query: Tensor, key: Tensor, value: Tensor, alibi_slopes: Tensor | None, packed: bool) -> str | None:
    """What is wrong with the shapes; None if they fit."""
    n_dimensions = 3 if packed else 4
    if not query.dim() == key.dim() == value.dim() == n_dimensions:
        return f"query, key and value must have {n_dimensions} dimensions, got {_shapes(query, key, value)}"
    if key.shape != value.shape or query.size(-1) != key.size(-1) or query.shape[:-3] != key.shape[:-3]:
        shapes = _shapes(query, key, value)
        return f"key must be shaped as value, and as query but for its heads and its length, got {shapes}"
    n_heads, n_kv_heads = query.size(-3), key.size(-3)
    if n_kv_heads == 0 or n_heads % n_kv_heads:
        return f"the heads of key must divide those of query, got {n_kv_heads} and {n_heads}"
    if alibi_slopes is not None and alibi_slopes.shape != (n_heads,):
        return f"alibi_slopes must have shape ({n_heads},), got {tuple(alibi_slopes.shape)}"
    return None


def _shapes(query: Tensor, key: Tensor, value: Tensor) -> str:
    return f"query {tuple(query.shape)} key {tuple(key.shape)} value {tuple(value.shape)}"


def _longest(offsets: Tensor) -> int:
    return int(offsets.diff().max()) if offsets.numel() > 1 else 0
