"""What every multi-head layer does: check its sizes and its inputs, cut a vector into heads and turn them by place."""

from collections.abc import Callable

from torch import Tensor

from minillm.layers.positions import rotate

# Called as scaled_dot_product_attention is: (query, key, value, *, mask, bias, causal, dropout, return_weights).
Attend = Callable[..., Tensor | tuple[Tensor, Tensor]]


def head_sizes(
    d_model: int, n_heads: int, n_kv_heads: int | None, head_dim: int | None, dropout: float
) -> tuple[int, int]:
    """``n_kv_heads`` and ``head_dim`` with their defaults filled in: as many heads, and ``d_model / n_heads``.

    Raises ValueError for sizes below 1, heads that do not divide, and a dropout outside [0, 1).
    """
    if d_model < 1 or n_heads < 1:
        raise ValueError(f"d_model and n_heads must be at least 1, got {d_model} and {n_heads}")
    n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
    if n_kv_heads < 1 or n_heads % n_kv_heads:
        raise ValueError(f"n_kv_heads must divide n_heads, got n_heads={n_heads}, n_kv_heads={n_kv_heads}")
    if head_dim is None:
        if d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model unless head_dim is given, got {n_heads} and {d_model}")
        head_dim = d_model // n_heads
    if head_dim < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim}")
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    return n_kv_heads, head_dim


def check_sequence(name: str, sequence: Tensor, size: int, size_name: str) -> None:
    """Refuse anything but (batch, seq, size)."""
    if sequence.dim() != 3 or sequence.size(-1) != size:
        raise ValueError(f"{name} must be (batch, seq, {size_name}={size}), got shape {tuple(sequence.shape)}")


def turn(heads: Tensor, rotation: tuple[Tensor, Tensor] | None, name: str) -> Tensor:
    """``heads`` (batch, heads, seq, head_dim) turned by the same angles in every head; None turns nothing.

    Raises ValueError for angles that are not one for each pair of head_dim and each place: fewer would be broadcast.
    """
    if rotation is None:
        return heads
    batch, _, seq, head_dim = heads.shape
    for angle in rotation:
        if angle.shape not in ((seq, head_dim // 2), (batch, seq, head_dim // 2)):
            raise ValueError(
                f"{name} must be cosines and sines of shape ({seq}, {head_dim // 2}) or "
                f"({batch}, {seq}, {head_dim // 2}), got {tuple(angle.shape)}"
            )
    cos, sin = (angle.unsqueeze(-3) for angle in rotation)
    return rotate(heads, cos, sin)
