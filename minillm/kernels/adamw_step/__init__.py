"""One step of AdamW in one kernel: each number is read once and written once."""

import math

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from minillm.kernels.adamw_step.launch import triton_adamw_step
from minillm.kernels.adamw_step.reference import adamw_step_reference
from minillm.kernels.runtime import Backend, choose_backend


@torch.no_grad()
def adamw_step(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    backend: Backend = "auto",
) -> None:
    """The ``step``-th update of a parameter and of its two averages, in place.

        parameter <- parameter - lr * weight_decay * parameter
        exp_avg <- beta1 * exp_avg + (1 - beta1) * gradient
        exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * gradient^2
        parameter <- parameter - lr * (exp_avg / (1 - beta1^step)) / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

    (Loshchilov and Hutter 2017, "Decoupled Weight Decay Regularization", Algorithm 2.) For each parameter the kernel
    reads four numbers and writes three, in float32 28 bytes; one operator after the other it is 20 numbers, 80 bytes.

    Args:
        parameter: any shape, floating point.
        gradient: of that shape; may have another dtype, such as bfloat16 where the parameter is the float32 master copy
            of a bfloat16 weight.
        exp_avg, exp_avg_sq: of that shape, both of one dtype; float32 beside a parameter in half precision is allowed.
            Such a parameter loses every update of less than half its last bit, in bfloat16 1/512 to 1/256 of it:
            training needs a float32 master copy.
        step: counts from 1.
        lr, betas, eps, weight_decay: as in :class:`minillm.optim.AdamW`.
        backend: "triton": the kernel, which calculates in float32, for contiguous tensors other than float64. "torch":
            PyTorch's fused AdamW, for contiguous tensors of one dtype. "reference": the formulas line by line, in the
            dtype of the averages. See :func:`minillm.kernels.choose_backend`.

    Raises TypeError for dtypes and ValueError for shapes and numbers that are not these.
    """
    tensors = {"parameter": parameter, "gradient": gradient, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"{name} must have the parameter's shape {tuple(parameter.shape)}, got {tuple(tensor.shape)}"
            )
    if exp_avg.dtype != exp_avg_sq.dtype:
        raise TypeError(f"exp_avg and exp_avg_sq must have one dtype, got {exp_avg.dtype} and {exp_avg_sq.dtype}")
    if not isinstance(step, int) or isinstance(step, bool):
        raise TypeError(f"step must be an integer, got {step!r}")
    if step < 1:
        raise ValueError(f"step must be at least 1, got {step}")
    check_hyperparameters(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    strided = next((name for name, tensor in tensors.items() if not tensor.is_contiguous()), None)
    scattered = None if strided is None else f"all tensors must be contiguous, and {strided} is not"
    dtypes = {tensor.dtype for tensor in tensors.values()}
    names = ", ".join(sorted(map(str, dtypes)))
    chosen = choose_backend(
        backend,
        *tensors.values(),
        triton_refuses="the kernel calculates in float32, got a tensor in float64"
        if torch.float64 in dtypes
        else scattered,
        torch_refuses=f"PyTorch's fused AdamW needs tensors of one dtype, got {names}"
        if len(dtypes) > 1
        else scattered,
    )
    if chosen == "triton":
        triton_adamw_step(parameter, gradient, exp_avg, exp_avg_sq, step, lr, *betas, eps, weight_decay)
    elif chosen == "torch":
        torch_adamw(
            [parameter],
            [gradient],
            [exp_avg],
            [exp_avg_sq],
            [],
            [torch.tensor(step - 1.0, device=parameter.device)],  # it counts the step itself
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=lr,
            beta1=betas[0],
            beta2=betas[1],
            weight_decay=weight_decay,
            eps=eps,
        )
        # It tells autograd nothing: a backward pass that still needs the old values would take the new ones.
        torch.autograd.graph.increment_version([parameter, exp_avg, exp_avg_sq])
    else:
        adamw_step_reference(
            parameter, gradient, exp_avg, exp_avg_sq, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )


def check_hyperparameters(*, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Refuse with a ValueError what AdamW cannot work with."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas!r}")
