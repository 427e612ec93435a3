"""The losses that keep a router in order: evenly loaded experts, small logits."""

import torch
from torch import Tensor


def load_balancing_loss(probabilities: Tensor, experts: Tensor) -> Tensor:
    """``n_experts * sum_i f_i P_i``: 1 when every expert gets the same share, n_experts when one gets everything.

    f_i is the fraction of assignments that go to expert i (a count: no gradient), P_i the mean probability of it (Fedus
    et al. 2022, equations 4-6, for one expert a token; Lepikhin et al. 2021, algorithm 1). Both are means, so
    the value does not depend on the number of tokens or of choices.

    Args:
        probabilities: (n_tokens, n_experts), rows that sum to 1.
        experts: int64, any shape: the expert of each assignment.

    Returns: a scalar; 0 if there are no tokens.
    """
    n_tokens, n_experts = probabilities.shape
    if n_tokens == 0:
        return probabilities.sum()
    share = torch.bincount(experts.flatten(), minlength=n_experts).to(probabilities) / max(experts.numel(), 1)
    return n_experts * (share * probabilities.mean(dim=0)).sum()


def router_z_loss(logits: Tensor) -> Tensor:
    """``mean over tokens of (log sum_i exp logits_i)^2``: keeps logits small, and float16 from overflowing.

    Zoph et al. 2022, "ST-MoE", equation 5; they multiply it by 0.001. logits: (n_tokens, n_experts). Returns a
    scalar; 0 if there are no tokens.
    """
    if logits.size(0) == 0:
        return logits.sum()
    return logits.logsumexp(dim=-1).square().mean()
