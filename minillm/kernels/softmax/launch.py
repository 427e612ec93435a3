"""The custom operators ``minillm::softmax`` and ``minillm::softmax_backward``: memory, grid and gradient."""

from typing import Any

import torch
from torch import Tensor

from minillm.kernels.runtime import as_rows, launch, row_block, wide


@torch.library.custom_op("minillm::softmax", mutates_args=())
def triton_softmax(x: Tensor) -> Tensor:
    from minillm.kernels.softmax import kernel

    rows = as_rows(x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block, warps = row_block(x.size(-1))
    launch(
        kernel.softmax_forward,
        (rows.size(0) if rows.size(1) else 0,),
        rows,
        y,
        rows.stride(0),
        rows.size(1),
        BLOCK=block,
        ONE_BLOCK=rows.size(1) <= block,
        WIDE=wide(x.dtype),
        num_warps=warps,
    )
    return y


@torch.library.custom_op("minillm::softmax_backward", mutates_args=())
def triton_softmax_backward(dy: Tensor, y: Tensor) -> Tensor:
    from minillm.kernels.softmax import kernel

    rows, y = as_rows(dy), y.contiguous()
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    block, warps = row_block(y.size(-1))
    launch(
        kernel.softmax_backward,
        (rows.size(0) if rows.size(1) else 0,),
        rows,
        y,
        dx,
        rows.stride(0),
        rows.size(1),
        BLOCK=block,
        ONE_BLOCK=rows.size(1) <= block,
        WIDE=wide(y.dtype),
        num_warps=warps,
    )
    return dx


@triton_softmax.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@triton_softmax_backward.register_fake
def _(dy: Tensor, y: Tensor) -> Tensor:
    return torch.empty(y.shape, dtype=y.dtype, device=y.device)


def _setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _backward(ctx: Any, dy: Tensor) -> Tensor:
    (y,) = ctx.saved_tensors
    dx: Tensor = triton_softmax_backward(dy, y)
    return dx


triton_softmax.register_autograd(_backward, setup_context=_setup_context)
