"""One step of AdamW in plain PyTorch, one operator a line: what the kernel must equal."""

import math

from torch import Tensor


def adamw_step_reference(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """The formulas of :func:`minillm.kernels.adamw_step`, in place, in the dtype of the two averages.

    A parameter of another dtype is widened, updated and rounded back once.
    """
    beta1, beta2 = betas
    dtype = exp_avg.dtype  # to() takes its time even where it has nothing to do
    wide = parameter if parameter.dtype is dtype else parameter.to(dtype)
    gradient = gradient if gradient.dtype is dtype else gradient.to(dtype)
    wide.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**step)).add_(eps)
    wide.addcdiv_(exp_avg, root, value=-lr / (1 - beta1**step))
    if wide is not parameter:
        parameter.copy_(wide)
