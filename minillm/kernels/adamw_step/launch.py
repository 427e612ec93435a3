"""The custom operator ``minillm::adamw_step``: it changes three of its arguments and returns nothing."""

import math

import torch
from torch import Tensor

from minillm.kernels.runtime import launch

_BLOCK = 1024


@torch.library.custom_op("minillm::adamw_step", mutates_args=("parameter", "exp_avg", "exp_avg_sq"))
def triton_adamw_step(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    from minillm.kernels.adamw_step import kernel

    launch(
        kernel.adamw_update,
        (-(-parameter.numel() // _BLOCK),),
        parameter,
        gradient,
        exp_avg,
        exp_avg_sq,
        parameter.numel(),
        1 - lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        1 / math.sqrt(1 - beta2**step),
        lr / (1 - beta1**step),
        eps,
        BLOCK=_BLOCK,
        num_warps=4,
    )
