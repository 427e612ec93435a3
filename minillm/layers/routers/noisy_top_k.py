"""Noisy top-k gating, the router of the sparsely gated mixture, with its importance and load losses."""

import math

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from minillm.layers.arguments import non_negative
from minillm.layers.routers.router import Router
from minillm.layers.routers.routing import Routing

# softplus underflows to 0 for a very negative argument, and the load estimate divides by it.
_SMALLEST_NOISE = 1e-6


class NoisyTopKRouter(Router):
    """``softmax(keep_top_k(h))`` with ``h = x weight^T + normal() * softplus(x noise_weight^T)``.

    Shazeer et al. 2017, "Outrageously Large Neural Networks", section 2.1. The router learns how much noise each token
    and expert needs; the noise lets an expert just below the edge have a try, and makes the load, which is a count, a
    smooth function of the parameters. In evaluation there is no noise: ``h`` is the logits.

    Two losses keep the experts even, both the squared coefficient of variation over the experts (section 4, appendix
    A): ``importance`` of the sums of the weights that each expert gets, ``load`` of how many tokens it gets. Neither
    follows from the other: one expert may get few tokens with large weights. In training the load is the estimate of
    :func:`selection_probabilities`, summed over the tokens, and has a gradient; in evaluation it is the count itself,
    so that the figure stays comparable. With k = 1 every weight is 1, and only the load loss teaches the router to be
    even.

    Both matrices start as zeros, "no signal and some noise" (appendix A), so that experts start evenly loaded.

    Args:
        d_model, n_experts, k, z_loss: as :class:`Router`; the z-loss is of the logits without noise.
        importance_loss, load_loss: coefficients of the two losses; 0 leaves one out. The paper's language models have
            0.1 for both (appendix C).

    Parameters: ``weight`` and ``noise_weight``, both (n_experts, d_model).
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        k: int,
        *,
        importance_loss: float = 0.1,
        load_loss: float = 0.1,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__(d_model, n_experts, k, balance_loss=0.0, z_loss=z_loss)
        for name, number in (("importance_loss", importance_loss), ("load_loss", load_loss)):
            non_negative(name, number)
        self.importance_loss, self.load_loss = importance_loss, load_loss
        self.noise_weight = nn.Parameter(torch.zeros(n_experts, d_model))
        nn.init.zeros_(self.weight)

    def route(self, logits: Tensor, x: Tensor) -> Routing:
        scores = logits
        if self.training:
            deviation = self.noise_deviation(x)
            scores = logits + torch.randn_like(logits) * deviation
        experts = scores.topk(self.k, dim=-1).indices  # (n_tokens, k)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, experts, True)
        gates = scores.masked_fill(~chosen, -math.inf).softmax(dim=-1)  # (n_tokens, n_experts), k of a row above 0
        probabilities = logits.softmax(dim=-1)
        losses = self.losses(logits, probabilities, experts)
        if self.importance_loss:
            losses["importance"] = self.importance_loss * squared_variation(gates.sum(dim=0))
        if self.load_loss:
            load = chosen.to(gates.dtype)
            if self.training:
                load = selection_probabilities(logits, scores, deviation, experts)
            losses["load"] = self.load_loss * squared_variation(load.sum(dim=0))
        return Routing.from_choices(experts, gates.gather(1, experts), probabilities, losses)

    def noise_deviation(self, x: Tensor) -> Tensor:
        """``softplus(x noise_weight^T)``, (n_tokens, n_experts): the standard deviation of each logit's noise.

        float32 or float64 like the logits, at least 1e-6. ValueError on a CPU if one is NaN or infinite.
        """
        with torch.autocast(x.device.type, enabled=False):
            exact = torch.promote_types(x.dtype, torch.float32)
            deviation = F.softplus(F.linear(x.to(exact), self.noise_weight.to(exact)))
        # As in Router.logits: to read a value would make a GPU wait.
        if deviation.device.type == "cpu" and not is_compiling():
            bad = ~deviation.isfinite()
            if bad.any():
                token = int(bad.any(dim=1).nonzero()[0])
                raise ValueError(
                    f"noise deviations must be finite numbers, got another for token {token}: "
                    "its input or noise_weight is NaN, infinite or too large"
                )
        return deviation.clamp_min(_SMALLEST_NOISE)


def selection_probabilities(logits: Tensor, scores: Tensor, deviation: Tensor, experts: Tensor) -> Tensor:
    """P(x, i): the chance that expert i is among the k chosen if its own noise is drawn anew and all other stays.

    Shazeer et al. 2017, appendix A, equations 8-9: ``Phi((logits_i - kth_excluding_i) / deviation_i)``, where
    kth_excluding_i is the k-th largest of the scores other than i's, and Phi the normal distribution function.

    Args:
        logits: (n_tokens, n_experts), without noise.
        scores: like logits, with noise.
        deviation: like logits, above 0: standard deviations of the noise.
        experts: int64 (n_tokens, k): those of the k largest scores.

    Returns: like logits, in [0, 1]; differentiable in the first three. All ones where k is n_experts: no k-th other
    expert is there to lose to.
    """
    k = experts.size(1)
    if k == logits.size(1):
        return torch.ones_like(logits)
    best = scores.topk(k + 1, dim=-1).values
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(1, experts, True)
    # The k-th largest of the others is the (k+1)-th of all for an expert that is itself among the k.
    threshold = torch.where(chosen, best[:, k : k + 1], best[:, k - 1 : k])
    probabilities: Tensor = torch.special.ndtr((logits - threshold) / deviation)
    return probabilities


def squared_variation(values: Tensor) -> Tensor:
    """``variance / mean^2`` of the numbers, one for each expert: 0 if all are equal, n - 1 if one has everything.

    values: (n_experts,), at least 0. Returns a scalar; 0 if all values are 0, as they are where there are no tokens.
    """
    mean = values.mean()
    return torch.where(mean > 0, values.var(correction=0) / mean.square().clamp_min(torch.finfo(mean.dtype).tiny), 0.0)
