"""The decoder-only transformer (GPT, Llama): embedding, a stack of pre-norm blocks, a final norm, an output head."""

import math
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.layers.attention import MultiHeadAttention
from minillm.layers.feed_forward import FeedForward, SwiGLU
from minillm.layers.kv_cache import KVCache, LayerKVCache
from minillm.layers.norms import LayerNorm, RMSNorm
from minillm.layers.positions import LearnedPositions, RotaryEmbedding
from minillm.layers.scaled_dot_product import causal_mask
from minillm.models.config import TransformerConfig
from minillm.models.modes import evaluation_mode


def _norm(config: TransformerConfig) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, eps=config.norm_eps)
    return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def _feed_forward(config: TransformerConfig) -> nn.Module:
    if config.activation == "swiglu":
        return SwiGLU(config.d_model, config.d_ff, bias=config.bias)
    approximate: Literal["none", "tanh"] = "tanh" if config.activation == "gelu_tanh" else "none"
    return FeedForward(config.d_model, config.d_ff, approximate=approximate, bias=config.bias)


class TransformerBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``: pre-norm (Xiong et al. 2020; GPT-2)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = _norm(config)
        self.attention = MultiHeadAttention(
            config.d_model,
            config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            bias=config.bias,
            dropout=config.dropout,
        )
        self.feed_forward_norm = _norm(config)
        self.feed_forward = _feed_forward(config)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(
        self,
        x: Tensor,
        *,
        rotation: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        causal: bool = True,
        cache: LayerKVCache | None = None,
    ) -> Tensor:
        attended = self.attention(self.attention_norm(x), rotation=rotation, mask=mask, causal=causal, cache=cache)
        x = x + self.dropout(attended)
        out: Tensor = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return out


class Transformer(nn.Module):
    """A decoder-only language model (Radford et al. 2019 for the GPT-2 switches, Touvron et al. 2023 for Llama's).

    Initial weights are drawn from N(0, initializer_std), the maps that write to the residual stream from that divided
    by
    ``sqrt(2 n_layers)`` (Radford et al. 2019, section 2.3), biases are zero, norms one. Draws come from torch's global
    generator: seed it with ``torch.manual_seed`` first. With tied embeddings there is one matrix,
    ``token_embedding.weight``, and no ``lm_head``; masks and rotary angles are not part of the state.

    Parameter names: ``token_embedding.weight``, ``position_embedding.weight`` (learned positions),
    ``blocks.{i}.attention_norm``, ``blocks.{i}.attention.qkv``, ``blocks.{i}.attention.output``,
    ``blocks.{i}.feed_forward_norm``, ``blocks.{i}.feed_forward.up``, ``.down`` and ``.gate`` (SwiGLU), ``final_norm``,
    ``lm_head.weight`` (untied).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding: LearnedPositions | None = None
        self.rotary: RotaryEmbedding | None = None
        if config.positions == "learned":
            self.position_embedding = LearnedPositions(config.context_length, config.d_model)
        else:
            self.rotary = RotaryEmbedding(config.head_dim, base=config.rope_base, scaling=config.rope_scaling)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.n_layers))
        self.final_norm = _norm(config)
        self.lm_head = None if config.tied_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        std = self.config.initializer_std
        residual_std = std / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.output.weight", "feed_forward.down.weight")):
                nn.init.normal_(parameter, std=residual_std)
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Scores of the next token at every place.

        Args:
            tokens: int64 (batch, seq), each in [0, vocab_size). Together with what the cache holds at most
            context_length.
            cache: keys and values of the tokens before these; extended by these. See :meth:`new_cache`.
            positions: int64 (seq,) or (batch, seq), for padded or packed rows; None counts on from the cache's length.
            mask: boolean, True where a token may look, beside causality; broadcasts to (batch, n_heads, seq, keys)
            where
                keys counts the cached tokens too.
            last_only: score the last place only, (batch, 1, vocab_size): what generation needs.

        Returns: logits (batch, seq, vocab_size).

        Raises TypeError for tokens of another dtype, ValueError for a bad shape, length, or id. (On a CUDA device an id
        out of range trips the device-side assertion instead: reading it here would make every step wait for the
        device.)
        """
        x, rotation, mask, causal = self._embed(tokens, cache, positions, mask)
        for index, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layers[index]
            x = block(x, rotation=rotation, mask=mask, causal=causal, cache=layer_cache)
        if last_only:
            x = x[:, -1:]
        x = self.final_norm(x)
        return F.linear(x, self.token_embedding.weight if self.lm_head is None else self.lm_head.weight)

    def _embed(
        self, tokens: Tensor, cache: KVCache | None, positions: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor | None, bool]:
        """Check the input; give the first block's input, rotary angles, mask, and whether causality is still to do."""
        if not isinstance(tokens, Tensor) or tokens.dtype is not torch.int64:
            got = tokens.dtype if isinstance(tokens, Tensor) else type(tokens).__name__
            raise TypeError(f"tokens must be an int64 tensor, got {got}")
        if tokens.dim() != 2 or tokens.size(1) == 0:
            raise ValueError(f"tokens must be (batch, seq) with seq of at least 1, got shape {tuple(tokens.shape)}")
        seq = tokens.size(1)
        start = 0 if cache is None else cache.length
        if start + seq > self.config.context_length:
            cached = f" after {start} cached" if start else ""
            raise ValueError(f"context_length is {self.config.context_length}, got {seq} tokens{cached}")
        if positions is not None and (positions.dtype is not torch.int64 or positions.shape[-1:] != (seq,)):
            raise ValueError(
                f"positions must be int64, (seq,) or (batch, seq) with seq={seq}, "
                f"got {positions.dtype} {tuple(positions.shape)}"
            )
        try:
            x: Tensor = self.token_embedding(tokens)
        except IndexError:
            low, high = int(tokens.min()), int(tokens.max())
            raise ValueError(
                f"tokens must be in [0, {self.config.vocab_size}) (vocab_size), got values from {low} to {high}"
            ) from None
        rotation = None
        if self.position_embedding is not None:
            x = x + (
                self.position_embedding.span(start, seq) if positions is None else self.position_embedding(positions)
            )
        elif self.rotary is not None:
            if positions is None:
                positions = torch.arange(start, start + seq, device=tokens.device)
            rotation = self.rotary.cos_sin(positions)
        causal = True
        if seq == 1:  # a branch, not `causal = seq > 1`: the compiler may keep that symbolic, and kernels refuse it
            causal = False
        if causal and (mask is not None or start):
            # Put together once here rather than in every layer.
            triangle = causal_mask(seq, start + seq, device=tokens.device)
            mask = triangle if mask is None else triangle & mask
            causal = False
        return self.dropout(x), rotation, mask, causal

    def new_cache(self, batch_size: int, capacity: int | None = None) -> KVCache:
        """An empty cache for this model, in its dtype and on its device; ``capacity`` None is context_length."""
        config, weight = self.config, self.token_embedding.weight
        capacity = config.context_length if capacity is None else capacity
        return KVCache(
            config.n_layers,
            batch_size,
            config.n_kv_heads,
            config.head_dim,
            capacity,
            dtype=weight.dtype,
            device=weight.device,
        )

    @torch.no_grad()
    def attention_weights(self, tokens: Tensor) -> list[Tensor]:
        """Who looks at whom: for each layer (batch, n_heads, seq, seq), rows sum to 1; computed in evaluation mode."""
        weights = []
        with evaluation_mode(self):
            x, rotation, mask, causal = self._embed(tokens, None, None, None)
            for module in self.blocks:
                block = cast(TransformerBlock, module)
                normed = block.attention_norm(x)
                weights.append(
                    block.attention(normed, rotation=rotation, mask=mask, causal=causal, return_weights=True)[1]
                )
                x = block(x, rotation=rotation, mask=mask, causal=causal)
        return weights
