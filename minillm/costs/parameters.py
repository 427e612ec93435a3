"""How many parameters a decoder has, exactly, and where they are."""

from minillm.costs.shape import ModelShape, feed_forward_matrices, qkv_width


def parameters_by_part(config: ModelShape) -> dict[str, int]:
    """Parameters of each part of the whole model; the parts are disjoint and add up to :func:`parameters`.

    Keys: token_embedding, position_embedding (0 for RoPE), attention, feed_forward, norms, lm_head (0 if tied: the
    matrix is counted once, as the token embedding).
    """
    d_model, layers = config.d_model, config.n_layers
    heads_width = config.n_heads * config.head_dim
    attention = d_model * qkv_width(config) + heads_width * d_model
    feed_forward = feed_forward_matrices(config) * d_model * config.d_ff
    if config.bias:
        attention += qkv_width(config) + d_model
        feed_forward += (feed_forward_matrices(config) - 1) * config.d_ff + d_model
    norm = d_model * (2 if config.norm == "layernorm" and config.bias else 1)
    embedding = config.vocab_size * d_model
    return {
        "token_embedding": embedding,
        "position_embedding": config.context_length * d_model if config.positions == "learned" else 0,
        "attention": layers * attention,
        "feed_forward": layers * feed_forward,
        "norms": (2 * layers + 1) * norm,
        "lm_head": 0 if config.tied_embeddings else embedding,
    }


def parameters(config: ModelShape) -> int:
    """Parameters of the whole model, shared ones once: ``sum(p.numel() for p in Transformer(config).parameters())``.

    With d_ff = 4 d_model, full heads and no biases a block has ``12 d_model**2`` (Kaplan et al. 2020, table 1).
    """
    return sum(parameters_by_part(config).values())
