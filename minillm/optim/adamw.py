"""AdamW: Adam with decoupled weight decay, and the usual choice of what to decay.

Sources: Kingma and Ba 2014, "Adam", Algorithm 1 (the two moving averages and their bias corrections);
Loshchilov and Hutter 2017, "Decoupled Weight Decay Regularization", Algorithm 2, line 12 (the decay acts on the
parameter itself and is not mixed into the gradient). Leaving gains and biases undecayed is the custom since GPT-2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as torch_adamw

from minillm.kernels.adamw_step import check_hyperparameters
from minillm.kernels.adamw_step.reference import adamw_step_reference


class AdamW(torch.optim.Optimizer):
    """Adam with decoupled weight decay.

    For each parameter p with gradient g, at its t-th update (t = 1, 2, ...):

        p <- p - lr * weight_decay * p
        m <- beta1 * m + (1 - beta1) * g                  mean of the gradients
        v <- beta2 * v + (1 - beta2) * g^2                mean of their squares
        p <- p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    The state of a parameter is `step` (t, a float32 scalar), `exp_avg` (m) and `exp_avg_sq` (v), the latter two of the
    parameter's shape and dtype: the names and the layout of `torch.optim.AdamW`, so the two load each other's
    `state_dict()`. A parameter whose `grad` is None is left as it is, and its t does not advance.

    Args:
        params: parameters, or groups of them as `parameter_groups` gives.
        lr: learning rate, at least 0. A group's "lr" may be set anew before every step.
        betas: decay rates of the two means, each in [0, 1).
        eps: added to the denominator, at least 0.
        weight_decay: at least 0.
        fused: do the update of all parameters in one PyTorch kernel (CPU, CUDA and MPS), which reads and writes each
            number once; about five times faster than the formulas one by one, and equal to them up to rounding.

    Raises:
        ValueError: a hyperparameter outside its range.
        TypeError: a parameter that is not real floating point, or a sparse gradient.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        fused: bool = False,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay, "fused": fused}
        )
        for group in self.param_groups:
            _check_group(group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; returns the closure's loss where one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if parameter.grad.is_sparse:
                    raise TypeError("AdamW needs dense gradients, and a parameter has a sparse one")
                if not self.state[parameter]:
                    self._start(parameter, group)
            if group["fused"]:
                self._fused_update(parameters, group)
            else:
                for parameter in parameters:
                    self._update(parameter, group)
        return loss

    def _start(self, parameter: Tensor, group: dict[str, Any]) -> None:
        # The fused kernel advances the step counts itself, so it wants them on its device.
        device = parameter.device if group["fused"] else torch.device("cpu")
        state = self.state[parameter]
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        """The formulas of the class, one line each."""
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        state["step"] += 1
        adamw_step_reference(
            parameter,
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=state["step"].item(),
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )

    def _fused_update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        torch_adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
        )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split a model's parameters into those that weight decay pulls towards zero and those that it leaves alone.

    Matrices (two dimensions or more: projections and embeddings) decay; vectors (biases, and the gains of the norms)
    do not, for a norm's gain has its natural value at one and not at zero; nor do the stacked biases of experts. A
    tied weight appears once. Frozen parameters (`requires_grad` False) are left out.

    Args:
        model: any module.
        weight_decay: the coefficient for the matrices, at least 0.

    Returns:
        One or two groups, {"params": list of parameters, "weight_decay": float}, in the order of
        `model.named_parameters()`; an empty group is not given.

    Raises:
        ValueError: a negative or non-finite `weight_decay`, or a model without a trainable parameter.
    """
    if not (math.isfinite(weight_decay) and weight_decay >= 0):
        raise ValueError(f"weight_decay must be a finite number of at least 0, got {weight_decay!r}")
    # named_parameters() gives a parameter that two modules share once, under its first name.
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("the model has no trainable parameter: every one is frozen, or there is none")
    decays = {name: parameter.dim() >= 2 and not name.endswith("bias") for name, parameter in trainable}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trainable if decays[name]], "weight_decay": weight_decay},
        {"params": [p for name, p in trainable if not decays[name]], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _check_group(group: dict[str, Any]) -> None:
    check_hyperparameters(lr=group["lr"], betas=group["betas"], eps=group["eps"], weight_decay=group["weight_decay"])
    for parameter in group["params"]:
        if not parameter.is_floating_point():
            raise TypeError(f"AdamW needs real floating-point parameters, got one of dtype {parameter.dtype}")
