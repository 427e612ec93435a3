"""Experts in closed form: what a mixture holds, and the part of it that one token uses.

A mixture of ``n_experts`` networks and ``k`` of them a token holds ``n_experts / k`` times what a token multiplies: its
memory follows the first number, its arithmetic the second (Shazeer et al. 2017, "Outrageously Large Neural Networks",
section 1; Fedus et al. 2022, "Switch Transformers", section 2). ``n_shared_experts`` more are used by every token (Dai
et al. 2024, "DeepSeekMoE", section 3.2), and so is the router, one row of ``d_model`` weights an expert. The bias of
sigmoid routers is state that no gradient moves, not a parameter.
"""

from minillm.costs.shape import ModelShape, MoEShape, feed_forward_matrices


def moe_layers(config: ModelShape) -> tuple[int, ...]:
    """Which blocks have experts instead of one feed-forward network; empty for a dense model."""
    if config.moe is None:
        return ()
    return tuple(range(config.n_layers)) if config.moe.layers is None else config.moe.layers


def expert_weights(config: ModelShape) -> int:
    """Weights in the matrices of one expert: 2 (SwiGLU: 3) of ``d_model * d_ff``, d_ff the expert's own."""
    return feed_forward_matrices(config) * config.d_model * _expert_d_ff(config)


def expert_parameters(config: ModelShape) -> int:
    """One expert whole: its matrices and, if the model has biases, a number for each of their outputs."""
    biases = (feed_forward_matrices(config) - 1) * _expert_d_ff(config) + config.d_model if config.bias else 0
    return expert_weights(config) + biases


def shared_expert_weights(config: ModelShape) -> int:
    """Weights in the matrices of the network that every token uses: one, ``n_shared_experts`` experts wide."""
    return _moe(config).n_shared_experts * expert_weights(config)


def shared_expert_parameters(config: ModelShape) -> int:
    """That network whole; it has one bias of d_model however many experts wide it is."""
    shared = _moe(config).n_shared_experts
    biases = (feed_forward_matrices(config) - 1) * shared * _expert_d_ff(config) + config.d_model if config.bias else 0
    return shared_expert_weights(config) + (biases if shared else 0)


def router_weights(config: ModelShape) -> int:
    """Weights of one router that every token multiplies: ``n_experts * d_model``."""
    return _moe(config).n_experts * config.d_model


def router_noise_weights(config: ModelShape) -> int:
    """Weights of the matrix that sizes the noise of "noisy_top_k", which only training multiplies; 0 for others.

    Shazeer et al. 2017, equation 4.
    """
    return router_weights(config) if _moe(config).router == "noisy_top_k" else 0


def active_feed_forward_weights(config: ModelShape) -> int:
    """Weights that one token multiplies in one MoE layer: router, k experts, the shared ones.

    Where experts choose their tokens k is the average. Tokens that a full expert drops are counted as if they were
    not: what they would have cost is the most the layer computes.
    """
    return router_weights(config) + _moe(config).k * expert_weights(config) + shared_expert_weights(config)


def _moe(config: ModelShape) -> MoEShape:
    if config.moe is None:
        raise ValueError("config must have experts, got one with moe=None")
    return config.moe


def _expert_d_ff(config: ModelShape) -> int:
    d_ff = _moe(config).d_ff
    return config.d_ff if d_ff is None else d_ff
