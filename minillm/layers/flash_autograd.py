"""The loops over tiles as one operation that autograd knows: it keeps the output and a number a query, no weights."""

from typing import Any

import torch
from torch import Tensor

from minillm.layers.flash_loops import flash_attention_2_forward, flash_attention_backward
from minillm.layers.flash_tiles import FlashSettings


@torch.compiler.disable  # type: ignore[untyped-decorator]  # it would unroll the loops, anew for every length
def tiled_flash_attention(query: Tensor, key: Tensor, value: Tensor, settings: FlashSettings) -> tuple[Tensor, Tensor]:
    """:func:`minillm.layers.flash_loops.flash_attention_2_forward`, differentiable once in both of its results."""
    output, log_sums = _Flash.apply(query, key, value, settings)  # type: ignore[no-untyped-call]
    return output, log_sums


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, settings: FlashSettings) -> tuple[Tensor, Tensor]:
        # Under autocast the products would be narrowed one by one; here the inputs' dtype decides.
        with torch.autocast(query.device.type, enabled=False):
            return flash_attention_2_forward(query, key, value, settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, settings = inputs
        ctx.save_for_backward(query, key, value, *output)
        ctx.settings = settings
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, d_output: Tensor | None, d_log_sums: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sums = ctx.saved_tensors
        if d_output is None:
            d_output = torch.zeros_like(output)
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            gradients = flash_attention_backward(
                query, key, value, output, log_sums, d_output, d_log_sums, ctx.settings
            )
        if torch.is_grad_enabled():  # create_graph: the gradients may be used, but not differentiated
            inputs = (query, key, value, d_output, d_log_sums)
            gradients = _Once.apply(*gradients, *inputs)  # type: ignore[no-untyped-call]
        return (*gradients, None)


class _Once(torch.autograd.Function):
    """Gradients that pretend to depend on the inputs, so that a second derivative is refused and not silently zero."""

    @staticmethod
    def forward(
        d_query: Tensor, d_key: Tensor, d_value: Tensor, *_inputs: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return d_query.view_as(d_query), d_key.view_as(d_key), d_value.view_as(d_value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_gradients: Tensor) -> Any:
        raise RuntimeError("flash_attention is differentiable once: take second derivatives of another attention")
