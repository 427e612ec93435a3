"""The custom operators ``minillm::gated`` and ``minillm::gated_backward``: memory, grid and gradient."""

from typing import Any

import torch
from torch import Tensor

from minillm.kernels.runtime import as_rows, launch, wide

_BLOCK = 1024  # 128 threads with 8 numbers each: 16 bytes of a half-precision tensor, one load


def _rows(*tensors: Tensor) -> list[Tensor]:
    """The tensors as rows; as one long row if they all follow each other in memory, for whole blocks but the last."""
    rows = [as_rows(torch.atleast_1d(tensor)) for tensor in tensors]  # type: ignore[no-untyped-call]
    return [row.view(1, -1) for row in rows] if all(row.is_contiguous() for row in rows) else rows


def _grid(rows: Tensor) -> tuple[int]:
    return (rows.size(0) * -(-rows.size(1) // _BLOCK),)


@torch.library.custom_op("minillm::gated", mutates_args=())
def triton_gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up`` with "silu", "gelu" or "gelu_tanh"."""
    from minillm.kernels.gated import kernel

    gates, ups = _rows(gate, up)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    launch(
        kernel.gated_forward,
        _grid(gates),
        gates,
        ups,
        y,
        gates.stride(0),
        ups.stride(0),
        gates.size(1),
        ACTIVATION=activation,
        BLOCK=_BLOCK,
        WIDE=wide(gate.dtype),
        num_warps=4,
    )
    return y


@torch.library.custom_op("minillm::gated_backward", mutates_args=())
def triton_gated_backward(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of ``gate`` and ``up``."""
    from minillm.kernels.gated import kernel

    dys, gates, ups = _rows(dy, gate, up)
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    launch(
        kernel.gated_backward,
        _grid(gates),
        dys,
        gates,
        ups,
        dgate,
        dup,
        dys.stride(0),
        gates.stride(0),
        ups.stride(0),
        gates.size(1),
        ACTIVATION=activation,
        BLOCK=_BLOCK,
        WIDE=wide(gate.dtype),
        num_warps=4,
    )
    return dgate, dup


@triton_gated.register_fake
def _(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@triton_gated_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    dgate, dup = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    return dgate, dup


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    gate, up, ctx.activation = inputs
    ctx.save_for_backward(gate, up)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    dgate, dup = triton_gated_backward(dy, *ctx.saved_tensors, ctx.activation)
    return dgate, dup, None


triton_gated.register_autograd(_backward, setup_context=_setup_context)
