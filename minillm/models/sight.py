"""How the tokens of a decoder see each other: rotation, mask and bias, put together once for all blocks."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from minillm.layers.positions import AlibiBias, RelativePositionBias, RotaryEmbedding
from minillm.layers.scaled_dot_product import causal_mask
from minillm.layers.sparse_attention import block_sparse_attention
from minillm.layers.sparse_patterns import causal as causal_pattern
from minillm.layers.sparse_patterns import sliding_window
from minillm.models.config import TransformerConfig


def sight(
    config: TransformerConfig,
    rotary: RotaryEmbedding | None,
    position_bias: AlibiBias | RelativePositionBias | None,
    seq: int,
    device: torch.device,
    *,
    start: int = 0,
    keys: int | None = None,
    positions: Tensor | None = None,
    mask: Tensor | None = None,
) -> dict[str, Any]:
    """What `seq` queries at the end of `keys` keys may see, as arguments for every block.

    Args:
        config: of the decoder.
        rotary, position_bias: its own, where it has them.
        seq: number of tokens.
        device: where they are.
        start: how many tokens came before them.
        keys: how many keys there are with these tokens' own; None is `seq`.
        positions: int64 (seq,) or (batch, seq); None counts on from `start`.
        mask: boolean, True where a token may look, beside causality; broadcasts to (batch, n_heads, seq, keys).
    """
    keys = seq if keys is None else keys
    rotation = None
    if rotary is not None:
        if positions is None:
            positions = torch.arange(start, start + seq, device=device)
        rotation = rotary.cos_sin(positions)
    return {"rotation": rotation, **_visible(config, position_bias, seq, keys, mask, device)}


def _visible(
    config: TransformerConfig,
    position_bias: AlibiBias | RelativePositionBias | None,
    seq: int,
    keys: int,
    mask: Tensor | None,
    device: torch.device,
) -> dict[str, Any]:
    window = config.window
    if window is not None and keys <= window:
        window = None
    causal = True
    if seq == 1:  # a branch, not `causal = seq > 1`: the compiler may keep that symbolic, and kernels refuse it
        causal = False
    bias = None if position_bias is None else position_bias(seq, keys)
    if _sparse_pays(config, seq, window, bias, device):
        pattern = causal_pattern() if window is None else sliding_window(window)
        attend = partial(block_sparse_attention, pattern=pattern)
        return {"mask": mask, "bias": bias, "causal": False, "attend": attend}
    if window is not None or (causal and (mask is not None or bias is not None or seq < keys)):
        triangle = causal_mask(seq, keys, window=window, device=device)
        if bias is not None:
            bias = bias.masked_fill(~triangle, -math.inf)
        else:
            mask = triangle if mask is None else triangle & mask
        causal = False
    return {"mask": mask, "bias": bias, "causal": causal}


def _sparse_pays(
    config: TransformerConfig, seq: int, window: int | None, bias: Tensor | None, device: torch.device
) -> bool:
    """Whether computing only the tiles that are not hidden is faster than masking all of them.

    Torch's causal kernel skips what is hidden, but takes neither a window nor a bias beside it. On a CPU
    (``benchmarks/attention.py``, ``benchmarks/extrapolation.py``) the walk over the tiles is faster from 512 tokens on;
    on other devices the fused kernels are too fast for a walk in Python, and a compiler cannot follow it. Shaw's
    positions bring an attention of their own.
    """
    if seq < 512 or device.type != "cpu" or config.positions == "shaw" or is_compiling():
        return False
    return bias is not None if window is None else seq >= 4 * window
