"""Top-k routing by a softmax, its weights renormalised over the chosen experts (Mixtral) or not (OLMoE)."""

from torch import Tensor

from minillm.layers.arguments import true_or_false
from minillm.layers.routers.router import Router
from minillm.layers.routers.routing import Routing


class TopKRouter(Router):
    """``p = softmax(logits)``; the k largest, divided by their sum: ``softmax`` over the chosen logits.

    Jiang et al. 2024, "Mixtral of Experts", section 2.1. With ``renormalise=False`` the weights stay the probabilities
    themselves (Muennighoff et al. 2024, "OLMoE", section 2; Qwen2-MoE): only so does the router learn from the
    language-modelling loss when k is 1. Between equal probabilities ``torch.topk`` decides.

    The balance loss counts all k choices. `transformers` multiplies the same loss by k, and takes f and P over all
    layers at once: for one layer a coefficient from there has to be k times as large here to pull as hard.

    Args: as :class:`Router`.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        k: int,
        *,
        renormalise: bool = True,
        balance_loss: float = 0.01,
        z_loss: float = 0.0,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(d_model, n_experts, k, balance_loss=balance_loss, z_loss=z_loss, jitter=jitter)
        true_or_false("renormalise", renormalise)
        self.renormalise = renormalise

    def route(self, logits: Tensor, x: Tensor) -> Routing:
        probabilities = logits.softmax(dim=-1)
        weights, experts = probabilities.topk(self.k, dim=-1)  # (n_tokens, k)
        if self.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return Routing.from_choices(experts, weights, probabilities, self.losses(logits, probabilities, experts))
