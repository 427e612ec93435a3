"""Flash-Decoding: attention of a few new tokens to a long cache, cut in pieces so that the whole device reads it."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from minillm.kernels.flash_decode.launch import (
    HEAD_DIMS,
    MOST_SPLITS,
    default_splits,
    multiprocessors,
    triton_split_kv_decode,
)
from minillm.kernels.flash_decode.reference import split_kv_decode_reference
from minillm.kernels.runtime import Backend, choose_backend

MOST_NEW = 16


def split_kv_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Tensor | None = None,
    n_splits: int | None = None,
    scale: float | None = None,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Causal attention of each sequence's newest tokens to all keys of its cache (Dao et al. 2023, Flash-Decoding).

    While a text is generated there is one query a sequence, and the time goes into reading the cache. A kernel that
    gives a program to each sequence and head leaves most of the device idle when these are few; this one cuts the keys
    in ``n_splits`` pieces, attends to each piece by itself, and merges: with ``output_s`` and ``lse_s``, the log of the
    sum of exponentials, of piece ``s``, the result is ``sum_s exp(lse_s - lse) output_s``, ``lse = log(sum_s
    exp(lse_s))``. All query heads that share a key head are the rows of one product, so keys are read once.

    Args:
        query: (batch, n_heads, n_new, head_dim), n_new from 1 to 16. Query ``t`` stands at place
            ``length - n_new + t`` and sees the keys up to its own.
        key, value: (batch, n_kv_heads, capacity, head_dim), any strides; n_kv_heads divides n_heads.
        lengths: (batch,), int32 or int64: how many keys of the cache are filled, new ones included; None: all. What
            lies behind is not read and may be anything. Outside of [0, capacity]: refused on a CPU; on a CUDA device,
            where looking would mean waiting, taken for the nearest that is inside.
        n_splits: pieces, 1 to 128; None: enough for two programs a multiprocessor, see ``launch.default_splits``. It
            changes nothing but the order of summation; "torch" has none.
        scale: of the scores, finite; None: ``1 / sqrt(head_dim)``.
        window: see the last ``window`` keys only, the own one included.
        alibi_slopes: (n_heads,), floating point: scores fall by slope times distance (Press et al. 2022).
        backend: "triton": the kernels; for inference only, head_dim 16, 32, 64, 128 or 256, not float64. "torch":
            ``F.scaled_dot_product_attention``, one sequence after the other if lengths differ (these then travel to the
            host). "reference": the formula, likewise. See :func:`minillm.kernels.choose_backend`.

    Returns: as ``query``, calculated in its dtype under autocast too. A query that sees no key, as in a sequence of
    length 0, gets zeros. Raises TypeError for dtypes, ValueError for shapes and values that are not allowed.
    """
    _check(query, key, value, lengths, n_splits, scale, window, alibi_slopes)
    head_dim, capacity = query.size(3), key.size(2)
    tensors = [tensor for tensor in (query, key, value, lengths, alibi_slopes) if tensor is not None]
    chosen = choose_backend(backend, *tensors, triton_refuses=_triton_refuses(query, key, value, alibi_slopes))
    scale = 1 / math.sqrt(head_dim) if scale is None else scale
    if n_splits is None:
        n_splits = default_splits(key.size(0) * key.size(1), capacity, multiprocessors(query.device))
    if chosen != "triton":
        with torch.autocast(query.device.type, enabled=False):  # it would narrow the products one by one
            if chosen == "torch":
                return _torch_decode(query, key, value, lengths, scale, window, alibi_slopes)
            return split_kv_decode_reference(query, key, value, lengths, n_splits, scale, window, alibi_slopes)
    output: Tensor = triton_split_kv_decode(query, key, value, lengths, n_splits, scale, window, alibi_slopes)
    return output


def _torch_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    scale: float,
    window: int | None,
    slopes: Tensor | None,
) -> Tensor:
    """One call for all sequences if they are equally long, otherwise one for each: masked keys may hold NaN."""
    batch, n_heads, n_new, head_dim = query.shape
    n_kv_heads, capacity = key.shape[1], key.shape[2]
    group = n_heads // n_kv_heads
    grouped = query.reshape(batch, n_kv_heads, group * n_new, head_dim)  # keys that heads share are read once
    filled = [capacity] if lengths is None else lengths.clamp(0, capacity).tolist()
    if len(set(filled)) == 1:
        batches = [(slice(None), filled[0])]
    else:
        batches = [(slice(i, i + 1), length) for i, length in enumerate(filled)]
    outputs = [torch.zeros_like(grouped[:0])]
    for which, length in batches:
        first = 0 if window is None else max(0, length - n_new - window + 1)  # no query sees a key before it
        places = torch.arange(length - n_new, length, device=query.device).repeat(group)
        distance = places[:, None] - torch.arange(first, length, device=query.device)  # (group * n_new, keys)
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        mask = seen[None, None]
        if slopes is not None:
            # The CPU's kernels add a float32 bias to their float32 scores; others want the dtype of the queries.
            wide = torch.promote_types(query.dtype, torch.float32)
            rows = slopes.to(wide).repeat_interleave(n_new).view(1, n_kv_heads, group * n_new, 1)
            bias = (-rows * distance).masked_fill(~seen, -math.inf)
            mask = bias if query.is_cpu else bias.to(query.dtype)
        keys, values = (cache[which, :, first:length] for cache in (key, value))
        output = F.scaled_dot_product_attention(grouped[which], keys, values, mask, scale=scale)
        outputs.append(output.masked_fill(~seen.any(-1, keepdim=True), 0.0))
    return torch.cat(outputs).view(query.shape)


def _triton_refuses(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None) -> str | None:
    learning = any(tensor is not None and tensor.requires_grad for tensor in (query, key, value, slopes))
    if torch.is_grad_enabled() and learning:
        return "the kernels are for inference and have no gradient: call them under torch.no_grad()"
    if query.dtype is torch.float64:
        return "the kernels calculate in float32, and the tensors are float64"
    if query.size(3) not in HEAD_DIMS:
        return f"head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {query.size(3)}"
    return None


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor | None,
    n_splits: int | None,
    scale: float | None,
    window: int | None,
    slopes: Tensor | None,
) -> None:
    q, k, v = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    if len(q) != 4 or len(k) != 4 or k != v or q[0] != k[0] or q[3] != k[3] or q[3] == 0:
        raise ValueError(
            "query must be (batch, n_heads, n_new, head_dim), key and value (batch, n_kv_heads, capacity, head_dim), "
            f"got {q}, {k} and {v}"
        )
    if k[1] == 0 or q[1] % k[1]:
        raise ValueError(f"the heads of query ({q[1]}) must be a multiple of the heads of key and value ({k[1]})")
    if not 1 <= q[2] <= MOST_NEW:
        raise ValueError(
            f"query must hold 1 to {MOST_NEW} new tokens a sequence, got {q[2]}: for more, flash_attention"
        )
    if not query.is_floating_point() or not query.dtype == key.dtype == value.dtype:
        raise TypeError(
            f"query, key and value must have one floating-point dtype, got {query.dtype}, {key.dtype} and {value.dtype}"
        )
    for name, number in (("n_splits", n_splits), ("window", window)):
        if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
            raise TypeError(f"{name} must be an integer, or None, got {number!r}")
    if n_splits is not None and not 1 <= n_splits <= MOST_SPLITS:
        raise ValueError(f"n_splits must be in [1, {MOST_SPLITS}], or None, got {n_splits}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a token sees itself), or None, got {window}")
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, or None, got {scale}")
    if slopes is not None and (slopes.shape != (q[1],) or not slopes.is_floating_point()):
        raise ValueError(
            f"alibi_slopes must be floating point, one for each of the {q[1]} heads, got {slopes.dtype} of shape "
            f"{tuple(slopes.shape)}"
        )
    if lengths is None:
        return
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"lengths must be int32 or int64, got {lengths.dtype}")
    if lengths.shape != (q[0],):
        raise ValueError(f"lengths must be one number for each of the {q[0]} sequences, got {tuple(lengths.shape)}")
    if lengths.is_cpu and not torch.compiler.is_compiling() and ((lengths < 0) | (lengths > k[2])).any():
        raise ValueError(f"lengths must be in [0, capacity={k[2]}], got {lengths.tolist()}")
