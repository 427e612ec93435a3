"""The custom operators ``minillm::cross_entropy`` and ``minillm::cross_entropy_backward``: memory, grids, gradient."""

from typing import Any

import torch
from torch import Tensor

from minillm.kernels.runtime import as_rows, launch, row_block, wide

LARGEST_BLOCK = 4096  # columns a program holds at a time: enough bytes on their way, few enough registers


@torch.library.custom_op("minillm::cross_entropy", mutates_args=())
def triton_cross_entropy(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, logit_softcap: float
) -> tuple[Tensor, Tensor]:
    """Losses (n,) and their lse (n,), of no meaning where a target is ignored. ``logit_softcap``: 0 for none."""
    from minillm.kernels.cross_entropy import kernel

    rows = as_rows(logits)
    n_rows, n_classes = rows.shape
    losses, lse = _empty_rows(logits)
    block, warps = row_block(n_classes, LARGEST_BLOCK)
    launch(
        kernel.cross_entropy_forward,
        (n_rows,),
        rows,
        targets,
        losses,
        lse,
        rows.stride(0),
        targets.stride(0),
        n_classes,
        ignore_index,
        BLOCK=block,
        LABEL_SMOOTHING=label_smoothing,
        Z_LOSS=z_loss,
        SOFTCAP=logit_softcap,
        WIDE=wide(logits.dtype),
        num_warps=warps,
    )
    return losses, lse


@torch.library.custom_op("minillm::cross_entropy_backward", mutates_args=())
def triton_cross_entropy_backward(
    dlosses: Tensor,
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_softcap: float,
) -> Tensor:
    """Gradient (n, n_classes) of the logits, in a tensor of its own."""
    from minillm.kernels.cross_entropy import kernel

    rows = as_rows(logits)
    n_rows, n_classes = rows.shape
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    block, warps = row_block(n_classes, LARGEST_BLOCK)
    launch(
        kernel.cross_entropy_backward,
        (n_rows, -(-n_classes // block)),
        dlosses,
        rows,
        targets,
        lse,
        dlogits,
        dlosses.stride(0),
        rows.stride(0),
        targets.stride(0),
        n_classes,
        ignore_index,
        BLOCK=block,
        LABEL_SMOOTHING=label_smoothing,
        Z_LOSS=z_loss,
        SOFTCAP=logit_softcap,
        WIDE=wide(logits.dtype),
        num_warps=warps,
    )
    return dlogits


def _empty_rows(logits: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = torch.empty(logits.size(0), dtype=dtype, device=logits.device)
    return losses, torch.empty_like(losses)


@triton_cross_entropy.register_fake
def _(
    logits: Tensor, targets: Tensor, ignore_index: int, label_smoothing: float, z_loss: float, logit_softcap: float
) -> tuple[Tensor, Tensor]:
    return _empty_rows(logits)


@triton_cross_entropy_backward.register_fake
def _(dlosses: Tensor, logits: Tensor, *_: Any) -> Tensor:
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, targets, *ctx.terms = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(logits, targets, lse)


def _backward(ctx: Any, dlosses: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    return triton_cross_entropy_backward(dlosses, *ctx.saved_tensors, *ctx.terms), None, None, None, None, None


triton_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
