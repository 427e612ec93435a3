"""Attention of a few new queries to a long cache, in plain torch: cut the cache in pieces, attend to each, merge."""

import torch
from torch import Tensor


def split_kv_decode_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    n_splits: int,
    scale: float,
    window: int | None,
    alibi_slopes: Tensor | None,
) -> Tensor:
    """The formula, in float32 at least, one sequence after the other; arguments as of :func:`split_kv_decode`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, n_heads, n_new, head_dim = query.shape
    n_kv_heads, capacity = key.shape[1], key.shape[2]
    group = n_heads // n_kv_heads
    slopes = None if alibi_slopes is None else alibi_slopes.to(wide).repeat_interleave(n_new).view(n_kv_heads, -1, 1)
    outputs = torch.zeros(batch, n_kv_heads, group * n_new, head_dim, dtype=wide, device=query.device)
    filled = [capacity] * batch if lengths is None else lengths.clamp(0, capacity).tolist()
    sequences = []
    for i, length in enumerate(filled):
        # Query heads that share a key head are the rows of one product with it.
        rows = query[i].reshape(n_kv_heads, group * n_new, head_dim).to(wide) * scale
        places = torch.arange(length - n_new, length, device=query.device).repeat(group)[:, None]
        first = 0 if window is None else max(0, length - n_new - window + 1)  # no query sees a key before it
        partial = []
        for keys in torch.arange(first, length, device=query.device).tensor_split(n_splits):
            if not len(keys):
                continue
            piece = slice(int(keys[0]), int(keys[-1]) + 1)
            scores = rows @ key[i, :, piece].to(wide).transpose(-2, -1)  # (n_kv_heads, rows, keys)
            distance = places - keys
            if slopes is not None:
                scores = scores - slopes * distance
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            partial.append(partial_attention(scores.masked_fill(~seen, -torch.inf), value[i, :, piece].to(wide)))
        sequences.append(merge_partial(*map(torch.stack, zip(*partial, strict=True))) if partial else outputs[i])
    if sequences:
        outputs = torch.stack(sequences)
    return outputs.view(batch, n_heads, n_new, head_dim).to(query.dtype)


def partial_attention(scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """``softmax(scores) value`` and the log of the sum of ``exp(scores)``; zeros and -inf for a row of -inf.

    Args:
        scores: (..., rows, keys). value: (..., keys, head_dim).
    """
    weights, total, top = _exponentials(scores, -1)
    lse = torch.where(total == 0, -torch.inf, top + _positive(total).log())
    return (weights / _positive(total)) @ value, lse.squeeze(-1)


def merge_partial(outputs: Tensor, lses: Tensor) -> Tensor:
    """Attention to all keys from attention to pieces of them: ``sum_s exp(lse_s - lse) output_s``.

    Since ``output_s`` is a sum divided by ``exp(lse_s)``, the products are parts of one sum, over ``exp(lse) = sum_s
    exp(lse_s)``. A piece without a visible key has an lse of -inf and the weight 0.

    Args:
        outputs: (n_splits, ..., head_dim). lses: (n_splits, ...).
    """
    weights, total, _ = _exponentials(lses, 0)
    return ((weights / _positive(total))[..., None] * outputs).sum(0)


def _exponentials(scores: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """``exp(scores - top)``, its sum and the ``top`` subtracted, all zeros where there are only scores of -inf."""
    top = scores.detach().amax(dim, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)  # -inf - (-inf) would be NaN
    weights = (scores - top).exp()
    return weights, weights.sum(dim, keepdim=True), top


def _positive(total: Tensor) -> Tensor:
    return total.masked_fill(total == 0, 1.0)
