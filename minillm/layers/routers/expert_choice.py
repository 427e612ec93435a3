"""Expert choice: the experts choose their tokens, so that each has exactly the same number of them."""

import torch
from torch import Tensor

from minillm.layers.routers.router import Router
from minillm.layers.routers.routing import Routing


class ExpertChoiceRouter(Router):
    """``p = softmax(logits)`` over experts; each expert takes the ``capacity`` tokens of largest p, with weight p.

    Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", section 3.2. The load is even by construction, so
    there is no balance loss. A token gets as many experts as want it: k on average, perhaps all, perhaps none (then the
    mixture answers zero, and only the residual connection carries it on): ``routing.tokens.bincount`` counts them.

    Warning: not causal. Whether a token is among an expert's best depends on all tokens of the call, later ones of the
    same text and other texts of the batch too. A language model that is trained so sees a little of the future, and
    generates, a token at a time, with another routing than it was trained with: use it in encoders, or to study it.

    Args: as :class:`Router`; k is the average number of experts of a token (the paper's capacity factor c).
    """

    def __init__(self, d_model: int, n_experts: int, k: int, *, z_loss: float = 0.0) -> None:
        super().__init__(d_model, n_experts, k, balance_loss=0.0, z_loss=z_loss)

    def capacity(self, n_tokens: int) -> int:
        """``ceil(k * n_tokens / n_experts)``, the tokens that each expert takes of a call's n_tokens.

        Rounded up, so that it is at least 1 where there are tokens, at most n_tokens (k <= n_experts), and just what a
        mixture with capacity_factor 1 has room for.
        """
        return -(-self.k * n_tokens // self.n_experts)

    def route(self, logits: Tensor, x: Tensor) -> Routing:
        probabilities = logits.softmax(dim=-1)
        # (capacity, n_experts): all experts' best tokens first, which a smaller capacity of the mixture then keeps.
        weights, tokens = probabilities.topk(self.capacity(logits.size(0)), dim=0)
        experts = torch.arange(self.n_experts, device=logits.device).expand_as(tokens)
        losses = self.losses(logits, probabilities, experts)
        return Routing(tokens.flatten(), experts.flatten(), weights.flatten(), probabilities, losses)
