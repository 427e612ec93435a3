"""What a router decides: which token goes to which expert, and with what weight the answer comes back."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.compiler import is_compiling


def assignments_per_expert(experts: Tensor, n_experts: int) -> Tensor:
    """int64 (n_experts,): how often each of 0 to n_experts - 1 stands in ``experts``, int64 of any shape."""
    # torch.bincount does the same, but reads its largest value first: a GPU waits for it, and a compiled graph breaks.
    experts = experts.flatten()
    return experts.new_zeros(n_experts).index_add(0, experts, torch.ones_like(experts))


@dataclass(frozen=True)
class Routing:
    """Assignments of tokens to experts, listed in order of priority: where room is short, the earlier one has it.

    A flat list holds every kind of routing: tokens that choose experts, experts that choose tokens, and later experts
    that live on other ranks.

    Attributes:
        tokens: int64 (assignments,), the place of the token among the rows that were routed.
        experts: int64 (assignments,), in [0, n_experts).
        weights: (assignments,), float32 or float64; what the expert's output is multiplied by; differentiable.
        probabilities: (n_tokens, n_experts), float32 or float64; what the router thinks of each pair, before any choice
            (softmax or sigmoid of the logits; not necessarily the weights); differentiable.
        losses: name -> scalar, already multiplied by its coefficient: add all of them to the training loss.
        choices: k if each token has exactly k assignments and they are listed choice by choice, so that number
            ``c * n_tokens + t`` is token t's choice c; None if tokens may have different numbers of experts.

    Raises ValueError if these do not fit each other, on a CPU also for tokens or experts that there are not (to look at
    values would make a GPU wait).
    """

    tokens: Tensor
    experts: Tensor
    weights: Tensor
    probabilities: Tensor
    losses: dict[str, Tensor]
    choices: int | None = None

    def __post_init__(self) -> None:
        if self.probabilities.dim() != 2:
            raise ValueError(f"probabilities must be (n_tokens, n_experts), got {tuple(self.probabilities.shape)}")
        assignments = (self.weights.numel() if self.choices is None else self.choices * self.n_tokens,)
        if self.weights.shape != assignments:
            raise ValueError(f"weights must be {assignments}, got {tuple(self.weights.shape)}")
        for name, values, number in (("tokens", self.tokens, self.n_tokens), ("experts", self.experts, self.n_experts)):
            if values.shape != assignments or values.dtype != torch.int64:
                raise ValueError(f"{name} must be int64 {assignments}, got {values.dtype} {tuple(values.shape)}")
            if values.device.type == "cpu" and values.numel() and not is_compiling():
                low, high = (int(value) for value in values.aminmax())
                if low < 0 or high >= number:
                    raise ValueError(f"{name} must be in [0, {number}), got values from {low} to {high}")

    @property
    def n_tokens(self) -> int:
        return self.probabilities.size(0)

    @property
    def n_experts(self) -> int:
        return self.probabilities.size(1)

    @property
    def assigned(self) -> Tensor:
        """int64 (n_experts,): assignments that each expert got, before any capacity takes some away."""
        return assignments_per_expert(self.experts, self.n_experts)

    @classmethod
    def from_choices(
        cls, experts: Tensor, weights: Tensor, probabilities: Tensor, losses: dict[str, Tensor]
    ) -> "Routing":
        """The routing in which token t goes to ``experts[t]`` with ``weights[t]``, both (n_tokens, k).

        All first choices stand before all second choices, so that a second choice never takes the place of a first
        (Lepikhin et al. 2021, "GShard", algorithm 1).
        """
        n_tokens, k = experts.shape
        tokens = torch.arange(n_tokens, device=experts.device).repeat(k)
        return cls(tokens, experts.t().flatten(), weights.t().flatten(), probabilities, losses, choices=k)
