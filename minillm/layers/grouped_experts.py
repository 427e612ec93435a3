"""The experts' feed-forward networks over rows sorted by expert, as one operation of autograd.

Of autograd's own pieces, ``cat([expert(rows_e, weight[e]) ...])``, each ``weight[e]`` makes a gradient of the size of
the whole stack, mostly zeros, and all of these are added up: work that grows with the square of the number of experts.
Here each expert's gradient is written into its slice of one buffer. And one expert is done from its first matrix to its
last before the next is begun, so that its rows stay in the processor's cache.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from minillm.layers.gradient_buffers import GradientBuffers


class Weights(NamedTuple):
    """The stacks of :class:`minillm.layers.Experts`, or one expert's slices of them; None for what it does not have."""

    gate: Tensor | None
    up: Tensor
    down: Tensor
    gate_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None


def one_expert(x: Tensor, weights: Weights, activation: str) -> Tensor:
    """The plain version for one expert: (..., d_model) to (..., d_model), with its slices of the stacks."""
    up = F.linear(x, weights.up, weights.up_bias)
    if weights.gate is None:
        hidden = activate(up, activation)
    else:
        hidden = activate(F.linear(x, weights.gate, weights.gate_bias), activation) * up
    return F.linear(hidden, weights.down, weights.down_bias)


def plain_grouped_experts(rows: Tensor, weights: Weights, counts: list[int], activation: str) -> Tensor:
    """The plain version: a loop over the experts, of operations that autograd knows."""
    *groups, beyond = _groups(rows, counts)
    out = [one_expert(x, own, activation) for x, own in zip(groups, _by_expert(weights), strict=True)]
    return torch.cat([*out, torch.zeros_like(beyond, dtype=out[0].dtype)])


def grouped_experts(
    rows: Tensor, weights: Weights, counts: list[int], activation: str, buffers: GradientBuffers
) -> Tensor:
    """Each group of ``rows`` (n_rows, d_model) through its own expert: what :func:`plain_grouped_experts` gives.

    The products run in the type of the rows, in which the result comes too; the weights are brought to it one expert at
    a time. For the backward pass the rows and the numbers before the activation are kept, nothing else. It can be
    differentiated again and again; torch refuses forward-mode differentiation and vmap over it. ``buffers`` gives
    memory for the weights' gradients.
    """
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (rows, *weights)):
        out: Tensor = _GroupedExperts.apply(rows, counts, activation, buffers, *weights)[0]  # type: ignore[no-untyped-call]
        return out
    return _forward(rows, weights, counts, activation, keep=False)[0]


def activate(x: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        return F.silu(x)
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activate_backward(gradient: Tensor, x: Tensor, activation: str) -> Tensor:
    aten = torch.ops.aten
    if activation == "swiglu" and torch.is_grad_enabled():  # the operator has no derivative
        sigmoid = x.sigmoid()
        result = gradient * sigmoid * (1 + x * (1 - sigmoid))
    elif activation == "swiglu":
        result = aten.silu_backward(gradient, x)
    elif activation == "relu":
        result = aten.threshold_backward(gradient, x, 0)
    else:
        result = aten.gelu_backward(gradient, x, approximate="tanh" if activation == "gelu_tanh" else "none")
    assert isinstance(result, Tensor)
    return result


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        rows: Tensor, counts: list[int], activation: str, buffers: GradientBuffers, *weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        return _forward(rows, Weights(*weights), counts, activation, keep=True)  # type: ignore[arg-type]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None, Tensor]) -> None:
        rows, ctx.counts, ctx.activation, ctx.buffers, *weights = inputs
        gate, up = output[1:]
        ctx.mark_non_differentiable(*(kept for kept in (gate, up) if kept is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, gate, up, *weights)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, gate, up, *stacks = ctx.saved_tensors
        weights, wanted = Weights(*stacks), (ctx.needs_input_grad[0], *ctx.needs_input_grad[4:])
        if d_outputs[0] is None:
            return (None,) * len(ctx.needs_input_grad)
        with torch.autocast(rows.device.type, enabled=False):
            if torch.is_grad_enabled():  # this gradient will be differentiated: operations that autograd knows
                d = _differentiable_backward(d_outputs[0], rows, weights, wanted, ctx.counts, ctx.activation)
            else:
                d = _backward(d_outputs[0], rows, gate, up, weights, wanted, ctx.counts, ctx.activation, ctx.buffers)
        return d[0], None, None, None, *d[1:]


def _forward(
    rows: Tensor, weights: Weights, counts: list[int], activation: str, *, keep: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The outputs, and what stands before the activation, to keep or to forget: gate (None without one) and up."""
    out = torch.empty_like(rows)
    out[sum(counts) :].zero_()
    room = (rows.size(0) if keep else max(counts), weights.up.size(1))
    gates = None if weights.gate is None else rows.new_empty(room)
    ups = rows.new_empty(room)
    groups = zip(counts, _by_expert(weights), _groups(rows, counts), _groups(out, counts), strict=False)
    start = 0
    for count, weight, x, y in groups:
        if count == 0:
            continue
        kept = slice(start, start + count) if keep else slice(count)
        start += count
        weight = _in_type(weight, rows.dtype)
        up = _linear(x, weight.up, weight.up_bias, out=ups[kept])
        if gates is None or weight.gate is None:
            hidden = activate(up, activation)
        else:
            gate = _linear(x, weight.gate, weight.gate_bias, out=gates[kept])
            hidden = activate(gate, activation).mul_(up)
        _linear(hidden, weight.down, weight.down_bias, out=y)
    return out, gates, ups


def _backward(
    d_out: Tensor,
    rows: Tensor,
    gates: Tensor | None,
    ups: Tensor,
    weights: Weights,
    wanted: tuple[bool, ...],
    counts: list[int],
    activation: str,
    buffers: GradientBuffers,
) -> tuple[Tensor | None, ...]:
    """The gradients of (rows, *weights), None for those that are not wanted."""
    d_rows = torch.empty_like(rows) if wanted[0] else None
    d_stacks = [
        buffers.empty_like(number, stack) if want and stack is not None else None
        for number, (stack, want) in enumerate(zip(weights, wanted[1:], strict=True))
    ]
    d_gates, d_ups, d_downs, d_gate_biases, d_up_biases, d_down_biases = d_stacks
    if d_rows is not None:
        d_rows[sum(counts) :].zero_()
    below_down = any(d is not None for d in (d_rows, d_gates, d_ups, d_gate_biases, d_up_biases))
    groups = zip(counts, _by_expert(weights), *(_groups(tensor, counts) for tensor in (rows, ups, d_out)), strict=False)
    start = 0
    for expert, (count, weight, x, up, d_own) in enumerate(groups):
        if count == 0:
            for d_stack in d_stacks:
                if d_stack is not None:
                    d_stack[expert].zero_()
            continue
        own = slice(start, start + count)
        start += count
        weight = _in_type(weight, rows.dtype)
        gate = None if gates is None else gates[own]
        activated = activate(up if gate is None else gate, activation)
        _add_up(d_downs, d_down_biases, expert, d_own, activated if gate is None else activated * up)
        if not below_down:
            continue
        d_hidden = torch.mm(d_own, weight.down)
        if gate is None:
            d_up = _activate_backward(d_hidden, up, activation)
        else:
            d_gate = _activate_backward(d_hidden * up, gate, activation)
            d_up = d_hidden.mul_(activated)
            _add_up(d_gates, d_gate_biases, expert, d_gate, x)
        _add_up(d_ups, d_up_biases, expert, d_up, x)
        if d_rows is not None:
            torch.mm(d_up, weight.up, out=d_rows[own])
            if gate is not None and weight.gate is not None:
                d_rows[own].addmm_(d_gate, weight.gate)
    return (d_rows, *d_stacks)


def _differentiable_backward(
    d_out: Tensor, rows: Tensor, weights: Weights, wanted: tuple[bool, ...], counts: list[int], activation: str
) -> tuple[Tensor | None, ...]:
    """The same gradients by operations that autograd knows, nothing written in place and nothing kept."""
    *groups, beyond = _groups(rows, counts)
    d_groups = _groups(d_out, counts)[:-1]
    found = []
    for x, d_own, weight in zip(groups, d_groups, _by_expert(_in_type(weights, rows.dtype)), strict=True):
        up, d_hidden = F.linear(x, weight.up, weight.up_bias), d_own @ weight.down
        if weight.gate is None:
            d_gate, hidden, d_up = None, activate(up, activation), _activate_backward(d_hidden, up, activation)
            d_x = d_up @ weight.up
        else:
            gate = F.linear(x, weight.gate, weight.gate_bias)
            activated = activate(gate, activation)
            d_gate, d_up = _activate_backward(d_hidden * up, gate, activation), d_hidden * activated
            hidden = activated * up
            d_x = d_up @ weight.up + d_gate @ weight.gate
        matrices = (None if d_gate is None else d_gate.t() @ x, d_up.t() @ x, d_own.t() @ hidden)
        found.append((d_x, *matrices, *(None if d is None else d.sum(dim=0) for d in (d_gate, d_up, d_own))))
    d_rows, *d_stacks = zip(*found, strict=True)
    result = [torch.cat([*d_rows, torch.zeros_like(beyond)]) if wanted[0] else None]
    for d_stack, stack, want in zip(d_stacks, weights, wanted[1:], strict=True):
        result.append(torch.stack(d_stack).to(stack.dtype) if want and stack is not None else None)
    return tuple(result)


def _groups(tensor: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    """Each expert's rows, and last those of nobody."""
    return torch.split_with_sizes(tensor, [*counts, tensor.size(0) - sum(counts)])


def _by_expert(weights: Weights) -> list[Weights]:
    n_experts = weights.up.size(0)
    stacks = ((None,) * n_experts if stack is None else stack.unbind(0) for stack in weights)
    return [Weights(*own) for own in zip(*stacks, strict=True)]


def _in_type(weights: Weights, dtype: torch.dtype) -> Weights:
    return Weights(*(None if weight is None else weight.to(dtype) for weight in weights))  # type: ignore[arg-type]


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> Tensor:
    return torch.mm(x, weight.t(), out=out) if bias is None else torch.addmm(bias, x, weight.t(), out=out)


def _add_up(d_weights: Tensor | None, d_biases: Tensor | None, expert: int, d_y: Tensor, x: Tensor) -> None:
    """The gradients of ``y = x weight^T + bias`` into the expert's place, where they are wanted."""
    if d_weights is not None and d_weights.dtype == x.dtype:
        torch.mm(d_y.t(), x, out=d_weights[expert])
    elif d_weights is not None:
        d_weights[expert].copy_(torch.mm(d_y.t(), x))
    if d_biases is not None:
        d_biases[expert].copy_(d_y.sum(dim=0))
