"""The custom operator ``minillm::rope``: memory and grid. Its gradient is itself, by the negative angle."""

from typing import Any

import torch
from torch import Tensor

from minillm.kernels.runtime import launch, wide

_PAIRS = 2048  # pairs that a program turns, about


@torch.library.custom_op("minillm::rope", mutates_args=())
def triton_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    """``x`` (batch, heads, seq, head_dim) turned; the result lies in memory as ``x`` does."""
    from minillm.kernels.rope import kernel

    batch, n_heads, seq, head_dim = x.shape
    half = head_dim // 2
    y = torch.empty_like(x)
    pair_block = 1 << (half - 1).bit_length()
    seq_block = max(1, min(_PAIRS // pair_block, 1 << (seq - 1).bit_length()))
    launch(
        kernel.rope_rotate,
        (batch * n_heads * -(-seq // seq_block),),
        x,
        cos.contiguous(),
        sin.contiguous(),
        y,
        *x.stride(),
        *y.stride(),
        0 if cos.dim() == 2 else seq * half,
        n_heads,
        seq,
        half,
        INTERLEAVED=interleaved,
        INVERSE=inverse,
        SEQ=seq_block,
        HALF=pair_block,
        WIDE=wide(x.dtype),
        num_warps=4,
    )
    return y


@triton_rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    return torch.empty_like(x)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, bool, bool], output: Tensor) -> None:
    _, cos, sin, ctx.interleaved, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
    dx: Tensor = triton_rope(dy, *ctx.saved_tensors, ctx.interleaved, not ctx.inverse)
    return dx, None, None, None, None


triton_rope.register_autograd(_backward, setup_context=_setup_context)
