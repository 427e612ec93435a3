"""A part of a decoder: some of its layers in a row, as a model of its own that shares their parameters."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.models.block import TransformerBlock
from minillm.models.embedding import check_tokens, embed
from minillm.models.sight import sight
from minillm.models.transformer import Transformer

Carried = Tensor | tuple[Tensor, Tensor]


class TransformerPiece(nn.Module):
    """Layers `start` to `stop - 1` of a :class:`Transformer`, whose layers are: embedding, blocks, norm with head.

    Pieces that follow on one another compute what the whole model computes. Parameters are the model's own objects and
    have the names that they have there; what several pieces need (the matrix of tied embeddings, T5's bias table) is in
    each of them.

    A model with experts hands on a pair: beside the vectors the sum of its routers' losses so far, float32, which
    belongs in the training loss.

    Args:
        model: a decoder.
        start, stop: layers, 0 <= start < stop <= n_layers + 2.

    Raises:
        ValueError: there are no such layers.
    """

    def __init__(self, model: Transformer, start: int, stop: int) -> None:
        super().__init__()
        n_layers = len(model.blocks)
        if not 0 <= start < stop <= n_layers + 2:
            raise ValueError(
                f"a piece holds layers start to stop - 1 of the {n_layers + 2} (embedding, {n_layers} blocks, head): "
                f"0 <= start < stop <= {n_layers + 2}, got {start} and {stop}"
            )
        self.config = model.config
        self.is_first, self.is_last = start == 0, stop == n_layers + 2
        if self.is_first or (self.is_last and model.lm_head is None):
            self.token_embedding = model.token_embedding
        if self.is_first:
            self.position_embedding, self.dropout = model.position_embedding, model.dropout
        here = range(max(start - 1, 0), min(stop - 1, n_layers))
        if here:
            self.rotary, self.position_bias = model.rotary, model.position_bias
        self.blocks = nn.ModuleDict({str(index): model.blocks[index] for index in here})
        if self.is_last:
            self.final_norm, self.lm_head = model.final_norm, model.lm_head
        self.training = self.blocks.training = model.training

    def forward(self, x: Tensor, losses: Tensor | None = None) -> Carried:
        """What the layers make of what came in.

        Args:
            x: of the first piece tokens, int64 (batch, seq); else (batch, seq, d_model).
            losses: of a model with experts, the routers' losses of the pieces before, a scalar.

        Returns: (batch, seq, d_model), or of the last piece logits (batch, seq, vocab_size); with experts also the sum
        of the losses.
        """
        if self.is_first:
            check_tokens(self.config, x, 0, None)
            x = self.dropout(embed(self.config, self.token_embedding, self.position_embedding, x))
        added = torch.zeros((), device=x.device) if losses is None else losses
        if self.blocks:
            how = sight(self.config, self.rotary, self.position_bias, x.size(1), x.device)
            for module in self.blocks.values():
                x, record = cast(TransformerBlock, module)(x, **how, return_record=True)
                if record is not None:
                    added = added + sum(record.losses.values())
        if self.is_last:
            x = self.final_norm(x)
            x = F.linear(x, self.token_embedding.weight if self.lm_head is None else self.lm_head.weight)
        return x if self.config.moe is None else (x, added)
