"""Sigmoid affinities, balanced by a bias that only the choice sees (DeepSeek-V3)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from minillm.layers.arguments import non_negative, true_or_false
from minillm.layers.routers.losses import load_balancing_loss, router_z_loss
from minillm.layers.routers.router import Router
from minillm.layers.routers.routing import Routing


class SigmoidRouter(Router):
    """``s = sigmoid(logits)``; the k largest ``s + bias`` are chosen; weights ``scaling * s / (sum of the chosen s)``.

    DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 2.1.2. No loss has to even the load and thereby pull at
    the weights: after each step :meth:`update_bias` raises the bias of experts that had too few tokens and lowers that
    of the others (Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy"). The bias is not in the weights, has
    no gradient and is no parameter; it is saved with the model.

    ``bias`` stays float32 in a model that is cast to bfloat16 or float16: between 0.5 and 1 bfloat16 has steps of
    0.004, in which an update of 0.001 is lost.

    Args:
        d_model, n_experts, k, z_loss: as :class:`Router`.
        scaling: of all weights (DeepSeek-V3: 2.5).
        renormalise: whether the weights are divided by their sum. Without, ``scaling * s``.
        n_groups, groups_per_token: node-limited routing. The experts stand in n_groups groups of neighbours, one on
            each node; a token may go to groups_per_token of them (DeepSeek-V3: 4 of 8), those in which the two largest
            ``s + bias`` have the largest sum. All groups as long as both are 1.
        bias_rate: how far one update moves a bias: 0.001 for most of DeepSeek-V3's training, 0 at its end. A run of a
            few thousand steps needs more.
        balance_loss: coefficient of :func:`load_balancing_loss` of ``s / sum(s)`` and of what would be chosen without
            the bias; 0, the default, leaves it out. DeepSeek-V3 adds it with 0.0001, for each sequence by itself
            (equations 17-20); a router sees no sequences, so it is of all tokens of the call here.

    Buffers: ``bias`` (n_experts,), float32 (float64 in a float64 model), persistent.
    """

    bias: Tensor

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        k: int,
        *,
        scaling: float = 1.0,
        renormalise: bool = True,
        n_groups: int = 1,
        groups_per_token: int = 1,
        bias_rate: float = 0.001,
        balance_loss: float = 0.0,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__(d_model, n_experts, k, balance_loss=balance_loss, z_loss=z_loss)
        true_or_false("renormalise", renormalise)
        non_negative("bias_rate", bias_rate)
        if not isinstance(scaling, int | float) or isinstance(scaling, bool):
            raise TypeError(f"scaling must be a number, got {scaling!r}")
        if not 0.0 < scaling < math.inf:
            raise ValueError(f"scaling must be above 0 and finite, got {scaling}")
        for name, value in (("n_groups", n_groups), ("groups_per_token", groups_per_token)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
        if n_groups < 1 or n_experts % n_groups:
            raise ValueError(f"n_groups must divide n_experts={n_experts}, got {n_groups}")
        if not 1 <= groups_per_token <= n_groups:
            raise ValueError(f"groups_per_token must be in 1..n_groups={n_groups}, got {groups_per_token}")
        if k > groups_per_token * (n_experts // n_groups):
            raise ValueError(
                f"k must be at most the {groups_per_token * (n_experts // n_groups)} experts of "
                f"groups_per_token={groups_per_token} groups, got {k}"
            )
        self.scaling, self.renormalise, self.bias_rate = scaling, renormalise, bias_rate
        self.n_groups, self.groups_per_token = n_groups, groups_per_token
        exact = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.register_buffer("bias", torch.zeros(n_experts, dtype=exact))

    def route(self, logits: Tensor, x: Tensor) -> Routing:
        affinities = logits.sigmoid()
        experts = self.choose(affinities.detach())
        chosen = logits.gather(1, experts)
        if self.renormalise:
            # s / sum(s) as a softmax of log(s): also where all s are too small for their format.
            weights = F.logsigmoid(chosen).softmax(dim=-1)
        else:
            weights = chosen.sigmoid()
        losses = {}
        if self.balance_loss:
            shares = F.logsigmoid(logits).softmax(dim=-1)
            losses["balance"] = self.balance_loss * load_balancing_loss(shares, affinities.topk(self.k, dim=-1).indices)
        if self.z_loss:
            losses["z"] = self.z_loss * router_z_loss(logits)
        return Routing.from_choices(experts, self.scaling * weights, affinities, losses)

    def choose(self, affinities: Tensor) -> Tensor:
        """int64 (n_tokens, k): the experts of the k largest ``affinities + bias``, best first, in the best groups."""
        scores = affinities + self.bias
        if self.groups_per_token < self.n_groups:
            grouped = scores.reshape(-1, self.n_groups, self.n_experts // self.n_groups)
            best = grouped.topk(min(2, grouped.size(2)), dim=-1).values.sum(dim=-1)  # (n_tokens, n_groups)
            allowed = torch.zeros_like(best, dtype=torch.bool)
            allowed = allowed.scatter(1, best.topk(self.groups_per_token, dim=-1).indices, True)
            scores = grouped.masked_fill(~allowed.unsqueeze(2), -math.inf).flatten(1)
        return scores.topk(self.k, dim=-1).indices

    @torch.no_grad()
    def update_bias(self, assigned: Tensor, rate: float | None = None) -> None:
        """``bias += rate * sign(mean(assigned) - assigned)``: once a step, in training (Wang et al. 2024, algorithm 1).

        Args:
            assigned: int64 (n_experts,), ``Routing.assigned`` summed over the micro-batches and ranks of the step.
            rate: None is the router's bias_rate.

        Raises TypeError unless assigned is int64, ValueError for another shape or a rate below 0.
        """
        if assigned.dtype != torch.int64:
            raise TypeError(f"assigned must be int64, got {assigned.dtype}")
        if assigned.shape != self.bias.shape:
            raise ValueError(f"assigned must be (n_experts={self.n_experts},), got {tuple(assigned.shape)}")
        rate = self.bias_rate if rate is None else rate
        non_negative("rate", rate)
        # The sign of mean - assigned, in integers: no rounding moves a bias whose expert has exactly its share.
        lacking = (assigned.sum() - self.n_experts * assigned).sign()
        self.bias.add_(lacking.to(self.bias), alpha=rate)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SigmoidRouter":
        # Every .to(), .half() and .cuda() passes here; the cast itself would already round the bias.
        exact = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bias.dtype in (torch.bfloat16, torch.float16):
            self.bias = exact.to(self.bias.device, torch.float32)
        return self
