"""What all routers share: one matrix of scores in full precision, and arguments checked at the door."""

import math

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F

from minillm.layers.arguments import at_least, non_negative
from minillm.layers.routers.losses import load_balancing_loss, router_z_loss
from minillm.layers.routers.routing import Routing


class Router(nn.Module):
    """Base of the routers: ``logits = x weight^T``, then whatever :meth:`route` makes of them.

    The logits are computed in float32 even where the model computes in bfloat16 or float16, under autocast too: the
    softmax of a router sits at the edge between two experts, and half precision flips it (Fedus et al. 2022, "Switch
    Transformers", section 2.4, "selective precision").

    Args:
        d_model: width of a token.
        n_experts: experts to choose from.
        k: experts a token gets (in expert choice: on average), at most n_experts.
        balance_loss, z_loss: coefficients of the losses that keep experts evenly loaded and logits small; 0 leaves one
            out.
        jitter: in training what the router sees of a token, but not what its expert sees, is multiplied by draws from
            U(1 - jitter, 1 + jitter), each number by its own (Switch, appendix C); below 1.

    Parameters: ``weight`` (n_experts, d_model). Raises TypeError or ValueError naming the argument.

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
            at_least(name, value, 1)
        if k > n_experts:
            raise ValueError(f"k must be at most n_experts={n_experts}, got {k}")
        for name, number in (("balance_loss", balance_loss), ("z_loss", z_loss), ("jitter", jitter)):
            non_negative(name, number)
        if jitter >= 1.0:
            raise ValueError(f"jitter must be below 1, got {jitter}")
        self.d_model, self.n_experts, self.k = d_model, n_experts, k
        self.balance_loss, self.z_loss, self.jitter = balance_loss, z_loss, jitter
        self.weight = nn.Parameter(torch.empty(n_experts, d_model))
        nn.init.normal_(self.weight, std=0.02)

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, n_experts={self.n_experts}, k={self.k}"

    def forward(self, x: Tensor) -> Routing:
        """Route the rows of ``x``, (n_tokens, d_model); see :class:`Routing` and, for errors, :meth:`logits`."""
        return self.route(self.logits(x), x)

    def logits(self, x: Tensor) -> Tensor:
        """(n_tokens, n_experts), float32 (float64 for float64 input).

        Raises TypeError for x of integers, ValueError for another shape, and on a CPU ValueError if a logit is NaN or
        infinite. To read a value would make a GPU wait in every layer: there the loss becomes NaN, which training
        refuses.
        """
        if x.dim() != 2 or x.size(1) != self.d_model:
            raise ValueError(f"x must be (n_tokens, d_model={self.d_model}), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"x must be of a floating dtype, got {x.dtype}")
        with torch.autocast(x.device.type, enabled=False):
            exact = torch.promote_types(x.dtype, torch.float32)
            x = x.to(exact)
            if self.training and self.jitter > 0.0:
                x = x * torch.empty_like(x).uniform_(1.0 - self.jitter, 1.0 + self.jitter)
            logits = F.linear(x, self.weight.to(exact))
        if logits.device.type == "cpu" and not is_compiling():
            _refuse_unless_finite(logits.detach())
        return logits

    def losses(self, logits: Tensor, probabilities: Tensor, experts: Tensor) -> dict[str, Tensor]:
        """The losses "balance" and "z", each multiplied by its coefficient; one whose coefficient is 0 is left out."""
        losses = {}
        if self.balance_loss:
            losses["balance"] = self.balance_loss * load_balancing_loss(probabilities, experts)
        if self.z_loss:
            losses["z"] = self.z_loss * router_z_loss(logits)
        return losses

    def route(self, logits: Tensor, x: Tensor) -> Routing:
        """What to do with ``logits``; ``x`` is there for routers that look at the token a second time."""
        raise NotImplementedError(f"{type(self).__name__} has no route: take a router that has one, such as TopKRouter")


def _refuse_unless_finite(logits: Tensor) -> None:
    # One NaN or infinity makes the sum one, and a sum costs a thirtieth of looking at each number. A sum of large
    # numbers may be infinite by itself: then each is looked at.
    if math.isfinite(float(logits.sum())):
        return
    bad = ~logits.isfinite()
    if bad.any():
        token = int(bad.any(dim=1).nonzero()[0])
        name = "NaN" if logits[token].isnan().any() else "infinity"
        raise ValueError(
            f"router logits must be finite numbers, got {name} for token {token}: "
            "its input or the router's weight is NaN, infinite or too large"
        )
