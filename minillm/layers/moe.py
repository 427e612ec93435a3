"""A mixture of experts: many feed-forward networks, of which each token uses only a few."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minillm.layers.arguments import at_least
from minillm.layers.dispatch import einsum_dispatch, expert_capacity, kept_assignments, sorted_dispatch
from minillm.layers.experts import Activation, Experts
from minillm.layers.feed_forward import FeedForward, SwiGLU, feed_forward
from minillm.layers.routers import Router, Routing, make_router

_DISPATCHES = {"sorted": sorted_dispatch, "einsum": einsum_dispatch}


@dataclass(frozen=True)
class MoERecord:
    """What a mixture did with the tokens of one call.

    Attributes:
        routing: the router's assignments, probabilities and losses.
        kept: bool (assignments,), False where the expert was full and the token was dropped.
    """

    routing: Routing
    kept: Tensor

    @property
    def losses(self) -> dict[str, Tensor]:
        """Name -> scalar, weighted: add them to the training loss."""
        return self.routing.losses

    @property
    def load(self) -> Tensor:
        """int64 (n_experts,): assignments that each expert worked on."""
        experts = self.routing.experts
        return experts.new_zeros(self.routing.n_experts).index_add(0, experts, self.kept.to(torch.int64))

    @property
    def experts_per_token(self) -> Tensor:
        """int64 (n_tokens,): how many experts worked on each token; 0 where all its assignments were dropped."""
        tokens = self.routing.tokens
        return tokens.new_zeros(self.routing.n_tokens).index_add(0, tokens, self.kept.to(torch.int64))


class MixtureOfExperts(nn.Module):
    """``y_t = sum_i w_{t,i} expert_i(x_t)`` over the few experts i that the router assigns to token t.

    Shazeer et al. 2017, equation 1; Fedus et al. 2022, equation 2. Its cost follows the parameters a token uses, not
    those there are. What an expert has no room for is left out of the sum: around a residual connection such a token
    passes unchanged, and the record counts it.

    Args:
        d_model: width of a token.
        d_ff: width of one expert's hidden layer.
        n_experts: how many experts there are.
        k: how many of them a token uses.
        router: "softmax" (Mixtral), "switch", "glam", "noisy_top_k" (Shazeer), "expert_choice", "sigmoid"
            (DeepSeek-V3), or a :class:`minillm.layers.routers.Router` of these sizes, with losses and noise to taste.
        capacity_factor: in training an expert has room for ``ceil(capacity_factor * k * n_tokens / n_experts)``
            assignments of one call, first come first served; None drops nothing.
        eval_capacity_factor: the same in evaluation mode.
        activation, bias: of the experts: "swiglu", "gelu", "gelu_tanh" or "relu".
        n_shared_experts: width, in experts, of a feed-forward network beside them that every token uses (Dai et al.
            2024, "DeepSeekMoE").
        dispatch: "sorted" brings tokens to experts by sorting; "einsum" by one-hot matrices as in the papers: the same
            sums, but slower and with memory for n_tokens * n_experts * capacity numbers.

    Parameters: ``router.weight`` (n_experts, d_model), ``experts.up`` and so on (:class:`Experts`), ``shared``.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        n_experts: int,
        k: int,
        *,
        router: str | Router = "softmax",
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        activation: Activation = "swiglu",
        bias: bool = False,
        n_shared_experts: int = 0,
        dispatch: Literal["sorted", "einsum"] = "sorted",
    ) -> None:
        super().__init__()
        self.router = make_router(router, d_model, n_experts, k) if isinstance(router, str) else router
        if not isinstance(self.router, Router):
            raise TypeError(f"router must be a name or a Router, got {router!r}")
        sizes = (self.router.d_model, self.router.n_experts, self.router.k)
        if sizes != (d_model, n_experts, k):
            raise ValueError(f"router must be one for (d_model, n_experts, k) = {(d_model, n_experts, k)}, got {sizes}")
        for name, factor in (("capacity_factor", capacity_factor), ("eval_capacity_factor", eval_capacity_factor)):
            if factor is not None and (isinstance(factor, bool) or not isinstance(factor, int | float)):
                raise TypeError(f"{name} must be None or a number, got {factor!r}")
            if factor is not None and not 0.0 < factor < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {factor}")
        at_least("n_shared_experts", n_shared_experts, 0)
        if n_shared_experts and activation == "relu":
            raise ValueError("n_shared_experts must be 0 for activation='relu': the dense layer has no ReLU")
        if dispatch not in _DISPATCHES:
            raise ValueError(f"dispatch must be one of {', '.join(_DISPATCHES)}, got {dispatch!r}")
        self.capacity_factor, self.eval_capacity_factor, self.dispatch = capacity_factor, eval_capacity_factor, dispatch
        self.experts = Experts(d_model, d_ff, n_experts, activation=activation, bias=bias)
        self.shared: SwiGLU | FeedForward | None = None
        if n_shared_experts:
            self.shared = feed_forward(d_model, n_shared_experts * d_ff, activation=activation, bias=bias)

    def forward(self, x: Tensor, *, token_mask: Tensor | None = None) -> tuple[Tensor, MoERecord]:
        """The mixture's answer to each token, and what the router did.

        Args:
            x: (..., d_model); any number of tokens, none included.
            token_mask: bool, the shape of x without its last axis; False for padding, which is given to no expert,
                takes nobody's room and counts in no loss (the shared expert's part of its output stays).

        Returns: (output like x, :class:`MoERecord`). Raises ValueError for another width or mask, and on a CPU for NaN.
        """
        if x.dim() < 1 or x.size(-1) != self.router.d_model:
            raise ValueError(f"x must be (..., d_model={self.router.d_model}), got {tuple(x.shape)}")
        if token_mask is not None and (token_mask.dtype is not torch.bool or token_mask.shape != x.shape[:-1]):
            raise ValueError(
                f"token_mask must be bool {tuple(x.shape[:-1])}, got {token_mask.dtype} {tuple(token_mask.shape)}"
            )
        tokens = x.reshape(-1, x.size(-1)) if token_mask is None else x[token_mask]  # (n_tokens, d_model)
        routing = self.router(tokens)
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        capacity = None
        if factor is not None:
            capacity = expert_capacity(routing.n_tokens, routing.n_experts, self.router.k, factor)
        kept = kept_assignments(routing, capacity)
        out = _DISPATCHES[self.dispatch](tokens, routing, kept, self.experts)
        if token_mask is not None:
            out = torch.zeros_like(x).masked_scatter(token_mask.unsqueeze(-1), out)
        out = out.reshape(x.shape)
        if self.shared is not None:
            out = out + self.shared(x)
        return out, MoERecord(routing, kept)
