"""Learned absolute positions: one trained vector for each place."""

import torch
from torch import Tensor, nn

from minillm.layers.positions.arguments import check_integer_tensor, check_whole_numbers


class LearnedPositions(nn.Module):
    """One trained vector for each position, added to the token embedding (Gehring et al. 2017; GPT-2, BERT).

    Args:
        context_length: number of positions.
        d_model: size of each vector.
    """

    def __init__(self, context_length: int, d_model: int) -> None:
        super().__init__()
        check_whole_numbers(context_length=context_length, d_model=d_model)
        if context_length < 1 or d_model < 1:
            raise ValueError(f"context_length and d_model must be at least 1, got {context_length} and {d_model}")
        self.weight = nn.Parameter(torch.empty(context_length, d_model))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, positions: Tensor) -> Tensor:
        """Vectors for integer ``positions`` of any shape: (...) to (..., d_model)."""
        check_integer_tensor("positions", positions)
        try:
            return nn.functional.embedding(positions.long(), self.weight)
        except IndexError:
            low, high = int(positions.min()), int(positions.max())
            raise ValueError(
                f"positions must be in [0, {self.weight.size(0)}) (context_length), got values from {low} to {high}"
            ) from None

    def span(self, start: int, length: int) -> Tensor:
        """Vectors of positions ``start .. start + length - 1``, (length, d_model): a slice, not a look-up."""
        check_whole_numbers(start=start, length=length)
        if start < 0 or length < 0 or start + length > self.weight.size(0):
            raise ValueError(
                f"positions {start} to {start + length - 1} asked for, of {self.weight.size(0)} (context_length)"
            )
        return self.weight[start : start + length]

    def extra_repr(self) -> str:
        return f"context_length={self.weight.size(0)}, d_model={self.weight.size(1)}"
