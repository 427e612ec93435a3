"""GShard's top-2 gating, which GLaM uses: two experts of many, balanced by the first choices."""

import torch
from torch import Tensor

from minillm.layers.arguments import true_or_false
from minillm.layers.routers.router import Router
from minillm.layers.routers.routing import Routing


class GShardRouter(Router):
    """``g = softmax(logits)``; the two largest, ``g1 / (g1 + g2)`` and ``g2 / (g1 + g2)``, are the weights.

    Lepikhin et al. 2021, "GShard", algorithm 1. Du et al. 2022, "GLaM", section 4, takes this gating for 64 experts
    in every other layer, and its balance loss with coefficient 0.01. What differs from :class:`TopKRouter` with k = 2:
    the balance loss counts first choices only, and the second expert may be left out.

    Random routing (GShard, section 2.2): a second expert with a small weight adds little, so in training it is asked
    only with probability ``2 g2 / (g1 + g2)``, which is at most 1, and otherwise leaves its place to another token.
    The first expert's weight stays ``g1 / (g1 + g2)``. A second choice not asked is no assignment: it is not in the
    routing (whose ``choices`` is then None), takes no room and counts as no drop; ``2 * n_tokens - len(experts)`` of
    them there are. (By the letter of algorithm 1 it would use up a place all the same; the section's text and the
    authors' library, Lingvo, give the place away, and so does this.)

    Args: as :class:`Router`; k must be 2.
        random_second: random routing in training. Off by default: in GLaM a token has the answers of both its experts
            (section 4), and in Lingvo random routing is an option that is off. The number of assignments then depends
            on the draws, so a GPU waits for it and a compiled graph breaks there.
    """

    def __init__(
        self,
        d_model: int,
        n_experts: int,
        k: int = 2,
        *,
        random_second: bool = False,
        balance_loss: float = 0.01,
        z_loss: float = 0.0,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(d_model, n_experts, k, balance_loss=balance_loss, z_loss=z_loss, jitter=jitter)
        true_or_false("random_second", random_second)
        if k != 2:
            raise ValueError(f"k must be 2 for GShard's gating, got {k}")
        self.random_second = random_second

    def route(self, logits: Tensor, x: Tensor) -> Routing:
        probabilities = logits.softmax(dim=-1)
        gates, experts = probabilities.topk(2, dim=-1)  # (n_tokens, 2)
        weights = gates / gates.sum(dim=-1, keepdim=True)
        losses = self.losses(logits, probabilities, experts[:, 0])
        both = Routing.from_choices(experts, weights, probabilities, losses)
        if not (self.training and self.random_second):
            return both
        second = weights[:, 1].detach()
        asked = 2.0 * second > torch.rand_like(second)
        rows = torch.cat((torch.ones_like(asked), asked)).nonzero().squeeze(1)
        return Routing(both.tokens[rows], both.experts[rows], both.weights[rows], probabilities, losses)
