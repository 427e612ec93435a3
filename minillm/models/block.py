"""A transformer block: attention and feed-forward, each behind a norm, each added to what came in."""

from torch import Tensor, nn

from minillm.layers.attention import MultiHeadAttention
from minillm.layers.feed_forward import feed_forward
from minillm.layers.heads import Attend
from minillm.layers.kv_cache import LayerKVCache
from minillm.layers.moe import MixtureOfExperts, MoERecord
from minillm.layers.norms import LayerNorm, RMSNorm
from minillm.layers.positions import ShawPositions
from minillm.layers.scaled_dot_product import scaled_dot_product_attention
from minillm.models.config import TransformerConfig


def norm(config: TransformerConfig) -> nn.Module:
    """The norm that the config asks for."""
    if config.norm == "rmsnorm":
        return RMSNorm(config.d_model, eps=config.norm_eps)
    return LayerNorm(config.d_model, eps=config.norm_eps, bias=config.bias)


def _feed_forward(config: TransformerConfig, layer: int) -> nn.Module:
    if config.moe is not None and config.has_experts(layer):
        return config.moe.layer(config.d_model, config.d_ff, activation=config.activation, bias=config.bias)
    return feed_forward(config.d_model, config.d_ff, activation=config.activation, bias=config.bias)


class TransformerBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + feed_forward(norm(x))``: pre-norm (Xiong et al. 2020; GPT-2).

    ``layer`` counts from 0; whether the feed-forward layer is a mixture of experts depends on it. A token that its
    experts have no room for passes that half of the block unchanged.
    """

    def __init__(self, config: TransformerConfig, layer: int = 0) -> None:
        super().__init__()
        self.attention_norm = norm(config)
        self.attention = MultiHeadAttention(
            config.d_model,
            config.n_heads,
            n_kv_heads=config.n_kv_heads,
            head_dim=config.head_dim,
            bias=config.bias,
            dropout=config.dropout,
        )
        self.relative: ShawPositions | None = None
        if config.positions == "shaw":
            self.relative = ShawPositions(config.head_dim, config.relative_distance, bidirectional=False)
        self.feed_forward_norm = norm(config)
        self.feed_forward = _feed_forward(config, layer)
        self.dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(
        self,
        x: Tensor,
        *,
        rotation: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = True,
        attend: Attend = scaled_dot_product_attention,
        cache: LayerKVCache | None = None,
        token_mask: Tensor | None = None,
        return_record: bool = False,
    ) -> Tensor | tuple[Tensor, MoERecord | None]:
        """The block's output; with ``return_record`` also what its experts did (None if it has none).

        token_mask: bool (batch, seq), False for padding, which no expert is to take.
        """
        attended = self.attention(
            self.attention_norm(x),
            rotation=rotation,
            mask=mask,
            bias=bias,
            causal=causal,
            attend=attend if self.relative is None else self.relative,
            cache=cache,
        )
        x = x + self.dropout(attended)
        record = None
        if isinstance(self.feed_forward, MixtureOfExperts):
            out, record = self.feed_forward(self.feed_forward_norm(x), token_mask=token_mask)
        else:
            out = self.feed_forward(self.feed_forward_norm(x))
        out = x + self.dropout(out)
        return (out, record) if return_record else out
