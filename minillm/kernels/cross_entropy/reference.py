"""Cross-entropy from logits, in plain torch: the losses, their gradient in closed form, and their reduction."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]


@dataclass(frozen=True)
class LossTerms:
    """What a row's loss consists of; checked when it is made. See :func:`minillm.kernels.cross_entropy`."""

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_softcap: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.ignore_index, int) or isinstance(self.ignore_index, bool):
            raise TypeError(f"ignore_index must be an integer, got {self.ignore_index!r}")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1], got {self.label_smoothing}")
        if not 0.0 <= self.z_loss < math.inf:
            raise ValueError(f"z_loss must be at least 0 and finite, got {self.z_loss}")
        if self.logit_softcap is not None and not 0.0 < self.logit_softcap < math.inf:
            raise ValueError(f"logit_softcap must be above 0 and finite, or None, got {self.logit_softcap}")

    def counted(self, targets: Tensor) -> Tensor:
        """Boolean, True where a target counts."""
        return targets != self.ignore_index

    def factor(self, targets: Tensor, n_classes: int, dtype: torch.dtype) -> Tensor:
        """1, and NaN for a target that is no class and not ignored: it shows without asking the device."""
        fits = (targets >= 0) & (targets < n_classes) | ~self.counted(targets)
        return torch.where(fits, 1.0, math.nan).to(dtype)

    def cap(self, logits: Tensor) -> Tensor:
        """``cap * tanh(logits / cap)``: nearly the logits where they are small, never beyond +-cap."""
        return logits if self.logit_softcap is None else self.logit_softcap * torch.tanh(logits / self.logit_softcap)

    def losses(self, lse: Tensor, picked: Tensor, mean: Tensor | None, targets: Tensor, n_classes: int) -> Tensor:
        """``lse - (1 - smoothing) picked - smoothing mean + z_loss lse^2``; 0 where ignored, NaN for no such class.

        Args:
            lse, picked, mean, targets: (n,); of a row's capped logits the log of the sum of exponentials, the target's
                and the mean, which is None without label smoothing.
        """
        losses = lse - (1.0 - self.label_smoothing) * picked
        if mean is not None:
            losses = losses - self.label_smoothing * mean
        if self.z_loss:
            losses = losses + self.z_loss * lse.square()
        return (losses * self.factor(targets, n_classes, losses.dtype)).masked_fill(~self.counted(targets), 0.0)


def cross_entropy_reference(logits: Tensor, targets: Tensor, terms: LossTerms) -> tuple[Tensor, Tensor]:
    """Losses (n,) of ``logits`` (n, n_classes), and the log of the sum of exponentials; float32 at least.

    Differentiable in the first result. What the kernels must equal.
    """
    capped = terms.cap(logits.to(torch.promote_types(logits.dtype, torch.float32)))
    n_classes = logits.size(1)
    picked = capped.gather(1, targets.clamp(0, n_classes - 1)[:, None])[:, 0]
    lse = capped.logsumexp(1)
    mean = capped.mean(1) if terms.label_smoothing else None
    return terms.losses(lse, picked, mean, targets, n_classes), lse.detach()


def cross_entropy_gradient(logits: Tensor, targets: Tensor, lse: Tensor, dlosses: Tensor, terms: LossTerms) -> Tensor:
    """Gradient (n, n_classes) of ``sum(dlosses * losses)`` in the logits, in closed form.

    With ``p = exp(z - lse)``, the softmax of the capped logits ``z``, one row has the gradient
    ``p (1 + 2 z_loss lse) - smoothing / n_classes - (1 - smoothing) [k = target]`` in ``z``, and ``1 - (z / cap)^2``
    times that in the logits.

    Args:
        logits: (n, n_classes), float32 at least.
        targets, lse, dlosses: (n,).
    """
    n_classes = logits.size(1)
    capped = terms.cap(logits)
    gradient = (capped - lse[:, None]).exp_()
    if terms.z_loss:
        gradient *= (1.0 + 2.0 * terms.z_loss * lse)[:, None]
    if terms.label_smoothing:
        gradient -= terms.label_smoothing / n_classes
    one = torch.full_like(lse, 1.0 - terms.label_smoothing)[:, None]
    gradient.scatter_add_(1, targets.clamp(0, n_classes - 1)[:, None], -one)
    if terms.logit_softcap is not None:
        gradient *= 1.0 - (capped / terms.logit_softcap).square()
    gradient *= (dlosses * terms.factor(targets, n_classes, lse.dtype))[:, None]
    return gradient.masked_fill_(~terms.counted(targets)[:, None], 0.0)


def reduce_losses(losses: Tensor, targets: Tensor, terms: LossTerms, reduction: Reduction) -> Tensor:
    """The losses (n,), their sum, or their mean over the targets that count: 0 / 0 = NaN if none does, as in torch."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / terms.counted(targets).sum()
