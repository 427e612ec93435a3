"""Rotary position embeddings (RoPE): queries and keys turned by an angle that grows with their position."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from minillm.kernels.rope.reference import rotate
from minillm.layers.positions.arguments import check_integer_tensor
from minillm.layers.positions.rope_scaling import RopeScaling


def rope_frequencies(
    head_dim: int,
    *,
    base: float = 10000.0,
    scaling: RopeScaling | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """How fast each pair of a head turns, radians a token: ``base**(-2i / head_dim)``, scaled; (head_dim / 2,).

    Raises ValueError for an odd head_dim, a base that is not positive, or one that the scaling cannot be applied to.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be an even number of at least 2 for rotary embeddings, got {head_dim}")
    if not 0 < base < float("inf"):
        raise ValueError(f"base must be positive, got {base}")
    exponent = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).to(dtype) / head_dim
    frequencies = 1.0 / base**exponent
    return frequencies if scaling is None else scaling(frequencies, base)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (Su et al. 2021, "RoFormer", eq. 34): queries and keys turned by position.

    Pair ``i`` of a head at position ``p`` is turned by ``p * base**(-2i / head_dim)``; the product of a turned query
    and a turned key then depends on their distance only.

    Angles are float32, as in every published model, and the farther out, the more they are rounded: with base 10000 by
    up to 2.4e-4 radians at position 4096 and 8e-3 at 131072, four times what bfloat16 does to a cosine. In float64
    (``cos_sin``) nothing of it is left, at seven times the time and not on every device.

    Args:
        head_dim: size of a head, even.
        base: sets the longest wavelength, ``2 pi base``.
        interleaved: pair neighbours (the paper; GPT-J) instead of the two halves of a head (GPT-NeoX, Llama in
            transformers). :func:`to_half_layout` and :func:`to_interleaved_layout` lead from one to the other.
        scaling: None, :class:`LinearScaling`, :class:`NTKScaling`, :class:`YarnScaling` or :class:`Llama3Scaling`.
    """

    inverse_frequency: Tensor

    def __init__(
        self, head_dim: int, *, base: float = 10000.0, interleaved: bool = False, scaling: RopeScaling | None = None
    ) -> None:
        super().__init__()
        if scaling is not None and not isinstance(scaling, RopeScaling):
            raise TypeError(
                f"scaling must be None, LinearScaling, NTKScaling, YarnScaling or Llama3Scaling, got {scaling!r}"
            )
        self.head_dim, self.base, self.interleaved, self.scaling = head_dim, float(base), interleaved, scaling
        self.register_buffer("inverse_frequency", self._frequencies(None, torch.float32), persistent=False)

    def _frequencies(self, device: torch.device | None, dtype: torch.dtype) -> Tensor:
        return rope_frequencies(self.head_dim, base=self.base, scaling=self.scaling, device=device, dtype=dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotaryEmbedding":
        # module.to(bfloat16) would round the angles of far positions to nonsense, and to_empty() would leave rubbish:
        # so the frequencies follow the module to its device, but are always these float32 numbers.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.inverse_frequency = self._frequencies(self.inverse_frequency.device, torch.float32)
        return self

    def cos_sin(self, positions: Tensor, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the angles, times the scaling's attention scale.

        Args:
            positions: integers (...), of any sign.
            dtype: of the computation and the results, float32 or float64.

        Returns: twice (..., head_dim / 2).
        """
        check_integer_tensor("positions", positions)
        if dtype is torch.float32:
            frequencies = self.inverse_frequency
        elif dtype is torch.float64:
            frequencies = self._frequencies(self.inverse_frequency.device, dtype)
        else:
            raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        angles = positions.to(dtype).unsqueeze(-1) * frequencies
        cos, sin = angles.cos(), angles.sin()
        scale = 1.0 if self.scaling is None else self.scaling.attention_scale
        return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn ``x`` (batch, heads, seq, head_dim) at integer ``positions`` (seq,) or (batch, seq).

        A float64 ``x`` is turned by float64 angles.
        """
        if x.dim() != 4 or x.size(-1) != self.head_dim:
            raise ValueError(f"x must be (batch, heads, seq, head_dim={self.head_dim}), got shape {tuple(x.shape)}")
        if positions.shape not in ((x.size(2),), (x.size(0), x.size(2))):
            raise ValueError(
                f"positions must be (seq,) or (batch, seq) of x {tuple(x.shape)}, got shape {tuple(positions.shape)}"
            )
        cos, sin = self.cos_sin(positions, dtype=torch.float64 if x.dtype is torch.float64 else torch.float32)
        if positions.dim() == 2:
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rotate(x, cos, sin, interleaved=self.interleaved)

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base}, interleaved={self.interleaved}, scaling={self.scaling}"


def to_half_layout(x: Tensor, *, n_heads: int | None = None) -> Tensor:
    """From pairs of neighbours to pairs of halves: ``a0 b0 a1 b1 ...`` becomes ``a0 a1 ... b0 b1 ...``.

    A model that turned neighbours computes the same scores turning halves if the rows of its query and key projections,
    weights and biases, are moved so; values and output stay. This is how Meta's Llama files became transformers' ones.

    Args:
        x: without ``n_heads`` (..., head_dim), queries or keys; with it the rows (n_heads * head_dim, ...) of a
            projection's weight or bias, moved within each head.
        n_heads: heads in the rows of ``x``: n_heads for queries, n_kv_heads for keys.

    Returns: a tensor of the same shape and dtype. :func:`to_interleaved_layout` undoes it.
    """
    _check_pairs(x, n_heads)
    if n_heads is None:
        return rearrange(x, "... (pair two) -> ... (two pair)", two=2)
    return rearrange(x, "(head pair two) ... -> (head two pair) ...", head=n_heads, two=2)


def to_interleaved_layout(x: Tensor, *, n_heads: int | None = None) -> Tensor:
    """From pairs of halves to pairs of neighbours: the inverse of :func:`to_half_layout`, same arguments."""
    _check_pairs(x, n_heads)
    if n_heads is None:
        return rearrange(x, "... (two pair) -> ... (pair two)", two=2)
    return rearrange(x, "(head two pair) ... -> (head pair two) ...", head=n_heads, two=2)


def _check_pairs(x: Tensor, n_heads: int | None) -> None:
    if n_heads is None and (x.dim() == 0 or x.size(-1) % 2):
        raise ValueError(f"x must be (..., head_dim) with an even head_dim, got shape {tuple(x.shape)}")
    if n_heads is not None and (n_heads < 1 or x.dim() == 0 or x.size(0) % (2 * n_heads)):
        raise ValueError(
            f"n_heads must be at least 1, and x have n_heads * head_dim rows with an even head_dim, "
            f"got n_heads={n_heads} and shape {tuple(x.shape)}"
        )


def rope_decay(
    distances: Tensor, head_dim: int, *, base: float = 10000.0, scaling: RopeScaling | None = None
) -> Tensor:
    """How far a score at a distance can be held up by the turned pairs (Su et al. 2021, section 3.4.3).

    Read each pair of query and key as a complex number, let ``h_j = q_j conj(k_j)`` (0 after the last pair), and
    ``S_j`` the sum of ``exp(i * distance * frequency)`` over the first ``j`` pairs. Summed by parts, a score is at most
    ``max_j |h_{j+1} - h_j|`` times the sum of all ``|S_j|``. Returned is their mean, as in the paper's figure 2:
    highest at distance 0, where it is ``(head_dim / 2 + 1) / 2``, and falling, though not steadily. It bounds what a
    score can be; a trained model may well look at what is far away.

    Args:
        distances: query position less key position, of any shape and sign.
        head_dim, base, scaling: as in :class:`RotaryEmbedding`.

    Returns: float64, of the shape of ``distances``.
    """
    frequencies = rope_frequencies(head_dim, base=base, scaling=scaling, device=distances.device, dtype=torch.float64)
    angles = distances.to(torch.float64).unsqueeze(-1) * frequencies
    return torch.polar(torch.ones_like(angles), angles).cumsum(-1).abs().mean(-1)
