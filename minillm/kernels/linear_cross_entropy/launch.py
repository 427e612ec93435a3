"""The custom operators ``minillm::linear_cross_entropy`` and its ``_backward``: memory, grids and gradients.

Forward, logits exist as tiles in registers. Backward, a kernel makes them again and writes their gradient to memory,
``chunk_rows`` rows at a time; the two products with it are torch's.
"""

from typing import Any

import torch
from torch import Tensor

from minillm.kernels.cross_entropy.reference import LossTerms
from minillm.kernels.linear_cross_entropy.reference import chunked_gradients
from minillm.kernels.runtime import as_rows, launch, upcast
from minillm.kernels.tile_sizes import PROGRAMS, TileSizes, tile_sizes

WAVES = 4  # programs a multiprocessor gets forward, one after the other: the last ones to end then matter less
MOST_COLUMNS = 128  # of a tile: its exponentials are taken in registers, and those of a wider one do not fit


def logits_tile(n_rows: int, n_classes: int, dtype: torch.dtype, device: torch.device) -> TileSizes:
    tile = tile_sizes(n_rows, n_classes, dtype, device)
    return tile._replace(block_n=min(tile.block_n, MOST_COLUMNS))


@torch.library.custom_op("minillm::linear_cross_entropy", mutates_args=())
def triton_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_softcap: float,
    chunk_rows: int,
) -> tuple[Tensor, Tensor]:
    """Losses (n,) and their lse (n,), float32. ``logit_softcap``: 0 for none; ``chunk_rows`` is for the backward."""
    from minillm.kernels.linear_cross_entropy import kernel

    x, weight = as_rows(x), as_rows(weight)
    n, d_model = x.shape
    n_classes = len(weight)
    tile = logits_tile(n, n_classes, x.dtype, x.device)
    row_tiles, class_tiles = -(-n // tile.block_m), -(-n_classes // tile.block_n)
    n_splits = max(1, min(class_tiles, WAVES * PROGRAMS // max(1, row_tiles)))
    n_splits = -(-class_tiles // -(-class_tiles // n_splits))  # no part without classes
    lse, picked, sums = torch.empty(3, n_splits, n, dtype=torch.float32, device=x.device)
    launch(
        kernel.linear_lse,
        (row_tiles * n_splits,),
        x,
        weight,
        weight if bias is None else bias.contiguous(),
        targets,
        lse,
        picked,
        sums,
        n,
        n_classes,
        d_model,
        x.stride(0),
        weight.stride(0),
        targets.stride(0),
        n_splits,
        SUM=label_smoothing != 0.0,
        HAS_BIAS=bias is not None,
        SOFTCAP=logit_softcap,
        EVEN_K=d_model % tile.block_k == 0,
        UPCAST=upcast(x.dtype),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        **tile.launch_options(),
    )
    whole_lse = lse.logsumexp(0)
    terms = LossTerms(ignore_index, label_smoothing, z_loss)
    mean = sums.sum(0) / n_classes if label_smoothing else None
    return terms.losses(whole_lse, picked.sum(0), mean, targets, n_classes), whole_lse


@torch.library.custom_op("minillm::linear_cross_entropy_backward", mutates_args=())
def triton_linear_cross_entropy_backward(
    dlosses: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_softcap: float,
    chunk_rows: int,
    needed: list[bool],
) -> list[Tensor]:
    """Gradients of x, weight and bias, of those that are ``needed``."""
    from minillm.kernels.linear_cross_entropy import kernel

    x, weight = as_rows(x), as_rows(weight)
    n_classes, d_model = weight.shape
    buffer = torch.empty(min(chunk_rows, len(x)), n_classes, dtype=x.dtype, device=x.device)

    def dlogits(rows: slice) -> Tensor:
        some = x[rows]
        gradient = buffer[: len(some)]
        tile = logits_tile(len(some), n_classes, x.dtype, x.device)
        launch(
            kernel.linear_dlogits,
            (tile.programs(len(some), n_classes),),
            dlosses[rows],
            some,
            weight,
            weight if bias is None else bias.contiguous(),
            targets[rows],
            lse[rows],
            gradient,
            len(some),
            n_classes,
            d_model,
            dlosses.stride(0),
            x.stride(0),
            weight.stride(0),
            targets.stride(0),
            ignore_index,
            LABEL_SMOOTHING=label_smoothing,
            Z_LOSS=z_loss,
            HAS_BIAS=bias is not None,
            SOFTCAP=logit_softcap,
            EVEN_K=d_model % tile.block_k == 0,
            UPCAST=upcast(x.dtype),
            **tile.blocks(),
            **tile.launch_options(),
        )
        return gradient

    return [gradient.to(x.dtype) for gradient in chunked_gradients(x, weight, dlogits, tuple(needed), chunk_rows)]


@triton_linear_cross_entropy.register_fake
def _(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    losses = torch.empty(x.size(0), dtype=torch.float32, device=x.device)
    return losses, torch.empty_like(losses)


@triton_linear_cross_entropy_backward.register_fake
def _(dlosses: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> list[Tensor]:
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return [x.new_empty(shape) for shape, need in zip(shapes, rest[-1], strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, targets, *ctx.settings = inputs
    _, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(x, weight, bias, targets, lse)


def _backward(ctx: Any, dlosses: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:3])
    gradients = iter(triton_linear_cross_entropy_backward(dlosses, *ctx.saved_tensors, *ctx.settings, needed))
    return (*(next(gradients) if need else None for need in needed), *[None] * 6)


triton_linear_cross_entropy.register_autograd(_backward, setup_context=_setup_context)
