"""The custom operators ``minillm::layer_norm`` and ``minillm::layer_norm_backward``: memory, grid and gradient."""

from typing import Any

import torch
from torch import Tensor

from minillm.kernels.rows import row_tile, statistics_dtype, walkers
from minillm.kernels.runtime import as_rows, launch, wide


@torch.library.custom_op("minillm::layer_norm", mutates_args=())
def triton_layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normed rows, and the mean and one over the standard deviation of each."""
    from minillm.kernels.layer_norm import kernel

    rows = as_rows(x)
    n_rows, n_columns = rows.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:-1], dtype=statistics_dtype(x), device=x.device) for _ in range(2))
    tile = row_tile(n_columns)
    launch(
        kernel.layer_norm_forward,
        (-(-n_rows // tile.rows),),
        rows,
        weight.contiguous(),
        None if bias is None else bias.contiguous(),
        y,
        mean,
        rstd,
        rows.stride(0),
        n_rows,
        n_columns,
        EPS=eps,
        SHIFT=bias is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        ONE_BLOCK=n_columns <= tile.columns,
        WIDE=wide(x.dtype),
        num_warps=tile.warps,
    )
    return y, mean, rstd


@torch.library.custom_op("minillm::layer_norm_backward", mutates_args=())
def triton_layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, shift: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of ``x``, of the weight and, if there was a ``shift``, of the bias; (0,) if not."""
    from minillm.kernels.layer_norm import kernel

    dy_rows, x_rows, weight = as_rows(dy), as_rows(x), weight.contiguous()
    n_rows, n_columns = x_rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = row_tile(n_columns, largest=8192)
    one_block = n_columns <= tile.columns
    programs = walkers(-(-n_rows // tile.rows), x.device)
    dweight = torch.empty(programs, n_columns, dtype=rstd.dtype, device=x.device)
    dbias = torch.empty_like(dweight) if shift else None
    means = None
    if not one_block:
        means = torch.empty(2, n_rows, dtype=rstd.dtype, device=x.device)
        launch(
            kernel.layer_norm_row_means,
            (n_rows,),
            dy_rows,
            x_rows,
            weight,
            mean,
            rstd,
            means,
            dy_rows.stride(0),
            x_rows.stride(0),
            n_rows,
            n_columns,
            COLUMNS=tile.columns,
            WIDE=wide(x.dtype),
            num_warps=tile.warps,
        )
    launch(
        kernel.layer_norm_backward,
        (programs, -(-n_columns // tile.columns)),
        dy_rows,
        x_rows,
        weight,
        mean,
        rstd,
        means,
        dx,
        dweight,
        dbias,
        dy_rows.stride(0),
        x_rows.stride(0),
        n_rows,
        n_columns,
        SHIFT=shift,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        ONE_BLOCK=one_block,
        WIDE=wide(x.dtype),
        num_warps=tile.warps,
    )
    # Summed in the same order every time, which atomic additions are not.
    return dx, dweight.sum(0).to(weight.dtype), weight.new_empty(0) if dbias is None else dbias.sum(0)


@triton_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (torch.empty(x.shape[:-1], dtype=statistics_dtype(x), device=x.device) for _ in range(2))
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), mean, rstd


@triton_layer_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor, shift: bool) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    return dx, dweight, weight.new_empty(0) if not shift else rstd.new_empty(weight.shape)


def _setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, float], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight, *output[1:])
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
    dx, dweight, dbias = triton_layer_norm_backward(dy, *ctx.saved_tensors, ctx.bias_dtype is not None)
    return dx, dweight, None if ctx.bias_dtype is None else dbias.to(ctx.bias_dtype), None


triton_layer_norm.register_autograd(_backward, setup_context=_setup_context)
