"""Many feed-forward networks of one shape, their matrices stacked: the experts of a mixture."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["gelu", "gelu_tanh", "relu", "swiglu"]


class Experts(nn.Module):
    """``n_experts`` feed-forward networks, each like :class:`minillm.layers.FeedForward` or ``SwiGLU``.

    Parameters: ``up`` and, for SwiGLU, ``gate``, both (n_experts, d_ff, d_model); ``down`` (n_experts, d_model, d_ff);
    with bias ``up_bias`` and ``gate_bias`` (n_experts, d_ff) and ``down_bias`` (n_experts, d_model).
    """

    def __init__(
        self, d_model: int, d_ff: int, n_experts: int, *, activation: Activation = "swiglu", bias: bool = False
    ) -> None:
        super().__init__()
        self.d_model, self.d_ff, self.n_experts, self.activation = d_model, d_ff, n_experts, activation
        gated = activation == "swiglu"
        self.gate = nn.Parameter(torch.empty(n_experts, d_ff, d_model)) if gated else None
        self.up = nn.Parameter(torch.empty(n_experts, d_ff, d_model))
        self.down = nn.Parameter(torch.empty(n_experts, d_model, d_ff))
        self.gate_bias = nn.Parameter(torch.zeros(n_experts, d_ff)) if bias and gated else None
        self.up_bias = nn.Parameter(torch.zeros(n_experts, d_ff)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(n_experts, d_model)) if bias else None
        for weight in (self.gate, self.up, self.down):
            if weight is not None:
                nn.init.normal_(weight, std=0.02)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Each group of rows through its own expert.

        Args:
            rows: (n_rows, d_model), expert by expert: the first counts[0] rows are expert 0's, and so on.
            counts: int64 (n_experts,); at most n_rows in all. Rows after that belong to nobody and come back as zeros.
        """
        out = torch.zeros_like(rows)
        start = 0
        for expert, count in enumerate(counts.tolist()):
            if count:
                out[start : start + count] = self.one(rows[start : start + count], expert)
            start += count
        return out

    def batched(self, x: Tensor) -> Tensor:
        """(n_experts, capacity, d_model) to the same shape: every expert on as many rows."""
        return torch.stack([self.one(rows, expert) for expert, rows in enumerate(x.unbind(0))])

    def one(self, x: Tensor, expert: int) -> Tensor:
        """One expert: (..., d_model) to (..., d_model)."""
        up = F.linear(x, self.up[expert], None if self.up_bias is None else self.up_bias[expert])
        if self.gate is not None:
            gate = F.linear(x, self.gate[expert], None if self.gate_bias is None else self.gate_bias[expert])
            hidden = F.silu(gate) * up
        elif self.activation == "relu":
            hidden = F.relu(up)
        else:
            hidden = F.gelu(up, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        return F.linear(hidden, self.down[expert], None if self.down_bias is None else self.down_bias[expert])
