"""The decoder-only transformer (GPT, Llama): embedding, a stack of pre-norm blocks, a final norm, an output head."""

import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.layers.attention_arguments import check_mask_and_bias
from minillm.layers.kv_cache import KVCache
from minillm.layers.moe import MixtureOfExperts, MoERecord
from minillm.layers.positions import (
    AlibiBias,
    LearnedPositions,
    RelativePositionBias,
    RotaryEmbedding,
    SinusoidalPositions,
)
from minillm.layers.routers import NoisyTopKRouter
from minillm.models.block import TransformerBlock, norm
from minillm.models.config import TransformerConfig
from minillm.models.embedding import check_tokens, embed
from minillm.models.modes import evaluation_mode
from minillm.models.sight import sight


class Transformer(nn.Module):
    """A decoder-only language model (Radford et al. 2019 for the GPT-2 switches, Touvron et al. 2023 for Llama's).

    Initial weights are drawn from N(0, initializer_std), the maps that write to the residual stream from that divided
    by ``sqrt(2 n_layers)`` (Radford et al. 2019, section 2.3), biases are zero, norms one. Draws come from torch's
    global generator: seed it with ``torch.manual_seed`` first. With tied embeddings there is one matrix,
    ``token_embedding.weight``, and no ``lm_head``; masks, rotary angles and fixed biases are not part of the state.

    Parameter names: ``token_embedding.weight``, ``position_embedding.weight`` (learned positions),
    ``position_bias.weight`` (T5's), ``blocks.{i}.relative.keys`` and ``.values`` (Shaw's),
    ``blocks.{i}.attention_norm``, ``blocks.{i}.attention.qkv``, ``blocks.{i}.attention.output``,
    ``blocks.{i}.feed_forward_norm``, ``blocks.{i}.feed_forward.up``, ``.down`` and ``.gate`` (SwiGLU), or where there
    are experts ``.router``, ``.experts`` and ``.shared`` (:class:`minillm.layers.MixtureOfExperts`), ``final_norm``,
    ``lm_head.weight`` (untied).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding: LearnedPositions | SinusoidalPositions | None = None
        self.rotary: RotaryEmbedding | None = None
        self.position_bias: AlibiBias | RelativePositionBias | None = None
        if config.positions == "learned":
            self.position_embedding = LearnedPositions(config.context_length, config.d_model)
        elif config.positions == "sinusoidal":
            self.position_embedding = SinusoidalPositions(config.d_model)
        elif config.positions == "alibi":
            self.position_bias = AlibiBias(config.n_heads)
        elif config.positions == "t5":
            self.position_bias = RelativePositionBias(
                config.n_heads,
                n_buckets=config.relative_buckets,
                max_distance=config.relative_distance,
                bidirectional=False,
            )
        elif config.positions == "rope":
            self.rotary = RotaryEmbedding(config.head_dim, base=config.rope_base, scaling=config.rope_scaling)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.blocks = nn.ModuleList(TransformerBlock(config, layer) for layer in range(config.n_layers))
        self.final_norm = norm(config)
        self.lm_head = None if config.tied_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        std = self.config.initializer_std
        residual_std = std / math.sqrt(2 * self.config.n_layers)
        # A noisy router begins with zeros: with equal loads.
        noisy = (mixture.router for mixture in self.mixtures() if isinstance(mixture.router, NoisyTopKRouter))
        own = {parameter for router in noisy for parameter in router.parameters()}
        for name, parameter in self.named_parameters():
            if parameter in own:
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.endswith(("attention.output.weight", ".down.weight", ".experts.down")):
                nn.init.normal_(parameter, std=residual_std)
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=std)

    def forward(
        self,
        tokens: Tensor,
        *,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        last_only: bool = False,
        return_records: bool = False,
    ) -> Tensor | tuple[Tensor, list[MoERecord]]:
        """Scores of the next token at every place.

        Args:
            tokens: int64 (batch, seq), each in [0, vocab_size). Together with what the cache holds at most
                context_length.
            cache: keys and values of the tokens before these; extended by these. See :meth:`new_cache`.
            positions: int64 (seq,) or (batch, seq), for padded or packed rows; None counts on from the cache's length.
                Schemes of distance (alibi, t5, shaw) and the window count columns: the same in a row without gaps.
            mask: boolean, True where a token may look, beside causality; broadcasts to (batch, n_heads, seq, keys)
                where keys counts all tokens before these too, those that a rolling cache has forgotten among them.
            token_mask: bool (batch, seq), False for padding: experts do not take it, so that it takes nobody's room and
                counts in no loss. That other tokens do not look at it is for ``mask`` to say.
            last_only: score the last place only, (batch, 1, vocab_size): what generation needs.
            return_records: give also what each layer of experts did, the first layer first. Their ``losses`` belong in
                the training loss (:class:`minillm.training.Trainer` sees to it).

        Returns: logits (batch, seq, vocab_size), or (logits, records).

        Raises TypeError for tokens of another dtype, ValueError for a bad shape, length, or id. (On a CUDA device an id
        out of range trips the device-side assertion instead: reading it here would make every step wait for the
        device.)
        """
        x, how = self._embed(tokens, cache, positions, mask)
        records: list[MoERecord] = []
        for index, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layers[index]
            x, record = block(x, **how, cache=layer_cache, token_mask=token_mask, return_record=True)
            if record is not None:
                records.append(record)
        if last_only:
            x = x[:, -1:]
        x = self.final_norm(x)
        logits = F.linear(x, self.token_embedding.weight if self.lm_head is None else self.lm_head.weight)
        return (logits, records) if return_records else logits

    def mixtures(self) -> list[MixtureOfExperts]:
        """The layers of experts, the first block's first: one for each record of :meth:`forward`."""
        layers = (cast(TransformerBlock, block).feed_forward for block in self.blocks)
        return [layer for layer in layers if isinstance(layer, MixtureOfExperts)]

    def _embed(
        self, tokens: Tensor, cache: KVCache | None, positions: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Check the input; give the first block's input, and how tokens see each other: arguments for every block."""
        start = 0 if cache is None else cache.length
        check_tokens(self.config, tokens, start, positions)
        seq = tokens.size(1)
        if cache is not None and (
            len(cache.layers) != len(self.blocks) or cache.window not in (None, self.config.window)
        ):
            raise ValueError(
                f"cache must be one for {len(self.blocks)} layers and a window of {self.config.window} (new_cache), "
                f"got one for {len(cache.layers)} layers and a window of {cache.window}"
            )
        check_mask_and_bias(mask, None, (tokens.size(0), self.config.n_heads, seq, start + seq))
        x = embed(self.config, self.token_embedding, self.position_embedding, tokens, start, positions)
        keys = seq if cache is None else cache.n_keys(seq)
        if mask is not None and mask.dim() and mask.size(-1) == start + seq:
            mask = mask[..., -keys:]  # what a rolling cache has forgotten need not be masked
        how = sight(
            self.config,
            self.rotary,
            self.position_bias,
            seq,
            tokens.device,
            start=start,
            keys=keys,
            positions=positions,
            mask=mask,
        )
        return self.dropout(x), how

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
            window=config.window,
            dtype=weight.dtype,
            device=weight.device,
        )

    @torch.no_grad()
    def attention_weights(self, tokens: Tensor) -> list[Tensor]:
        """Who looks at whom: for each layer (batch, n_heads, seq, seq), rows sum to 1; computed in evaluation mode."""
        weights = []
        with evaluation_mode(self):
            x, how = self._embed(tokens, None, None, None)
            for module in self.blocks:
                block = cast(TransformerBlock, module)
                normed = block.attention_norm(x)
                own = {} if block.relative is None else {"attend": block.relative}
                weights.append(block.attention(normed, **(how | own), return_weights=True)[1])
                x = block(x, **how)
        return weights
