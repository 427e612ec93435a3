"""Attention: torch's SDPA with each of its backends and flash_attention."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernel_parts.measuring import OURS, Aim, Case, Results, Work, d_output_of, wider
from minillm.costs import live_pairs
from minillm.layers import flash_attention

TOKENS, WIDTH = 16384, 2048  # a batch has as many tokens, and all heads together are as wide, as in the papers' charts
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
# Forward, bfloat16, one H100, TFLOP/s at 1k, 4k and 16k, read from the projects' own charts.
PUBLISHED_LENGTHS = (1024, 4096, 16384)
PUBLISHED = {
    (64, False): {"FA2": (306, 321, 324), "Triton": (382, 400, 403), "FA3": (392, 476, 497)},
    (64, True): {"FA2": (229, 284, 299), "Triton": (291, 363, 363), "FA3": (265, 420, 473)},
    (128, False): {"FA2": (350, 368, 370), "Triton": (372, 389, 395), "FA3": (565, 638, 648)},
    (128, True): {"FA2": (260, 319, 335), "Triton": (273, 353, 378), "FA3": (423, 579, 616)},
}


def attention_cases(device: torch.device, smoke: bool, head_dim: int) -> dict[str, Callable[[], Case]]:
    """By name. A case is made, and its inputs with it, only when it is called."""
    if smoke:
        head_dim //= 4
    return {
        f"attention, head_dim {head_dim}, length {length}{', causal' if causal else ''}": partial(
            attention_case, device, smoke, head_dim, causal, length
        )
        for causal in (False, True)
        for length in ((40,) if smoke else LENGTHS)
    }


def attention_case(device: torch.device, smoke: bool, head_dim: int, causal: bool, length: int) -> Case:
    dtype = torch.float32 if smoke else torch.bfloat16
    batch, heads = (1, 2) if smoke else (TOKENS // length, WIDTH // head_dim)
    inputs = tuple(
        torch.randn(batch, heads, length, head_dim, device=device).to(dtype).requires_grad_() for _ in range(3)
    )
    pairs = live_pairs(length) if causal else length**2
    flops, n_bytes = 4.0 * batch * heads * head_dim * pairs, inputs[0].nbytes
    aims, published = {}, {}
    if head_dim == 128 and length >= 4096:
        aims["backward"] = Aim(220, "TFLOP/s")
        if not causal:
            aims["forward"] = Aim(370, "TFLOP/s")
    if (head_dim, causal, length) == (128, True, 16384):
        aims["forward"] = Aim(320, "TFLOP/s")
    if length in PUBLISHED_LENGTHS:
        at = PUBLISHED_LENGTHS.index(length)
        published["forward"] = {name: rates[at] for name, rates in PUBLISHED[head_dim, causal].items()}
    sides: dict[str, Callable[..., Tensor]] = {
        name: lambda *qkv, backend=backend: sdpa(*qkv, causal, backend) for name, backend in BACKENDS.items()
    }
    sides[OURS] = lambda *qkv: flash_attention(*qkv, causal=causal, backend="triton")
    return Case(
        "attention",
        f"{batch} x {heads} x {length} x {head_dim}{' causal' if causal else ''}",
        inputs,
        sides,
        # Backward: the scores once more, and two products for each of the two forward; it reads query, key, value,
        # output and its gradient, and writes three gradients.
        {"forward": Work(flops, 4 * n_bytes), "backward": Work(2.5 * flops, 8 * n_bytes)},
        lambda *qkv: last_head(*qkv, causal),
        part=lambda tensor: tensor[-1, -1],
        aims=aims,
        published=published,
    )


def sdpa(query: Tensor, key: Tensor, value: Tensor, causal: bool, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def last_head(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Results:
    """Output and gradients of the last head of the last sequence in float64, a few queries at a time."""
    d_output = d_output_of(query)[-1, -1].double()
    query, key, value = (wider(one[-1, -1]) for one in (query, key, value))
    places = torch.arange(query.size(0), device=query.device)
    outputs = []
    for rows in places.split(1024):
        scores = query[rows] @ key.T / math.sqrt(query.size(1))
        if causal:
            scores = scores.masked_fill(places > rows[:, None], -math.inf)
        output = scores.softmax(-1) @ value
        output.backward(d_output[rows])  # adds to what the queries before have given
        outputs.append(output.detach())
    return (torch.cat(outputs), *(one.grad for one in (query, key, value)))
