"""Sinusoidal positions: fixed waves of geometrically growing length, in which a shift is a rotation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from minillm.layers.positions.arguments import check_integer_tensor, check_whole_numbers


def sinusoidal_positions(
    length: int,
    d_model: int,
    *,
    start: int = 0,
    base: float = 10000.0,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Vectors of positions ``start .. start + length - 1`` (Vaswani et al. 2017, section 3.5): (length, d_model).

    ``PE(p)[2i] = sin(p / base**(2i / d_model))`` and ``PE(p)[2i + 1] = cos(p / base**(2i / d_model))``. Worked out in
    float64 and rounded to ``dtype`` once, so far positions are as good as near ones. ValueError for an odd ``d_model``
    (a sine without its cosine has no shift), a negative length or start, or a base that is not positive.
    """
    _check(d_model, base)
    check_whole_numbers(length=length, start=start)
    if length < 0 or start < 0:
        raise ValueError(f"length and start must be at least 0, got {length} and {start}")
    # On the CPU, as not every device has float64.
    return _waves(torch.arange(start, start + length, device="cpu"), d_model, base).to(device=device, dtype=dtype)


def sinusoidal_shift(offset: int, d_model: int, *, base: float = 10000.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix M, (d_model, d_model), with ``PE(p + offset) = M @ PE(p)`` for every position p.

    Each pair (sine, cosine) is turned by ``offset / base**(2i / d_model)``: blocks ``[[cos, sin], [-sin, cos]]`` on the
    diagonal. M is orthogonal, so ``PE(p) . PE(q)`` depends on ``p - q`` only: it is the sum of the cosines of that
    offset's angles. ``offset`` may be negative.
    """
    _check(d_model, base)
    sine, cosine = _waves(torch.tensor(offset), d_model, base).view(-1, 2).unbind(-1)
    blocks = torch.stack((cosine, sine, -sine, cosine), dim=-1).view(-1, 2, 2)
    matrix: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix.to(dtype)


class SinusoidalPositions(nn.Module):
    """Sinusoidal positions (Vaswani et al. 2017, section 3.5), added to the token embedding; nothing is learned.

    Has the interface of :class:`LearnedPositions`, without an end. Results have the module's dtype, each number
    rounded once from float64, whatever dtypes the module went through. There is nothing in the state.

    Args:
        d_model: size of each vector, even.
        base: sets the longest wavelength, ``2 pi base`` positions.
    """

    table: Tensor

    def __init__(self, d_model: int, *, base: float = 10000.0) -> None:
        super().__init__()
        _check(d_model, base)
        self.d_model, self.base = d_model, float(base)
        self.register_buffer("table", torch.empty(0, d_model), persistent=False)

    def _rows(self, start: int, length: int) -> Tensor:
        like = self.table
        with torch.inference_mode(False):  # a table first made while generating must serve in training too
            return sinusoidal_positions(
                length, self.d_model, start=start, base=self.base, device=like.device, dtype=like.dtype
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SinusoidalPositions":
        # Made anew rather than converted: to(bfloat16) and back would leave bfloat16's numbers, to_empty() rubbish.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.table = self._rows(0, self.table.size(0))
        return self

    def forward(self, positions: Tensor) -> Tensor:
        """Vectors for integer ``positions`` of any shape and value: (...) to (..., d_model)."""
        check_integer_tensor("positions", positions)
        return _waves(positions, self.d_model, self.base).to(self.table.dtype)

    def span(self, start: int, length: int) -> Tensor:
        """Vectors of positions ``start .. start + length - 1``, (length, d_model): a slice of a table that grows."""
        check_whole_numbers(length=length, start=start)
        if length < 0 or start < 0:
            raise ValueError(f"length and start must be at least 0, got {length} and {start}")
        end, rows = start + length, self.table.size(0)
        if start > rows:
            return self._rows(start, length)  # far from all that was asked for: not worth the rows between
        if end > rows:
            self.table = self._rows(0, max(end, 2 * rows))  # doubled, for the steps of a generation
        return self.table[start:end]

    def extra_repr(self) -> str:
        return f"d_model={self.d_model}, base={self.base}"


def _waves(positions: Tensor, d_model: int, base: float) -> Tensor:
    # Apple's GPUs have no float64. A float32 angle is off by p * 6e-8: harmless up to some 10,000 positions.
    wide = torch.float32 if positions.device.type == "mps" else torch.float64
    exponent = torch.arange(0, d_model, 2, dtype=wide, device=positions.device) / d_model
    angles = positions.to(wide).unsqueeze(-1) * base**-exponent
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


def _check(d_model: int, base: float) -> None:
    if d_model < 2 or d_model % 2:
        raise ValueError(f"d_model must be an even number of at least 2 for sinusoidal positions, got {d_model}")
    if not base > 0:
        raise ValueError(f"base must be positive, got {base}")
