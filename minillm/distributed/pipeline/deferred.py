"""The weights' half of a backward pass, put off: what lets a zero-bubble schedule part I from W.

For ``y = x w^T + b`` the backward pass makes the gradient of x, ``dy w``, which the layers before wait for, and those
of w and b, ``dy^T x`` and the sum of dy, which nobody waits for before the optimizer's step; both cost the same. Inside
of `deferring` every linear layer keeps x and dy, and `DeferredGradients.run` makes the second half from them (Qi et al.
2023, "Zero Bubble Pipeline Parallelism", section 2).

The gradients of other parameters (norms, embeddings) are made with the first half: they cost little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class DeferredGradients:
    """The halves that are put off, of one micro-batch."""

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor | None, Tensor, Tensor]] = []

    def __len__(self) -> int:
        """How many linear layers wait."""
        return len(self._kept)

    def keep(self, weight: Tensor, bias: Tensor | None, x: Tensor, grad: Tensor) -> None:
        """Put off the gradients of a linear layer's parameters, for its input x and its output's gradient."""
        self._kept.append((weight, bias, x, grad))

    @torch.no_grad()
    def run(self) -> None:
        """Make them, add them to the parameters' ``.grad`` and forget what they were made from."""
        kept, self._kept = self._kept, []
        for weight, bias, x, grad in kept:
            rows = grad.reshape(-1, grad.size(-1))  # (tokens, d_out)
            _add(weight, rows.t() @ x.reshape(-1, x.size(-1)).conj())  # (d_out, tokens) @ (tokens, d_in)
            if bias is not None:
                _add(bias, rows.sum(0))


@contextmanager
def deferring(gradients: DeferredGradients | None) -> Iterator[None]:
    """Inside, `torch.nn.functional.linear` with weights that are leaves puts their gradients off; None puts off none.

    Accumulated gradients only: hooks on a parameter are not called for what is put off, nor are second derivatives.
    """
    if gradients is None:
        yield
    else:
        with _LinearMode(gradients):
            yield


class _LinearMode(TorchFunctionMode):
    def __init__(self, gradients: DeferredGradients) -> None:
        super().__init__()
        self._gradients = gradients

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.linear and torch.is_grad_enabled():
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        waits = weight.requires_grad and weight.is_leaf
        own_bias = bias if bias is not None and bias.requires_grad and bias.is_leaf else None
        if not waits or (bias is not None and bias.requires_grad and own_bias is None):
            return F.linear(input, weight, bias)
        input, cast = _as_autocast(input), [None if t is None else _as_autocast(t.detach()) for t in (weight, bias)]
        # A flag that needs a gradient makes autograd come back here when the input, such as a batch, needs none.
        flag = input.new_empty(0).requires_grad_()
        output: Tensor = _DeferredLinear.apply(input, cast[0], cast[1], flag, (self._gradients, weight, own_bias))  # type: ignore[no-untyped-call]
        return output


def _as_autocast(tensor: Tensor) -> Tensor:
    """What `F.linear` would compute with."""
    kind = tensor.device.type
    casts = torch.is_autocast_enabled(kind) and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(torch.get_autocast_dtype(kind)) if casts else tensor


class _DeferredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, flag: Tensor, later: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.later = later
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        gradients, parameter, bias = ctx.later
        gradients.keep(parameter, bias, x, grads[0])
        return grads[0] @ weight.conj() if ctx.needs_input_grad[0] else None, None, None, None, None


def _add(parameter: Tensor, grad: Tensor) -> None:
    grad = grad.to(parameter.dtype)
    if parameter.grad is None:
        parameter.grad = grad
    else:
        parameter.grad += grad
