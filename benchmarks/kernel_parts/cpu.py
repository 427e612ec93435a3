"""What tiles are worth without a GPU: time and memory, beside attention and a loss that hold their matrices."""

import platform
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.attention import both_ways, peak_bytes, ratio, take_turns
from benchmarks.kernel_parts.attention_cases import last_head
from benchmarks.kernel_parts.measuring import d_output_of, error
from benchmarks.kernel_parts.operator_cases import loss_in_float64
from minillm.kernels import linear_cross_entropy
from minillm.layers import flash_attention, plain_scaled_dot_product_attention

HEADS, HEAD_DIM = 4, 64
CPU = torch.device("cpu")


def attention(length: int, causal: bool, rounds: int) -> list[dict[str, Any]]:
    inputs = tuple(torch.randn(1, HEADS, length, HEAD_DIM, requires_grad=True) for _ in range(3))
    sides: dict[str, Callable[[], Tensor]] = {
        "naive": lambda: plain_scaled_dot_product_attention(*inputs, causal=causal),
        "tiled": lambda: flash_attention(*inputs, causal=causal, backend="reference"),
        "sdpa": lambda: F.scaled_dot_product_attention(*inputs, is_causal=causal),
    }
    shape = {"operator": "attention", "length": length, "causal": causal}
    exact = last_head(*inputs, causal)
    return _rows(shape, sides, inputs, d_output_of(inputs[0]), exact, lambda tensor: tensor[-1, -1], rounds)


def loss(n_rows: int, d_model: int, n_classes: int, rounds: int) -> list[dict[str, Any]]:
    x = torch.randn(n_rows, d_model, requires_grad=True)
    weight = (torch.randn(n_classes, d_model) / d_model**0.5).requires_grad_()
    targets = torch.randint(n_classes, (n_rows,))
    sides: dict[str, Callable[[], Tensor]] = {
        "logits in memory": lambda: F.cross_entropy(F.linear(x, weight), targets),
        "chunks": lambda: linear_cross_entropy(x, weight, targets, backend="reference"),
    }
    shape = {"operator": "linear_cross_entropy", "rows": n_rows, "d_model": d_model, "n_classes": n_classes}
    exact = loss_in_float64(x, weight, targets)
    return _rows(shape, sides, (x, weight), torch.ones(()), exact, lambda tensor: tensor, rounds)


def _rows(
    shape: dict[str, Any],
    sides: dict[str, Callable[[], Tensor]],
    inputs: tuple[Tensor, ...],
    gradient: Tensor,
    exact: tuple[Tensor, ...],
    part: Callable[[Tensor], Tensor],
    rounds: int,
) -> list[dict[str, Any]]:
    """The sides in turn, forward alone and with the backward pass; each is compared with the first."""
    errors = {}
    for name, side in sides.items():
        output = side()
        errors["forward", name] = error((output,), exact[:1], part)
        gradients = torch.autograd.grad(output, inputs, gradient)
        errors["forward + backward", name] = max(errors["forward", name], error(gradients, exact[1:], part))
        del output, gradients
    ways = {name: both_ways(side, inputs, gradient) for name, side in sides.items()}
    rows = []
    for what in ("forward", "forward + backward"):
        # What was just run with all sides has warmed them up.
        times = take_turns({name: way[what] for name, way in ways.items()}, rounds, CPU, warm_up=0)
        first = next(iter(times.values()))
        for name, side_times in times.items():
            row = shape | {"what": what, "side": name, "error": errors[what, name], "seconds": side_times}
            row |= {"faster": ratio(first, side_times), "peak_bytes": peak_bytes(ways[name][what], CPU)}
            rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    times = sorted(row["seconds"])
    if "length" in row:
        shape = f"{row['length']}{' causal' if row['causal'] else ''}"
    else:
        shape = f"loss {row['rows']} x {row['d_model']} x {row['n_classes']}"
    return (
        f"{shape:24} {row['what']:18} {row['side']:16} {times[len(times) // 2]:8.3f} [{times[0]:.3f}, {times[-1]:.3f}]"
        f" {row['faster']:7.2f} {row['peak_bytes'] / 2**20:10.1f} {row['error']:9.1e}"
    )


def machine() -> dict[str, Any]:
    return {"machine": platform.machine(), "threads": torch.get_num_threads()}
