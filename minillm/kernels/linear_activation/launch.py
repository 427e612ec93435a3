"""The custom operators ``minillm::linear_activation`` and ``minillm::activation_backward``: memory, grid, gradient."""

import math
from typing import Any

import torch
from torch import Tensor

from minillm.kernels import runtime
from minillm.kernels.runtime import launch, upcast
from minillm.kernels.tile_sizes import tile_sizes


@torch.library.custom_op("minillm::linear_activation", mutates_args=())
def triton_linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep_before: bool
) -> tuple[Tensor, Tensor]:
    """The result, and with ``keep_before`` x weight^T + bias, which the gradient of smooth activations needs."""
    from minillm.kernels.linear_activation import kernel

    rows = _rows(x)
    d_out, d_in = weight.shape
    out = x.new_empty(*x.shape[:-1], d_out)
    before = torch.empty_like(out) if keep_before else x.new_empty(0)
    tile = tile_sizes(rows.size(0), d_out, x.dtype, x.device)
    launch(
        kernel.linear_activation_forward,
        (tile.programs(rows.size(0), d_out),),
        rows,
        weight,
        weight if bias is None else bias,
        out,
        before,
        rows.size(0),
        d_out,
        d_in,
        *rows.stride(),
        *weight.stride(),
        0 if bias is None else bias.stride(0),
        ACTIVATION=activation,
        HAS_BIAS=bias is not None,
        KEEP_BEFORE=keep_before,
        EVEN_K=d_in % tile.block_k == 0,
        UPCAST=upcast(x.dtype),
        INPUT_PRECISION="ieee",
        **tile.blocks(),
        **tile.launch_options(),
    )
    return out, before


@torch.library.custom_op("minillm::activation_backward", mutates_args=())
def triton_activation_backward(
    d_out: Tensor, kept: Tensor, activation: str, sum_for_bias: bool
) -> tuple[Tensor, Tensor]:
    """d_out * act'(before), (n_rows, width), and with ``sum_for_bias`` its sum over the rows."""
    from minillm.kernels.linear_activation import kernel

    n_rows, width = d_out.shape
    block_m, block_n = (16, 128) if runtime.compute_capability(d_out.device) else (32, 32)
    column_programs = -(-width // block_n)
    # About a thousand programs, each with as many rows as that leaves it; one line of sums for each of them.
    row_programs = max(1, min(-(-n_rows // block_m), 1024 // max(column_programs, 1)))
    rows_per_program = -(-n_rows // (row_programs * block_m)) * block_m
    d_before = d_out.new_empty(n_rows, width)
    partial = d_out.new_zeros(row_programs if sum_for_bias else 0, width, dtype=torch.float32)
    launch(
        kernel.activation_backward,
        (row_programs if n_rows else 0, column_programs),
        d_out,
        kept,
        d_before,
        partial,
        n_rows,
        width,
        rows_per_program,
        *d_out.stride(),
        ACTIVATION=activation,
        HAS_BIAS=sum_for_bias,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )
    return d_before, partial.sum(dim=0).to(d_out.dtype) if sum_for_bias else d_out.new_empty(0)


@triton_linear_activation.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, keep_before: bool
) -> tuple[Tensor, Tensor]:
    out = x.new_empty(*x.shape[:-1], weight.size(0))
    return out, torch.empty_like(out) if keep_before else x.new_empty(0)


@triton_activation_backward.register_fake
def _(d_out: Tensor, kept: Tensor, activation: str, sum_for_bias: bool) -> tuple[Tensor, Tensor]:
    return d_out.new_empty(d_out.shape), d_out.new_empty(d_out.size(1) if sum_for_bias else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, activation, _ = inputs
    out, before = output
    ctx.activation = activation
    ctx.set_materialize_grads(False)
    # ReLU's slope can be read off its output, which the next layer keeps anyway.
    kept = None if activation is None else out if activation == "relu" else before
    ctx.save_for_backward(x, weight, kept)


def _backward(ctx: Any, d_out: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if d_out is None:
        return (None,) * 5
    x, weight, kept = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
    d_rows = _rows(d_out)
    d_bias = None
    if kept is not None:
        d_rows, d_bias = triton_activation_backward(d_rows, _rows(kept), ctx.activation, wants_bias)
    elif wants_bias:
        d_bias = d_rows.sum(dim=0)
    d_x = (d_rows @ weight).view(x.shape) if wants_x else None
    d_weight = d_rows.mT @ _rows(x) if wants_weight else None
    return d_x, d_weight, d_bias if wants_bias else None, None, None


def _rows(x: Tensor) -> Tensor:
    """(..., n) as (n_rows, n): a view where the strides allow it."""
    return x.reshape(math.prod(x.shape[:-1]), x.size(-1))


triton_linear_activation.register_autograd(_backward, setup_context=_setup_context)
