"""Arithmetic of a decoder in closed form: floating-point operations of its matrix products.

What is counted: every matrix product, at ``2 m n k`` operations for (m, k) by (k, n), a multiplication and an addition
each. What is not: embedding look-ups, norms, activations, softmax, rotary turns, residual sums, the optimizer; together
a few per cent in a model of some width, and nothing that a machine's matrix-product peak could be compared with.

Attention's two products, ``query key^T`` and ``weights value``, are counted over all seq x seq pairs by default: it is
what an implementation that masks the scores computes, what ``torch.utils.flop_counter`` counts and what most papers
report (Narayanan et al. 2021, section 5.1; Chowdhery et al. 2022, appendix B). ``causal=True`` counts the pairs that a
causal mask lets through, ``seq (seq + 1) / 2``, fewer with a sliding window: the least there is to compute, and nearly
what flash attention and block-sparse attention do.

With experts a token pays for the router, the k experts it is sent to and the shared ones, as dispatch by sorting does;
the one-hot products of the papers' einsum dispatch come on top of that and are not counted.
"""

from minillm.costs.moe import active_feed_forward_weights, moe_layers, router_noise_weights
from minillm.costs.shape import ModelShape, feed_forward_matrices, qkv_width


def dense_weights(config: ModelShape) -> int:
    """Weights that a token multiplies: the matrices of all blocks and the output head, tied or not.

    Of a layer with experts those of the router, of k experts and of the shared ones.
    """
    heads_width = config.n_heads * config.head_dim
    attention = config.d_model * (qkv_width(config) + heads_width)
    feed_forward = feed_forward_matrices(config) * config.d_model * config.d_ff
    weights = config.n_layers * (attention + feed_forward) + config.vocab_size * config.d_model
    if config.moe is not None:
        weights += len(moe_layers(config)) * (active_feed_forward_weights(config) - feed_forward)
    return weights


def attention_flops_per_pair(config: ModelShape) -> int:
    """Operations for one query looking at one key, all layers: ``4 n_heads head_dim`` each (score, weighted sum)."""
    return 4 * config.n_layers * config.n_heads * config.head_dim


def forward_flops(config: ModelShape, batch_size: int, seq: int, *, causal: bool = False) -> int:
    """Operations of one forward pass over (batch_size, seq) tokens, logits at every place; exact."""
    _positive(batch_size=batch_size, seq=seq)
    pairs = causal_pairs(seq, config.window) if causal else seq * seq
    per_token = 2 * dense_weights(config) + _shaw_flops(config, seq)
    return batch_size * (seq * per_token + pairs * attention_flops_per_pair(config))


def forward_flops_per_token(config: ModelShape, seq: int, *, causal: bool = False) -> float:
    """:func:`forward_flops` of a sequence of ``seq`` tokens, divided by its tokens.

    ``2 N + 4 n_layers n_heads head_dim seq`` with ``N`` the :func:`dense_weights` (Kaplan et al. 2020, section 2.1).
    """
    return forward_flops(config, 1, seq, causal=causal) / seq


def decode_flops_per_token(config: ModelShape, n_cached: int) -> int:
    """Operations of one generation step for one row: a token that looks at ``n_cached`` others and itself."""
    if n_cached < 0:
        raise ValueError(f"n_cached must be at least 0, got {n_cached}")
    keys = n_cached + 1 if config.window is None else min(n_cached + 1, config.window)
    return 2 * dense_weights(config) + _shaw_flops(config, keys) + keys * attention_flops_per_pair(config)


def training_flops(config: ModelShape, n_tokens: int, *, seq: int | None = None, causal: bool = False) -> float:
    """Operations of forward and backward over ``n_tokens`` tokens in sequences of ``seq`` (None: context_length).

    Three times the forward pass: the backward pass has two products for each of the forward's, one for the gradient of
    each factor. About ``6 N`` a token (Kaplan et al. 2020, section 2.1). Nothing recomputed is counted, neither by
    checkpointing nor within flash attention's backward: these are the model's operations, the numerator of model FLOPs
    utilisation, not the hardware's. The noise of "noisy_top_k" routers is counted here only: evaluation has none.
    """
    _positive(n_tokens=n_tokens)
    seq = config.context_length if seq is None else seq
    noise = 0 if config.moe is None else 2 * len(moe_layers(config)) * router_noise_weights(config)
    return 3 * n_tokens * (forward_flops_per_token(config, seq, causal=causal) + noise)


def _shaw_flops(config: ModelShape, keys: int) -> int:
    """A query's products with the two tables of Shaw's relative positions, of the rows for ``keys`` distances."""
    if config.positions != "shaw":
        return 0
    return attention_flops_per_pair(config) * min(config.relative_distance + 1, keys)


def causal_pairs(seq: int, window: int | None = None) -> int:
    """Pairs of a query and a key that it may see: ``1 + 2 + ...``, each at most the window."""
    growing = seq if window is None else min(seq, window)
    return growing * (growing + 1) // 2 + (seq - growing) * growing


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
