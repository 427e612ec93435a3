"""Gather and scatter of one flat tensor, under the name that the installed PyTorch has for them.

PyTorch 2.13 calls them `all_gather_single` and `reduce_scatter_single` and warns of the older names; 2.11 has only
those.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def all_gather_tensor(
    output: Tensor, input: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> dist.Work | None:
    """Fill `output` (n * m elements) with the `input` (m elements) of each of the n ranks, in order of rank.

    Returns:
        With `async_op` a handle whose `wait()` must be called before `output` is read; else None.
    """
    work: dist.Work | None = _all_gather(output, input, group=group, async_op=async_op)
    return work


def reduce_scatter_tensor(
    output: Tensor,
    input: Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """Fill `output` (m elements) of rank r with the r-th m elements of the sum of all ranks' `input` (n * m elements).

    Returns:
        With `async_op` a handle whose `wait()` must be called before `output` is read; else None.
    """
    work: dist.Work | None = _reduce_scatter(output, input, op=op, group=group, async_op=async_op)
    return work
