"""The way into a decoder: token ids, checked at the door, to vectors with their positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from minillm.layers.positions import LearnedPositions, SinusoidalPositions
from minillm.models.config import TransformerConfig


def check_tokens(config: TransformerConfig, tokens: Tensor, start: int, positions: Tensor | None) -> None:
    """Refuse what a decoder cannot read.

    Args:
        tokens: should be int64 (batch, seq).
        start: how many tokens are cached before these.
        positions: None, or should be int64 (seq,) or (batch, seq).

    Raises:
        TypeError, ValueError: of another dtype or shape, or too long.
    """
    if not isinstance(tokens, Tensor) or tokens.dtype is not torch.int64:
        got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
        raise TypeError(f"tokens must be an int64 tensor, got {got}")
    if tokens.dim() != 2 or tokens.size(1) == 0:
        raise ValueError(f"tokens must be (batch, seq) with seq of at least 1, got shape {tuple(tokens.shape)}")
    seq = tokens.size(1)
    if start + seq > config.context_length:
        cached = f" after {start} cached" if start else ""
        raise ValueError(f"context_length is {config.context_length}, got {seq} tokens{cached}")
    if positions is not None and (
        positions.dtype is not torch.int64 or positions.shape not in ((seq,), tuple(tokens.shape))
    ):
        raise ValueError(
            f"positions must be int64, (seq,) or (batch, seq) of tokens {tuple(tokens.shape)}, "
            f"got {positions.dtype} {tuple(positions.shape)}"
        )


def embed(
    config: TransformerConfig,
    token_embedding: nn.Embedding,
    position_embedding: LearnedPositions | SinusoidalPositions | None,
    tokens: Tensor,
    start: int = 0,
    positions: Tensor | None = None,
) -> Tensor:
    """Vectors (batch, seq, d_model) of tokens; arguments as those of `check_tokens`.

    Raises:
        ValueError: an id out of range.
    """
    try:
        x: Tensor = token_embedding(tokens)
    except IndexError:
        low, high = int(tokens.min()), int(tokens.max())
        raise ValueError(
            f"tokens must be in [0, {config.vocab_size}) (vocab_size), got values from {low} to {high}"
        ) from None
    if isinstance(position_embedding, SinusoidalPositions):
        x = x * math.sqrt(config.d_model)
    if position_embedding is None:
        return x
    seq = tokens.size(1)
    return x + (position_embedding.span(start, seq) if positions is None else position_embedding(positions))
