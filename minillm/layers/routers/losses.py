"""The losses that keep a router in order: evenly loaded experts, small logits."""

import torch
from torch import Tensor

from minillm.layers.routers.routing import assignments_per_expert


def load_balancing_loss(probabilities: Tensor, experts: Tensor) -> Tensor:
    """``n_experts * sum_i f_i P_i``: 1 when every expert gets the same share, n_experts when one gets everything.

    f_i is the fraction of assignments that go to expert i (a count: no gradient), P_i the mean probability of it (Fedus
    et al. 2022, equations 4-6, for one expert a token; Lepikhin et al. 2021, algorithm 1, whose l_aux is this over
    n_experts squared). Both are means, so the value does not depend on the number of tokens or of choices. Where f and
    P are alike the uniform share is the minimum, ``n_experts * sum_i f_i^2 >= 1``; where they differ the value may be
    less than 1, and what counts is the gradient: it lowers the probability of the experts that get more than others.

    Args:
        probabilities: (n_tokens, n_experts), rows that sum to 1.
        experts: int64, any shape: the expert of each assignment.

    Returns: a scalar; 0 if there are no tokens. Raises ValueError for another shape or dtype.
    """
    _check("probabilities", probabilities)
    if experts.dtype != torch.int64:
        raise ValueError(f"experts must be int64, got {experts.dtype}")
    n_tokens, n_experts = probabilities.shape
    if n_tokens == 0:
        return probabilities.sum()
    # Divided before it becomes the probabilities' dtype: in float16 a count ends at 65504.
    exact = torch.promote_types(probabilities.dtype, torch.float32)
    share = assignments_per_expert(experts, n_experts).to(exact) / max(experts.numel(), 1)
    return n_experts * (share.to(probabilities.dtype) * probabilities.mean(dim=0)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """``mean over tokens of (log sum_i exp logits_i)^2``: keeps logits small, and float16 from overflowing.

    Zoph et al. 2022, "ST-MoE", equation 5; they multiply it by 0.001. logits: (n_tokens, n_experts). Returns a
    scalar; 0 if there are no tokens. Raises ValueError for another shape.
    """
    _check("logits", logits)
    if logits.size(0) == 0:
        return logits.sum()
    return logits.logsumexp(dim=-1).square().mean()


def _check(name: str, values: Tensor) -> None:
    if values.dim() != 2 or values.size(1) == 0:
        raise ValueError(f"{name} must be (n_tokens, n_experts), got {tuple(values.shape)}")
