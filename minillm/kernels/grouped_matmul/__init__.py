"""One product for all experts of a mixture: rows in groups, a matrix for each group, one launch whatever the sizes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from minillm.kernels.autocast import autocast_dtype
from minillm.kernels.grouped_matmul.launch import triton_grouped_matmul
from minillm.kernels.grouped_matmul.reference import grouped_matmul_reference
from minillm.kernels.runtime import Backend, choose_backend

__all__ = ["grouped_matmul"]


def grouped_matmul(rows: Tensor, weights: Tensor, counts: Tensor, *, backend: Backend = "auto") -> Tensor:
    """``out[rows of group e] = rows_e weights[e]^T``: the products of a mixture's experts without padding or capacity.

    Tokens sorted by expert make groups of any sizes; a loop over the experts would have to know these on the host and
    would launch a kernel for each. Here the programs of one launch find their group from the running sum of the counts
    (Gale et al. 2023, "MegaBlocks", section 5, do the same by block-sparse products). The gradients are two more
    launches: for the rows the same kernel with the matrices transposed, for the matrices d_out_e^T rows_e.

    Args:
        rows: (n_rows, d_in), floating point, any strides: counts[0] rows of group 0, then counts[1] of group 1, ...
        weights: (n_groups, d_out, d_in), the layout of :class:`minillm.layers.Experts`; any strides.
        counts: int64 (n_groups,), on the device of the rows; at least 0 and at most n_rows in all. Groups may be empty.
            Rows after the last group belong to nobody and give zeros. On a GPU the numbers are not looked at by the
            host, which would have to wait for them; whatever they are, nothing outside of the tensors is touched.
        backend: "triton": the kernels; not for float64. "torch": ``F.grouped_mm``; not for float64, and only for rows
            of whole 16 bytes in every tensor. "reference": a loop over the groups. See
            :func:`minillm.kernels.choose_backend`.

    Returns: (n_rows, d_out) in the type of the rows, added up in float32 (float64 for float64); under autocast rows and
    weights are brought to its type first. Raises ValueError for shapes that do not fit and, on a CPU, for counts that
    cannot be; TypeError for types that differ or are not floating point.
    """
    if weights.dim() != 3 or weights.size(0) == 0:
        raise ValueError(f"weights must be (n_groups >= 1, d_out, d_in), got {tuple(weights.shape)}")
    n_groups, _, d_in = weights.shape
    if rows.dim() != 2 or rows.size(1) != d_in:
        raise ValueError(
            f"rows must be (n_rows, d_in={d_in}) for weights {tuple(weights.shape)}, got {tuple(rows.shape)}"
        )
    if counts.shape != (n_groups,) or counts.dtype is not torch.int64:
        raise ValueError(f"counts must be int64 (n_groups={n_groups},), got {counts.dtype} {tuple(counts.shape)}")
    dtype = autocast_dtype(rows, weights)
    if dtype is not None:
        rows, weights = rows.to(dtype), weights.to(dtype)
    if not rows.is_floating_point() or weights.dtype is not rows.dtype:
        raise TypeError(f"rows and weights must have one floating-point type, got {rows.dtype} and {weights.dtype}")
    if counts.device.type == "cpu" and not torch.compiler.is_compiling():
        sizes = counts.tolist()
        if min(sizes) < 0 or sum(sizes) > rows.size(0):
            raise ValueError(f"counts must be at least 0 and at most {rows.size(0)} rows in all, got {sizes}")
    chosen = choose_backend(
        backend,
        rows,
        weights,
        counts,
        triton_refuses=_triton_refuses(rows),
        torch_refuses=_torch_refuses(rows, weights),
    )
    if chosen == "triton":
        out: Tensor = triton_grouped_matmul(rows, weights, counts)
        return out
    if chosen == "torch":
        return _by_torch(rows, weights, counts)
    return grouped_matmul_reference(rows, weights, counts)


def _triton_refuses(rows: Tensor) -> str | None:
    if rows.dtype is torch.float64:
        return "the kernels multiply float32, float16 and bfloat16, got float64"
    return None


def _torch_refuses(rows: Tensor, weights: Tensor) -> str | None:
    if rows.dtype is torch.float64:
        return "F.grouped_mm takes float32, float16 and bfloat16, got float64"
    if torch.compiler.is_compiling() and rows.dtype is not torch.bfloat16:
        return f"under torch.compile F.grouped_mm takes bfloat16 only, got {rows.dtype}"
    if 0 in rows.shape or 0 in weights.shape:
        return f"F.grouped_mm takes no empty tensors, got {tuple(rows.shape)} and {tuple(weights.shape)}"
    whole = 16 // rows.element_size()
    if rows.size(1) % whole or weights.size(1) % whole:
        return (
            f"F.grouped_mm wants rows of whole 16 bytes: d_in and d_out must be multiples of {whole} for {rows.dtype}, "
            f"got {rows.size(1)} and {weights.size(1)}"
        )
    return None


def _by_torch(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    ends = counts.cumsum(0)
    # The operator leaves rows of nobody unwritten, in the backward pass too: what was in that memory is kept out of the
    # result and of the gradient.
    nobody = (torch.arange(rows.size(0), device=rows.device) >= ends[-1]).unsqueeze(1)
    rows, weights = rows.masked_fill(nobody, 0.0).contiguous(), weights.contiguous()
    return F.grouped_mm(rows, weights.mT, offs=ends.to(torch.int32)).masked_fill(nobody, 0.0)
