"""What every kind of attention refuses at its door, by name."""

import torch
from torch import Tensor


def check_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, dropout: float
) -> None:
    """Refuse what does not fit, by name; looks at shapes and dtypes only, so costs no device time."""
    q, k, v = query.shape, key.shape, value.shape
    if len(q) != 4 or len(k) != 4 or len(v) != 4:
        raise ValueError(
            "query, key and value must each be (batch, heads, seq, head_dim), "
            f"got shapes {tuple(q)}, {tuple(k)} and {tuple(v)}"
        )
    if q[0] != k[0] or q[3] != k[3] or k[:3] != v[:3]:
        raise ValueError(
            "query and key must agree in batch and head_dim, key and value in batch, heads and seq, "
            f"got query {tuple(q)}, key {tuple(k)}, value {tuple(v)}"
        )
    if q[3] == 0:
        raise ValueError(f"head_dim must be at least 1, got query of shape {tuple(q)}")
    if k[1] == 0 or q[1] % k[1]:
        raise ValueError(f"the heads of query ({q[1]}) must be a multiple of the heads of key and value ({k[1]})")
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key and value must have one floating-point dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    check_mask_and_bias(mask, bias, (q[0], q[1], q[2], k[2]))


def check_mask_and_bias(mask: Tensor | None, bias: Tensor | None, scores: tuple[int, int, int, int]) -> None:
    """Refuse a mask that is not boolean, a bias that is not floating point, and either that does not broadcast.

    ``scores``: (batch, n_heads, query_length, key_length).
    """
    if mask is not None and mask.dtype is not torch.bool:
        raise ValueError(f"mask must be boolean (True: may look), got {mask.dtype}; give additive scores as bias")
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"bias must be floating point (added to the scores), got {bias.dtype}; give booleans as mask")
    for name, tensor in (("mask", mask), ("bias", bias)):
        if tensor is None:
            continue
        sizes = tuple(tensor.shape)
        if len(sizes) > 4 or any(a not in (1, b) for a, b in zip(reversed(sizes), reversed(scores), strict=False)):
            raise ValueError(f"{name} must broadcast to (batch, heads, query, key) = {scores}, got shape {sizes}")
