"""The operators ``minillm::grouped_matmul`` and ``minillm::grouped_outer_products``, each the other's gradient."""

from typing import Any

import torch
from torch import Tensor

from minillm.kernels.runtime import launch, upcast
from minillm.kernels.tile_sizes import tile_sizes


@torch.library.custom_op("minillm::grouped_matmul", mutates_args=())
def triton_grouped_matmul(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    """out[rows of group e] = rows_e weights[e]^T; zeros in rows of nobody."""
    from minillm.kernels.grouped_matmul import kernel

    n_rows, (n_groups, d_out, d_in) = rows.size(0), weights.shape
    out = rows.new_empty(n_rows, d_out)
    tile = tile_sizes(n_rows, d_out, rows.dtype, rows.device)
    row_tiles = -(-n_rows // tile.block_m) + n_groups if n_rows else 0
    launch(
        kernel.grouped_matmul_forward,
        (row_tiles * -(-d_out // tile.block_n),),
        rows,
        weights,
        counts.contiguous(),
        out,
        n_rows,
        n_groups,
        d_out,
        d_in,
        *rows.stride(),
        *weights.stride(),
        EVEN_K=d_in % tile.block_k == 0,
        UPCAST=upcast(rows.dtype),
        INPUT_PRECISION="ieee",
        GROUPS=_power_of_two_above(n_groups),
        **tile.blocks(),
        **tile.launch_options(),
    )
    return out


@torch.library.custom_op("minillm::grouped_outer_products", mutates_args=())
def triton_grouped_outer_products(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """(n_groups, left's width, right's width): left_e^T right_e; zeros for a group without rows."""
    from minillm.kernels.grouped_matmul import kernel

    n_groups, width = counts.size(0), (left.size(1), right.size(1))
    products = left.new_empty(n_groups, *width)
    tile = tile_sizes(n_groups * width[0], width[1], left.dtype, left.device)
    launch(
        kernel.grouped_outer_products,
        (n_groups * tile.programs(*width),),
        left,
        right,
        counts.contiguous(),
        products,
        left.size(0),
        n_groups,
        *width,
        *left.stride(),
        *right.stride(),
        UPCAST=upcast(left.dtype),
        INPUT_PRECISION="ieee",
        GROUPS=_power_of_two_above(n_groups),
        **tile.blocks(),
        **tile.launch_options(),
    )
    return products


@triton_grouped_matmul.register_fake
def _(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    return rows.new_empty(rows.size(0), weights.size(1))


@triton_grouped_outer_products.register_fake
def _(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    return left.new_empty(counts.size(0), left.size(1), right.size(1))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
    rows, weights, counts = ctx.saved_tensors
    d_rows = triton_grouped_matmul(d_out, weights.mT, counts) if ctx.needs_input_grad[0] else None
    d_weights = triton_grouped_outer_products(d_out, rows, counts) if ctx.needs_input_grad[1] else None
    return d_rows, d_weights, None


def _outer_backward(ctx: Any, d_products: Tensor) -> tuple[Tensor | None, ...]:
    left, right, counts = ctx.saved_tensors
    d_left = triton_grouped_matmul(right, d_products, counts) if ctx.needs_input_grad[0] else None
    d_right = triton_grouped_matmul(left, d_products.mT, counts) if ctx.needs_input_grad[1] else None
    return d_left, d_right, None


def _power_of_two_above(n: int) -> int:
    return 1 << n.bit_length()


triton_grouped_matmul.register_autograd(_backward, setup_context=_setup_context)
triton_grouped_outer_products.register_autograd(_outer_backward, setup_context=_setup_context)
