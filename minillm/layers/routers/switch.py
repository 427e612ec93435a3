"""Switch routing: one expert a token, chosen with a little noise, its answer weighted by its probability."""

from torch import Tensor

from minillm.layers.routers.router import Router
from minillm.layers.routers.routing import Routing


class SwitchRouter(Router):
    """``p = softmax(logits)``; the token goes to the expert with the largest p, and p is the weight.

    Fedus et al. 2022, "Switch Transformers": section 2.1 (one expert is enough), equation 2 (the weight is the
    probability itself: divided by the sum over the chosen it would always be 1, and the router would learn nothing
    from the language-modelling loss), equations 4-6 (balance loss, coefficient 0.01), section 2.4 (the router in
    float32), appendix C (jitter of the input, 0.01 in their code). Among equal probabilities the first expert has it.

    With a capacity (``MixtureOfExperts(..., capacity_factor=1.25)``) a token whose expert is full is dropped: its
    output is zero and the residual connection carries it past the layer.

    Args: as :class:`Router`; k must be 1.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        k: int = 1,
        *,
        balance_loss: float = 0.01,
        z_loss: float = 0.0,
        jitter: float = 0.01,
    ) -> None:
        super().__init__(d_model, n_experts, k, balance_loss=balance_loss, z_loss=z_loss, jitter=jitter)
        if k != 1:
            raise ValueError(f"k must be 1 for Switch routing, got {k}")

    def route(self, logits: Tensor, x: Tensor) -> Routing:
        probabilities = logits.softmax(dim=-1)
        weights, experts = probabilities.max(dim=-1, keepdim=True)  # (n_tokens, 1)
        return Routing.from_choices(experts, weights, probabilities, self.losses(logits, probabilities, experts))
