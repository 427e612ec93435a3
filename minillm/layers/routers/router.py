"""What all routers share: one matrix of scores in full precision, and arguments checked at the door."""

import math

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from minillm.layers.routers.routing import Routing


class Router(nn.Module):
    """Base of the routers: ``logits = x weight^T``, then whatever :meth:`route` makes of them.

    The logits are computed in float32 even where the model computes in bfloat16 or float16, under autocast too: the
    softmax of a router sits at the edge between two experts, and half precision flips it (Fedus et al. 2022, "Switch
    Transformers", section 2.4, "selective precision").

    Args:
        d_model: width of a token.
        n_experts: experts to choose from.
        k: experts a token gets (in expert choice: on average).
        balance_loss, z_loss: coefficients of the losses that keep experts evenly loaded and logits small; 0 leaves one
            out.
        jitter: in training the input is multiplied by draws from U(1 - jitter, 1 + jitter) (Switch, appendix C).

    Subclasses implement ``route(logits, x) -> Routing``.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        k: int,
        *,
        balance_loss: float = 0.01,
        z_loss: float = 0.0,
        jitter: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("n_experts", n_experts), ("k", k)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if k > n_experts:
            raise ValueError(f"k must be at most n_experts={n_experts}, got {k}")
        for name, number in (("balance_loss", balance_loss), ("z_loss", z_loss), ("jitter", jitter)):
            if not 0.0 <= number < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {number}")
        self.d_model, self.n_experts, self.k = d_model, n_experts, k
        self.balance_loss, self.z_loss, self.jitter = balance_loss, z_loss, jitter
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Routing:
        """Route the rows of ``x``, (n_tokens, d_model); see :class:`Routing`. ValueError if a logit is NaN."""
        return self.route(self.logits(x), x)

    def logits(self, x: Tensor) -> Tensor:
        """(n_tokens, n_experts), float32 (float64 for float64 input)."""
        if x.dim() != 2 or x.size(1) != self.d_model:
            raise ValueError(f"x must be (n_tokens, d_model={self.d_model}), got {tuple(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            exact = torch.promote_types(x.dtype, torch.float32)
            x = x.to(exact)
            if self.training and self.jitter > 0.0:
                x = x * torch.empty_like(x).uniform_(1.0 - self.jitter, 1.0 + self.jitter)
            logits = F.linear(x, self.weight.to(exact))
        # Reading a value would make a GPU wait in every layer; there the loss becomes NaN, which training refuses.
        if logits.device.type == "cpu" and not is_compiling() and logits.isnan().any():
            token = int(logits.isnan().any(dim=1).nonzero()[0])
            raise ValueError(
                f"router logits must be numbers, got NaN for token {token}: its input or the weight is NaN"
            )
        return logits

    def route(self, logits: Tensor, x: Tensor) -> Routing:
        """What to do with ``logits``; ``x`` is there for routers that look at the token a second time."""
        raise NotImplementedError
