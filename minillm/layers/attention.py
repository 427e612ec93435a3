"""Multi-head attention: scaled dot products in several subspaces at once, with shared key heads if wanted."""

from torch import Tensor, nn

from minillm.layers.heads import Attend, check_sequence, head_sizes, turn
from minillm.layers.kv_cache import LayerKVCache
from minillm.layers.scaled_dot_product import scaled_dot_product_attention


class MultiHeadAttention(nn.Module):
    """Attention in ``n_heads`` subspaces at once (Vaswani et al. 2017, section 3.2.2), key heads may be shared.

    One matrix ``qkv`` makes queries, keys and values in one product: at small widths three products would cost more
    than they compute. Its output rows are, in this order, the ``n_heads`` query heads, the ``n_kv_heads`` key heads and
    the ``n_kv_heads`` value heads, each of head_dim rows. Tensor parallelism can therefore cut each of the three parts
    (``qkv_sizes``) by heads.

    Args:
        d_model: width of the residual stream.
        n_heads, n_kv_heads: query heads, and key and value heads (None: as many; must divide n_heads).
        head_dim: None is d_model / n_heads.
        bias: whether the two linear maps have one.
        dropout: probability of zeroing an attention weight in training.

    Attributes: ``qkv_sizes``, the rows of ``qkv`` that are queries, keys and values.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.n_kv_heads, self.head_dim = head_sizes(d_model, n_heads, n_kv_heads, head_dim, dropout)
        self.d_model, self.n_heads, self.dropout = d_model, n_heads, dropout
        kv_size = self.n_kv_heads * self.head_dim
        self.qkv_sizes = (n_heads * self.head_dim, kv_size, kv_size)
        self.qkv = nn.Linear(d_model, sum(self.qkv_sizes), bias=bias)
        self.output = nn.Linear(n_heads * self.head_dim, d_model, bias=bias)

    def forward(
        self,
        x: Tensor,
        *,
        rotation: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        causal: bool = False,
        cache: LayerKVCache | None = None,
        attend: Attend = scaled_dot_product_attention,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from ``x`` (batch, seq, d_model) to itself, and to what ``cache`` holds of the tokens before it.

        Args:
            rotation: cosines and sines of rotary positions (``RotaryEmbedding.cos_sin``), (seq, head_dim / 2) or
                (batch, seq, head_dim / 2); None turns nothing. They are passed in so that a model computes them once.
            mask, bias, causal: as in :func:`scaled_dot_product_attention`.
            cache: extended by the keys and values of ``x``.
            attend: what computes attention once the heads are made: :func:`scaled_dot_product_attention` or anything
                that is called like it, such as a :class:`minillm.layers.ShawPositions`.
            return_weights: give the weights too.

        Returns: (batch, seq, d_model), and (batch, n_heads, seq, keys) if asked for.
        """
        check_sequence("x", x, self.d_model, "d_model")
        batch, seq, _ = x.shape
        n_heads, n_kv_heads, head_dim = self.n_heads, self.n_kv_heads, self.head_dim
        # Cut before the heads are moved in front of seq: the gradient of qkv then comes together in one copy.
        query, key, value = self.qkv(x).split(self.qkv_sizes, dim=-1)
        query = query.view(batch, seq, n_heads, head_dim).transpose(1, 2)
        key = key.view(batch, seq, n_kv_heads, head_dim).transpose(1, 2)
        value = value.view(batch, seq, n_kv_heads, head_dim).transpose(1, 2)
        query, key = turn(query, rotation, "rotation"), turn(key, rotation, "rotation")
        if cache is not None:
            key, value = cache.append(key, value)
            query = query.to(key.dtype)  # under autocast the cache may hold a wider dtype
        dropout = self.dropout if self.training else 0.0
        attended = attend(
            query, key, value, mask=mask, bias=bias, causal=causal, dropout=dropout, return_weights=return_weights
        )
        heads, weights = attended if isinstance(attended, tuple) else (attended, None)
        out: Tensor = self.output(heads.transpose(1, 2).reshape(batch, seq, n_heads * head_dim))
        return out if weights is None else (out, weights)

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}, head_dim={self.head_dim}, dropout={self.dropout}"
