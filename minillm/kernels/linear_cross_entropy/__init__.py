"""The loss of a language model's head, from the last hidden states, without the logits ever being in memory."""

import torch
from torch import Tensor
from torch.nn import functional as F

from minillm.kernels.autocast import autocast_dtype
from minillm.kernels.cross_entropy import check_targets
from minillm.kernels.cross_entropy.reference import LossTerms, Reduction, reduce_losses
from minillm.kernels.linear_cross_entropy.launch import triton_linear_cross_entropy
from minillm.kernels.linear_cross_entropy.reference import default_chunk_rows, linear_cross_entropy_reference
from minillm.kernels.runtime import Backend, choose_backend


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    reduction: Reduction = "mean",
    chunk_rows: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """``cross_entropy(x @ weight^T + bias, targets)``, never holding the (n, n_classes) logits.

    With a vocabulary of 128,000 the logits of 8,192 tokens are 2 GB in bfloat16 and their gradient 2 GB more, beside
    hidden states of 64 MB. What the loss needs of them is one number a row, ``lse = log(sum(exp(logits)))``, and the
    target's logit; so forward keeps the ``lse`` only, and backward makes the logits of ``chunk_rows`` rows again,
    turns them into their gradient ``softmax - one_hot``, and adds that into the gradients of ``x`` and
    ``weight``. This is the recomputation of Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language Models",
    section 4, with all of the gradient (they leave out tiles that bfloat16 would round away).

    The other way, gradients made in the forward pass (Hsu et al. 2024, "Liger Kernel", section 3.2), has three products
    of the size of the head's instead of four, but knows nothing of the gradient that will arrive: it cannot weigh rows
    afterwards (reduction="none"), holds a gradient as large as the weight from forward to backward, and does its
    work even where no backward pass follows. torch's does so, save for "none".

    Args:
        x: (n, d_model), floating point.
        weight: (n_classes, d_model), same dtype; may be frozen (its gradient is then not calculated) or tied to an
            embedding. Under ``torch.autocast`` both are brought to its dtype, as a linear layer does.
        targets: (n,), int64, in [0, n_classes) or ``ignore_index``.
        bias: (n_classes,), same dtype, or None.
        ignore_index, label_smoothing, z_loss, logit_softcap, reduction: as of :func:`minillm.kernels.cross_entropy`.
        chunk_rows: rows whose logits are held at a time (by Triton's kernels: whose gradient is, backward); None: so
            many that these are about as large as ``x``, and at least 256.
        backend: "triton": the kernels, which hold tiles of logits in registers; not float64. "torch":
            ``F.linear_cross_entropy`` in chunks, where torch has it, for float32 and float64; no label_smoothing,
            z_loss or logit_softcap. "reference": chunks in plain torch, in float32, with a float32 copy of a
            half-precision weight. See :func:`minillm.kernels.choose_backend`.

    Returns: a number, or (n,) for "none"; float32 (float64 for float64). Sums over rows, the weight's gradient among
    them, are taken in float32 and rounded once; by the kernels, in half precision, each chunk's share of the
    weight's is rounded too, before it is added. Differentiable once. Raises as :func:`minillm.kernels.cross_entropy`.
    """
    dtype = autocast_dtype(x, weight) if bias is None else autocast_dtype(x, weight, bias)
    if dtype is not None:
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    terms = LossTerms(ignore_index, label_smoothing, z_loss, logit_softcap)
    _check(x, weight, bias, chunk_rows)
    check_targets(targets, len(x), len(weight), terms, reduction)
    if chunk_rows is None:
        chunk_rows = default_chunk_rows(len(x), x.size(1), len(weight))
    tensors = (x, weight, targets) if bias is None else (x, weight, targets, bias)
    triton_refuses = "the kernels calculate in float32, and x is float64" if x.dtype is torch.float64 else None
    chosen = choose_backend(backend, *tensors, triton_refuses=triton_refuses, torch_refuses=_torch_refuses(x, terms))
    if chosen == "torch":
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=chunk_rows, chunking_method=None, allow_retain_graph=True
        )
        loss = F.linear_cross_entropy(
            x,
            weight,
            targets,
            linear_bias=bias,
            reduction="sum" if reduction == "mean" else reduction,
            ignore_index=ignore_index,
            options=options,
        )
        if reduction != "mean":
            return loss
        # torch's own mean over no target has NaN as its gradient, where that of its cross-entropy is 0.
        counted = terms.counted(targets).sum()
        return torch.where(counted > 0, loss / counted.clamp(min=1), torch.nan)
    if chosen == "triton":
        losses, _ = triton_linear_cross_entropy(
            x, weight, bias, targets, ignore_index, label_smoothing, z_loss, logit_softcap or 0.0, chunk_rows
        )
    else:
        losses = linear_cross_entropy_reference(x, weight, bias, targets, terms, chunk_rows)
    return reduce_losses(losses, targets, terms, reduction)


def _torch_refuses(x: Tensor, terms: LossTerms) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    if terms.label_smoothing or terms.z_loss or terms.logit_softcap:
        return "torch's has chunks only without label_smoothing, z_loss and logit_softcap"
    if x.dtype not in (torch.float32, torch.float64):
        return f"torch's rounds the loss to the dtype of x, {x.dtype}"
    return None


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int | None) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.size(1) != weight.size(1) or 0 in weight.shape:
        raise ValueError(
            "x must be (n, d_model) and weight (n_classes, d_model), at least one class, "
            f"got shapes {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), one number a class, got shape {tuple(bias.shape)}")
    dtypes = {tensor.dtype for tensor in (x, weight, bias) if tensor is not None}
    if len(dtypes) > 1 or not x.is_floating_point():
        raise TypeError(
            f"x, weight and bias must have one floating-point dtype, got {', '.join(sorted(map(str, dtypes)))}"
        )
    if chunk_rows is not None and (not isinstance(chunk_rows, int) or isinstance(chunk_rows, bool)):
        raise TypeError(f"chunk_rows must be an integer, or None, got {chunk_rows!r}")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"chunk_rows must be at least 1, or None, got {chunk_rows}")
