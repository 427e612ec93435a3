"""Cross-entropy from logits in two kernels: the loss in one reading of the logits, the gradient in another."""

from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from minillm.kernels.cross_entropy.launch import triton_cross_entropy
from minillm.kernels.cross_entropy.reference import LossTerms, Reduction, cross_entropy_reference, reduce_losses
from minillm.kernels.runtime import Backend, choose_backend


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """``-log softmax(logits)[target]`` of each row, as :func:`torch.nn.functional.cross_entropy` for class indices.

    One row with logits ``z`` and ``lse = log(sum(exp(z)))`` has the loss
    ``lse - (1 - label_smoothing) z[target] - label_smoothing mean(z) + z_loss lse^2``. The forward kernel finds ``lse``
    in one reading, by the online softmax (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax",
    section 3), the backward kernel gets the gradient from it in another, into memory of its own; written out in torch,
    a matrix as large as the logits is written and read again in both directions.

    Args:
        logits: (n, n_classes), floating point, any strides.
        targets: (n,), int64, in [0, n_classes) or ``ignore_index``.
        ignore_index: a target of this value has the loss 0, no gradient, and does not count in the mean.
        label_smoothing: share of a target that is spread evenly over all classes (Szegedy et al. 2016, "Rethinking the
            Inception Architecture", section 7).
        z_loss: coefficient of ``lse^2``, which keeps logits from drifting (PaLM, Chowdhery et al. 2022, section 5:
            1e-4).
        logit_softcap: the logits go through ``cap * tanh(logits / cap)`` first (Gemma 2, 2024, section 2).
        reduction: "mean" over the targets that count (NaN if none does, as in torch), "sum" or "none".
        backend: "triton": the kernels. "torch": ``F.cross_entropy``, on float32 (a copy, for half precision); has no
            z_loss and no logit_softcap. "reference": the formula. See :func:`minillm.kernels.choose_backend`.

    Returns: a number, or (n,) for "none"; float32 for half precision too (torch would round the loss to it), float64
    for float64. The gradient has the logits' dtype.

    Raises TypeError for dtypes, ValueError for shapes, values that are not allowed, and targets that are no class. A
    target on a CUDA device is not looked at, since that would wait for the device: one that is no class gives NaN as
    its loss and its row's gradient ("torch" stops the device with an assertion instead).
    """
    if logits.dim() != 2 or logits.size(1) == 0:
        raise ValueError(f"logits must be (n, n_classes) with at least one class, got shape {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating point, got {logits.dtype}")
    terms = LossTerms(ignore_index, label_smoothing, z_loss, logit_softcap)
    check_targets(targets, logits.size(0), logits.size(1), terms, reduction)
    refusal = "torch's cross-entropy has no z_loss and no logit_softcap" if z_loss or logit_softcap else None
    chosen = choose_backend(backend, logits, targets, torch_refuses=refusal)
    if chosen == "triton":
        losses, _ = triton_cross_entropy(logits, targets, ignore_index, label_smoothing, z_loss, logit_softcap or 0.0)
    elif chosen == "torch":
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(
            wide, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction=reduction
        )
    else:
        losses, _ = cross_entropy_reference(logits, targets, terms)
    return reduce_losses(losses, targets, terms, reduction)


def check_targets(targets: Tensor, n: int, n_classes: int, terms: LossTerms, reduction: Reduction) -> None:
    """Refuse targets that do not fit ``n`` rows of ``n_classes`` logits, and an unknown reduction.

    Values are looked at on a CPU only, and not while torch compiles: elsewhere that would stop and wait.
    """
    if reduction not in get_args(Reduction):
        raise ValueError(f"reduction must be one of {', '.join(get_args(Reduction))}, got {reduction!r}")
    if targets.dtype is not torch.int64:
        raise TypeError(f"targets must be int64 class indices, got {targets.dtype}")
    if targets.shape != (n,):
        raise ValueError(f"targets must be one class for each of the {n} rows, got shape {tuple(targets.shape)}")
    if targets.is_cpu and not torch.compiler.is_compiling():
        wrong = targets[((targets < 0) | (targets >= n_classes)) & terms.counted(targets)]
        if len(wrong):
            raise ValueError(
                f"targets must be in [0, {n_classes}) or ignore_index={terms.ignore_index}, got {int(wrong[0])}"
            )
