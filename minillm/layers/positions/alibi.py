"""ALiBi: attention with linear biases, a penalty that grows with the distance, steeper in some heads than in others."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from minillm.layers.positions.arguments import check_whole_numbers
from minillm.layers.positions.relative import relative_range, spread_diagonals


def alibi_slopes(n_heads: int) -> Tensor:
    """The slope of each head, (n_heads,) float32 (Press et al. 2022, section 3, and its authors' code).

    ``2**(-8 h / n)`` for head h = 1 ... n if n is a power of two: 1/2, 1/4 ... 1/256 for eight heads. Otherwise the
    slopes of the next smaller power of two, then every other slope of twice that power until there are enough.
    """
    check_whole_numbers(n_heads=n_heads)
    if n_heads < 1:
        raise ValueError(f"n_heads must be at least 1, got {n_heads}")
    power = 1 << (n_heads.bit_length() - 1)  # the largest that is not above n_heads
    exponents = [8 * head / power for head in range(1, power + 1)]
    exponents += [8 * head / (2 * power) for head in range(1, 2 * (n_heads - power), 2)]
    return torch.tensor([2.0**-exponent for exponent in exponents], dtype=torch.float32)


def alibi_bias(
    n_heads: int,
    query_length: int,
    key_length: int,
    *,
    offset: int | None = None,
    symmetric: bool = False,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``-slope * distance`` of each key from each query, to be added to the scaled scores: (n_heads, query, key).

    Args:
        n_heads: slopes as in :func:`alibi_slopes`.
        query_length, key_length, offset: places as in :func:`relative_range`; None: the last query is at the last key.
        symmetric: ``-slope * |i - j|``, for encoders. Else keys to the right of a query get 0, as they are to be
            hidden by a causal mask.
        dtype: of the result; the products are float32 and rounded once. Rounding is relative to the distance from the
            query, so that near keys are exact and only keys far down the slope, whose weights are small, are blurred.
            (BLOOM's form ``slope * j`` gives the same softmax, as it differs by a constant in each row, but in
            bfloat16 it cannot tell neighbours apart at the end of a long text.)
    """
    return _bias(alibi_slopes(n_heads).to(device), query_length, key_length, offset, symmetric, dtype)


class AlibiBias(nn.Module):
    """ALiBi's bias (Press et al. 2022) as a module: it follows the model's device, learns nothing, has no state.

    Always float32: attention rounds the bias to its own dtype, if at all. The bias is held at ``FLOOR`` from where it
    falls below: at equal scores such a key weighs less than ``e**-60`` of the nearest one, far below what any dtype
    adds up, and further down the weights would be subnormal numbers, which CPUs multiply many times slower (a training
    step at length 512 takes 1.3 to 1.8 times as long with them). This supposes that a query sees some key near itself,
    as in self-attention it does; where only far keys are seen, :func:`alibi_bias` keeps them apart and this does not.

    Args:
        n_heads: any number of heads, see :func:`alibi_slopes`.
        symmetric: distances in both directions, for encoders.
    """

    FLOOR = -60.0
    slopes: Tensor

    def __init__(self, n_heads: int, *, symmetric: bool = False) -> None:
        super().__init__()
        self.n_heads, self.symmetric = n_heads, symmetric
        self.register_buffer("slopes", alibi_slopes(n_heads), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AlibiBias":
        # to(bfloat16) would round the slopes of head counts that are no powers of two, to_empty() leave rubbish.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.slopes = alibi_slopes(self.n_heads).to(self.slopes.device)
        return self

    def forward(self, query_length: int, key_length: int, *, offset: int | None = None) -> Tensor:
        """The bias, (n_heads, query_length, key_length) float32; places as in :func:`alibi_bias`."""
        return _bias(self.slopes, query_length, key_length, offset, self.symmetric, torch.float32, self.FLOOR)

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, symmetric={self.symmetric}"


def _bias(
    slopes: Tensor,
    query_length: int,
    key_length: int,
    offset: int | None,
    symmetric: bool,
    dtype: torch.dtype,
    floor: float = -math.inf,
) -> Tensor:
    low, high = relative_range(query_length, key_length, offset)
    relative = torch.arange(low, high + 1, dtype=torch.float32, device=slopes.device)
    distance = relative.abs() if symmetric else -relative.clamp(max=0)
    return spread_diagonals((slopes[:, None] * -distance).clamp(min=floor).to(dtype), query_length, key_length)
