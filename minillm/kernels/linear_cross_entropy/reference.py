"""Cross-entropy of a linear layer's logits, in plain torch: a few rows of the logits at a time, made again backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minillm.kernels.cross_entropy.reference import LossTerms, cross_entropy_gradient, cross_entropy_reference

LEAST_CHUNK = 256  # rows: with fewer, each of the products waits for the weight, which it reads whole


def default_chunk_rows(n: int, d_model: int, n_classes: int) -> int:
    """Rows whose logits are about as large as all of ``x``: ``n d_model / n_classes``; 256 at least.

    (The size that Liger chooses, up to its rounding: Hsu et al. 2024, "Liger Kernel", section 3.2.)
    """
    return max(LEAST_CHUNK, n * d_model // n_classes)


def linear_cross_entropy_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, terms: LossTerms, chunk_rows: int
) -> Tensor:
    """Losses (n,), float32 at least, differentiable once in ``x``, ``weight`` and ``bias``."""
    apply: Callable[..., Tensor] = _LinearCrossEntropy.apply
    return apply(x, weight, bias, targets, terms, chunk_rows)


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps one number a row, ``lse``; the backward pass makes the logits again, and from both their gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, terms: LossTerms, chunk_rows: int
    ) -> Tensor:
        wide_weight, wide_bias = _wide(weight), None if bias is None else _wide(bias)
        losses = x.new_empty(len(x), dtype=wide_weight.dtype)
        lse = torch.empty_like(losses)
        for rows in chunks(len(x), chunk_rows):
            logits = _logits(x[rows], wide_weight, wide_bias)
            losses[rows], lse[rows] = cross_entropy_reference(logits, targets[rows], terms)
        ctx.save_for_backward(x, weight, bias, targets, lse)
        ctx.terms, ctx.chunk_rows = terms, chunk_rows
        return losses

    @staticmethod
    def backward(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
        inputs = x, weight, bias, targets, lse = ctx.saved_tensors
        wide_weight, wide_bias = _wide(weight), None if bias is None else _wide(bias)

        def dlogits(rows: slice) -> Tensor:
            logits = _logits(x[rows], wide_weight, wide_bias)
            return cross_entropy_gradient(logits, targets[rows], lse[rows], dlosses[rows], ctx.terms)

        needed = ctx.needs_input_grad[:3]
        with torch.no_grad():
            gradients = [g.to(x.dtype) for g in chunked_gradients(x, wide_weight, dlogits, needed, ctx.chunk_rows)]
        if torch.is_grad_enabled():  # create_graph: the gradients may be used, but not differentiated
            gradients = list(_Once.apply(len(gradients), *gradients, *inputs[:3], dlosses))  # type: ignore[no-untyped-call]
        some = iter(gradients)
        return (*(next(some) if need else None for need in needed), None, None, None)


class _Once(torch.autograd.Function):
    """Gradients that pretend to depend on the inputs, so that a second derivative is refused and not silently zero."""

    @staticmethod
    def forward(ctx: Any, n_gradients: int, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:n_gradients] if tensor is not None)

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> Any:
        raise RuntimeError("linear_cross_entropy is differentiable once: use cross_entropy(x @ weight.T) for more")


def chunks(n: int, chunk_rows: int) -> list[slice]:
    return [slice(start, start + chunk_rows) for start in range(0, n, chunk_rows)]


def chunked_gradients(
    x: Tensor, weight: Tensor, dlogits: Callable[[slice], Tensor], needed: tuple[bool, ...], chunk_rows: int
) -> list[Tensor]:
    """Gradients of ``x``, ``weight`` and the bias, of those that are needed, from those of a few rows of logits.

    The weight's and the bias's are sums over all rows: taken in float32 at least, or the chunks that come
    last would be rounded away. The products are in the dtype of ``weight``, and so must ``dlogits(rows)`` be.

    Returns: ``dlogits @ weight`` as ``x``, ``dlogits^T @ x`` and the sum of ``dlogits``, both float32 at least.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = torch.empty_like(x) if needed[0] else None
    dweight = torch.zeros(weight.shape, dtype=wide, device=x.device) if needed[1] else None
    dbias = torch.zeros(len(weight), dtype=wide, device=x.device) if needed[2] else None
    with torch.autocast(x.device.type, enabled=False):
        for rows in chunks(len(x), chunk_rows):
            gradient = dlogits(rows)
            if dx is not None:
                dx[rows] = gradient @ weight
            if dweight is not None and gradient.dtype == wide:
                dweight.addmm_(gradient.T, x[rows].to(wide))
            elif dweight is not None:
                dweight += gradient.T @ x[rows]
            if dbias is not None:
                dbias += gradient.sum(0, dtype=wide)
    return [gradient for gradient in (dx, dweight, dbias) if gradient is not None]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _logits(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return torch.nn.functional.linear(x.to(weight.dtype), weight, bias)
