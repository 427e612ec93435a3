"""Many feed-forward networks of one shape, their matrices stacked: the experts of a mixture."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.layers.arguments import at_least, true_or_false
from minillm.layers.gradient_buffers import GradientBuffers
from minillm.layers.grouped_experts import Weights, activate, grouped_experts, one_expert

Activation = Literal["gelu", "gelu_tanh", "relu", "swiglu"]


class Experts(nn.Module):
    """``n_experts`` feed-forward networks, each like :class:`minillm.layers.FeedForward` or ``SwiGLU``.

    Args:
        d_model: width of a token.
        d_ff: width of one expert's hidden layer.
        n_experts: how many.
        activation: "swiglu" (with a gate), "gelu", "gelu_tanh" or "relu".
        bias: whether the linear maps have one.

    Parameters: ``up`` and, for SwiGLU, ``gate``, both (n_experts, d_ff, d_model); ``down`` (n_experts, d_model, d_ff);
    with bias ``up_bias`` and ``gate_bias`` (n_experts, d_ff) and ``down_bias`` (n_experts, d_model). Matrices start
    with a standard deviation of 0.02 (GPT-2's; a Transformer sets its own), biases at 0.

    Raises TypeError or ValueError naming the argument.
    """

    def __init__(
        self, d_model: int, d_ff: int, n_experts: int, *, activation: Activation = "swiglu", bias: bool = False
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_ff", d_ff), ("n_experts", n_experts)):
            at_least(name, value, 1)
        true_or_false("bias", bias)
        if activation not in get_args(Activation):
            raise ValueError(f"activation must be one of {', '.join(get_args(Activation))}, got {activation!r}")
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
        self._buffers_for_gradients = GradientBuffers()

    @property
    def weights(self) -> Weights:
        return Weights(self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias)

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Each group of rows through its own expert.

        Args:
            rows: (n_rows, d_model), expert by expert: the first counts[0] rows are expert 0's, and so on.
            counts: int64 (n_experts,); at most n_rows in all. Rows after that belong to nobody and come back as zeros.

        Returns: (n_rows, d_model), under autocast in its type, otherwise in that of rows and parameters. Raises
        ValueError or TypeError for what does not fit; on a GPU in bfloat16 the counts are not looked at, because
        reading them would make the GPU wait.
        """
        if rows.dim() != 2 or rows.size(1) != self.d_model:
            raise ValueError(f"rows must be (n_rows, d_model={self.d_model}), got {tuple(rows.shape)}")
        if counts.shape != (self.n_experts,) or counts.dtype is not torch.int64:
            raise ValueError(f"counts must be int64 ({self.n_experts},), got {counts.dtype} {tuple(counts.shape)}")
        rows = self._in_type_of_products("rows", rows)
        if self._has_grouped_product(rows):
            with torch.autocast(rows.device.type, enabled=False):
                return self._by_grouped_products(rows, counts)
        return self._by_groups(rows, counts)  # type: ignore[no-any-return]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # the sizes are data: each set would be a new program
    def _by_groups(self, rows: Tensor, counts: Tensor) -> Tensor:
        sizes = counts.tolist()
        if min(sizes) < 0 or sum(sizes) > rows.size(0):
            raise ValueError(f"counts must be at least 0 and at most {rows.size(0)} rows in all, got {sizes}")
        return grouped_experts(rows, self.weights, sizes, self.activation, self._buffers_for_gradients)

    def batched(self, x: Tensor) -> Tensor:
        """(n_experts, capacity, d_model) to the same shape: every expert on as many rows, by batched products."""
        if x.dim() != 3 or (x.size(0), x.size(2)) != (self.n_experts, self.d_model):
            allowed = f"(n_experts={self.n_experts}, capacity, d_model={self.d_model})"
            raise ValueError(f"x must be {allowed}, got {tuple(x.shape)}")
        x = self._in_type_of_products("x", x)
        up = _batched_linear(x, self.up, self.up_bias)
        if self.gate is None:
            hidden = activate(up, self.activation)
        else:
            hidden = activate(_batched_linear(x, self.gate, self.gate_bias), self.activation) * up
        return _batched_linear(hidden, self.down, self.down_bias)

    def one(self, x: Tensor, expert: int) -> Tensor:
        """One expert, the plain version: (..., d_model) to (..., d_model)."""
        own = (None if stack is None else stack[expert] for stack in self.weights)
        return one_expert(x, Weights(*own), self.activation)  # type: ignore[arg-type]

    def _in_type_of_products(self, name: str, x: Tensor) -> Tensor:
        """Under autocast in its type; otherwise it must have that of the parameters."""
        device = x.device.type
        if torch.is_autocast_enabled(device) and x.dtype is not torch.float64:
            return x.to(torch.get_autocast_dtype(device))
        if x.dtype is not self.up.dtype:
            raise TypeError(f"{name} must have the parameters' type {self.up.dtype}, got {x.dtype}")
        return x

    def _has_grouped_product(self, rows: Tensor) -> bool:
        """Whether the GPU has one kernel for all groups: bfloat16, Ampere or newer, rows of whole 16 bytes."""
        return (
            rows.is_cuda
            and rows.dtype is torch.bfloat16
            and torch.cuda.get_device_capability(rows.device) >= (8, 0)
            and self.d_model % 8 == 0
            and self.d_ff % 8 == 0
        )

    def _by_grouped_products(self, rows: Tensor, counts: Tensor) -> Tensor:
        """A product and its gradients are one kernel each for all experts, and the counts stay on the device."""
        ends = counts.cumsum(0)
        row = torch.arange(rows.size(0), device=rows.device)
        # The kernel leaves rows of nobody unwritten, in the backward pass too. Whatever was in that memory is kept out
        # of the results, of the gradient of rows and, by a bias that only these rows use, of the biases' gradients.
        expert = torch.searchsorted(ends, row, right=True)  # n_experts for rows of nobody
        nobody = (expert == self.n_experts).unsqueeze(1)
        offsets = ends.to(torch.int32)

        def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            y = F.grouped_mm(x, weight.to(x.dtype).mT, offs=offsets)
            return y if bias is None else y + F.pad(bias, (0, 0, 0, 1)).to(x.dtype).index_select(0, expert)

        rows = rows.masked_fill(nobody, 0.0)
        up = linear(rows, self.up, self.up_bias)
        if self.gate is None:
            hidden = activate(up, self.activation)
        else:
            hidden = activate(linear(rows, self.gate, self.gate_bias), self.activation) * up
        return linear(hidden, self.down, self.down_bias).masked_fill(nobody, 0.0)


def _batched_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = torch.bmm(x, weight.mT)
    return y if bias is None else y + bias.unsqueeze(1).to(y.dtype)
