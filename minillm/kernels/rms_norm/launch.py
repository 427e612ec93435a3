"""The custom operators ``minillm::rms_norm``, ``minillm::add_rms_norm`` and ``minillm::rms_norm_backward``."""

from typing import Any

import torch
from torch import Tensor

from minillm.kernels.rows import row_tile, statistics_dtype, walkers
from minillm.kernels.runtime import as_rows, launch, wide


def _forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    from minillm.kernels.rms_norm import kernel

    rows, residual_rows = as_rows(x), None if residual is None else as_rows(residual)
    n_rows, n_columns = rows.shape
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    summed = None if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=statistics_dtype(x), device=x.device)
    tile = row_tile(n_columns)
    launch(
        kernel.rms_norm_forward,
        (-(-n_rows // tile.rows),),
        rows,
        residual_rows,
        weight.contiguous(),
        y,
        summed,
        rstd,
        rows.stride(0),
        0 if residual_rows is None else residual_rows.stride(0),
        n_rows,
        n_columns,
        EPS=eps,
        ADD=residual is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        ONE_BLOCK=n_columns <= tile.columns,
        WIDE=wide(x.dtype),
        num_warps=tile.warps,
    )
    return y, summed, rstd


@torch.library.custom_op("minillm::rms_norm", mutates_args=())
def triton_rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normed rows, and one over the root of the mean square of each."""
    y, _, rstd = _forward(x, None, weight, eps)
    return y, rstd


@torch.library.custom_op("minillm::add_rms_norm", mutates_args=())
def triton_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The normed rows of ``x + residual``, the sum itself, and one over the root of the mean square of each row."""
    y, summed, rstd = _forward(x, residual, weight, eps)
    assert summed is not None
    return y, summed, rstd


@torch.library.custom_op("minillm::rms_norm_backward", mutates_args=())
def triton_rms_norm_backward(
    dy: Tensor, dsummed: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of ``x`` and of the weight; ``dsummed`` is added to the former."""
    from minillm.kernels.rms_norm import kernel

    dy_rows, x_rows, weight = as_rows(dy), as_rows(x), weight.contiguous()
    dsummed_rows = None if dsummed is None else as_rows(dsummed)
    n_rows, n_columns = x_rows.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = row_tile(n_columns, largest=8192)
    one_block = n_columns <= tile.columns
    programs = walkers(-(-n_rows // tile.rows), x.device)
    partial = torch.empty(programs, n_columns, dtype=rstd.dtype, device=x.device)
    products = None
    if not one_block:
        products = torch.empty_like(rstd)
        launch(
            kernel.rms_norm_row_products,
            (n_rows,),
            dy_rows,
            x_rows,
            weight,
            rstd,
            products,
            dy_rows.stride(0),
            x_rows.stride(0),
            n_columns,
            COLUMNS=tile.columns,
            WIDE=wide(x.dtype),
            num_warps=tile.warps,
        )
    launch(
        kernel.rms_norm_backward,
        (programs, -(-n_columns // tile.columns)),
        dy_rows,
        dsummed_rows,
        x_rows,
        weight,
        rstd,
        products,
        dx,
        partial,
        dy_rows.stride(0),
        0 if dsummed_rows is None else dsummed_rows.stride(0),
        x_rows.stride(0),
        n_rows,
        n_columns,
        ADD=dsummed is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        ONE_BLOCK=one_block,
        WIDE=wide(x.dtype),
        num_warps=tile.warps,
    )
    return dx, partial.sum(0).to(weight.dtype)  # in the same order every time, which atomic additions are not


@triton_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    return y, torch.empty(x.shape[:-1], dtype=statistics_dtype(x), device=x.device)


@triton_add_rms_norm.register_fake
def _(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=statistics_dtype(x), device=x.device)
    return y, torch.empty(x.shape, dtype=x.dtype, device=x.device), rstd


@triton_rms_norm_backward.register_fake
def _(dy: Tensor, dsummed: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, torch.empty(weight.shape, dtype=weight.dtype, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
    dx, dweight = triton_rms_norm_backward(dy, None, *ctx.saved_tensors)
    return dx, dweight, None


def _add_setup_context(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor, Tensor]
) -> None:
    _, summed, rstd = output
    ctx.save_for_backward(summed, inputs[2], rstd)  # the sum stands for its two parts, which nothing else keeps


def _add_backward(ctx: Any, dy: Tensor, dsummed: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    dx, dweight = triton_rms_norm_backward(dy, dsummed, *ctx.saved_tensors)
    return dx, dx, dweight, None


triton_rms_norm.register_autograd(_backward, setup_context=_setup_context)
triton_add_rms_norm.register_autograd(_add_backward, setup_context=_add_setup_context)
