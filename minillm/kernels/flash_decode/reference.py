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
        if partial:
            outputs[i], _ = merge_partial_attention(*map(torch.stack, zip(*partial, strict=True)))
    return outputs.view(batch, n_heads, n_new, head_dim).to(query.dtype)


def partial_attention(scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """``softmax(scores) value`` and the log of the sum of ``exp(scores)``; zeros and -inf for a row of -inf.

    Args:
        scores: (..., queries, keys). value: (..., keys, value_dim).
    """
    weights, lse = _softmax(scores, -1)
    return weights @ value, lse.squeeze(-1)


def merge_partial_attention(outputs: Tensor, log_sums: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over all keys from attention over each of several parts of them.

    ``lse = log sum_p exp(lse_p)`` and ``output = sum_p exp(lse_p - lse) output_p``: split-KV decoding merges the parts
    of one cache (Dao et al. 2023, "Flash-Decoding"), ring attention those that come round (Liu et al. 2023), two at a
    time.

    Args:
        outputs: (parts, ..., queries, value_dim), floating point: each part's own output.
        log_sums: (parts, ..., queries): the log of each part's sum of exp(score), -inf where a query saw nothing of it.

    Returns: output (..., queries, value_dim) in the dtype of ``outputs``, and log-sum-exp (..., queries) in that of
    ``log_sums``, in which the sums are computed too. Differentiable in both; queries that saw nothing at all get zeros
    and -inf, and no NaN as gradient. Raises ValueError for shapes that do not fit, TypeError for integers.
    """
    if outputs.dim() < 2 or outputs.shape[:-1] != log_sums.shape:
        raise ValueError(
            "outputs must be (parts, ..., queries, value_dim) and log_sums (parts, ..., queries), "
            f"got shapes {tuple(outputs.shape)} and {tuple(log_sums.shape)}"
        )
    for name, tensor in (("outputs", outputs), ("log_sums", log_sums)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if not outputs.size(0):
        raise ValueError("there must be at least one part to merge, got none")
    weights, log_sum = _softmax(log_sums, 0)
    return (weights[..., None] * outputs).sum(0).to(outputs.dtype), log_sum.squeeze(0)


def _softmax(scores: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Softmax along ``dim`` and the log of its sum; zeros and -inf, no NaN and no gradient, where all is -inf."""
    top = scores.detach().amax(dim, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0.0)  # -inf - (-inf) would be NaN
    weights = (scores - top).exp()
    total = weights.sum(dim, keepdim=True)
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    return weights / total, (top + total.log()).masked_fill(nothing, -torch.inf)
