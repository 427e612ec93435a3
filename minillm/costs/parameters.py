"""How many parameters a decoder has, exactly, and where they are."""

from minillm.costs.shape import ModelShape, feed_forward_matrices, qkv_width


def parameters_by_part(config: ModelShape) -> dict[str, int]:
    """Parameters of each part of the whole model; the parts are disjoint and add up to :func:`parameters`.

    Keys: token_embedding, position_embedding, attention, feed_forward, norms, lm_head (0 if tied: the matrix is counted
    once, as the token embedding). What positions need: ``context_length * d_model`` learned vectors, T5's one table of
    ``relative_buckets * n_heads``, Shaw's two of ``relative_distance + 1`` vectors of head_dim a layer (the past only),
    nothing for the others.
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
    positions = {
        "learned": config.context_length * d_model,
        "t5": config.relative_buckets * config.n_heads,
        "shaw": layers * 2 * (config.relative_distance + 1) * config.head_dim,
    }
    return {
        "token_embedding": embedding,
        "position_embedding": positions.get(config.positions, 0),
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
