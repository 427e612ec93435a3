"""How many parameters a decoder has, exactly, and where they are."""

from minillm.costs.moe import (
    expert_parameters,
    moe_layers,
    router_noise_weights,
    router_weights,
    shared_expert_parameters,
)
from minillm.costs.shape import ModelShape, feed_forward_matrices, qkv_width


def parameters_by_part(config: ModelShape) -> dict[str, int]:
    """Parameters of each part of the whole model; the parts are disjoint and add up to :func:`parameters`.

    Keys: token_embedding, position_embedding, attention, feed_forward, norms, lm_head (0 if tied: the matrix is counted
    once, as the token embedding). What positions need: ``context_length * d_model`` learned vectors, T5's one table of
    ``relative_buckets * n_heads``, Shaw's two of ``relative_distance + 1`` vectors of head_dim a layer (the past only),
    nothing for the others.

    With experts feed_forward is that of the dense layers, and three more keys are those of the others: experts (all of
    them), shared_experts and router (for "noisy_top_k" also the matrix of the noise).
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
    sparse = len(moe_layers(config))
    parts = {
        "token_embedding": embedding,
        "position_embedding": positions.get(config.positions, 0),
        "attention": layers * attention,
        "feed_forward": (layers - sparse) * feed_forward,
        "norms": (2 * layers + 1) * norm,
        "lm_head": 0 if config.tied_embeddings else embedding,
    }
    if config.moe is not None:
        parts["experts"] = sparse * config.moe.n_experts * expert_parameters(config)
        parts["shared_experts"] = sparse * shared_expert_parameters(config)
        parts["router"] = sparse * (router_weights(config) + router_noise_weights(config))
    return parts


def parameters(config: ModelShape) -> int:
    """Parameters of the whole model, shared ones once: ``sum(p.numel() for p in Transformer(config).parameters())``.

    With d_ff = 4 d_model, full heads and no biases a block has ``12 d_model**2`` (Kaplan et al. 2020, table 1).
    """
    return sum(parameters_by_part(config).values())


def active_parameters(config: ModelShape) -> int:
    """Parameters that one token uses: all of them, less the experts it is not sent to.

    ``parameters - moe_layers (n_experts - k) expert``. All else counts, used in a product or not: attention, norms,
    routers, shared experts, the output head, and the whole token embedding though a token reads one row of it. So do
    the figures of Mixtral (Jiang et al. 2024, section 2: 13B of 47B) and GLaM (Du et al. 2022, table 4: 96.6B of 1.2T);
    others leave the embedding out (OpenAI 2025, gpt-oss). For a dense model it is :func:`parameters`; where experts
    choose their tokens it is the average.
    """
    if config.moe is None:
        return parameters(config)
    idle = config.moe.n_experts - config.moe.k
    return parameters(config) - len(moe_layers(config)) * idle * expert_parameters(config)
