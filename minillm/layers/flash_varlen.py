"""Flash attention over packed sequences of any lengths: one after the other in memory, no padding, no mask."""

from itertools import pairwise
from typing import Literal, overload

import torch
from torch import Tensor

from minillm.kernels.flash_attention import triton_flash_attention, triton_refuses
from minillm.kernels.runtime import Backend, choose_backend
from minillm.layers.arguments import true_or_false
from minillm.layers.attention_arguments import check_attention
from minillm.layers.flash_arguments import check_scores, torch_flash_attention, torch_refuses
from minillm.layers.flash_autograd import tiled_flash_attention
from minillm.layers.flash_tiles import FlashSettings


@overload
def flash_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor | None = ...,
    *,
    causal: bool = ...,
    window: int | None = ...,
    alibi_slopes: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...
@overload
def flash_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor | None = ...,
    *,
    causal: bool = ...,
    window: int | None = ...,
    alibi_slopes: Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...
def flash_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor | None = None,
    *,
    causal: bool = False,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`minillm.layers.flash_attention` for sequences of unequal lengths, packed: none sees a key of another.

    The queries of sequence ``s`` are ``query[:, query_offsets[s] : query_offsets[s + 1]]``, its keys and values
    likewise.

    Args:
        query: (n_heads, total queries, head_dim), floating point.
        key, value: (n_kv_heads, total keys, head_dim) and (n_kv_heads, total keys, value_dim).
        query_offsets: int32 or int64 (n_sequences + 1,): 0 first, then where each sequence ends. They are read: on a
            GPU the call waits for what is computed before it.
        key_offsets: of the keys, for as many sequences; None: those of the queries. The last query of each sequence
            stands at its last key; a sequence may have no queries or no keys.
        causal, window, alibi_slopes, scale, return_lse, backend: as in :func:`minillm.layers.flash_attention`. Triton
            computes all sequences in one launch, the other two one after the other.

    Returns: (n_heads, total queries, value_dim), and log-sum-exp (n_heads, total queries) if asked for. Raises as
    :func:`minillm.layers.flash_attention` does, and for offsets that do not cut the tensors into sequences.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must be packed, (heads, total, width), got shape {tuple(tensor.shape)}")
    check_attention(query[None], key[None], value[None], None, None, 0.0)
    true_or_false("return_lse", return_lse)
    check_scores(query.size(0), causal, window, alibi_slopes, scale)
    query_lengths = _lengths("query_offsets", query_offsets, query.size(1))
    if key_offsets is None:
        key_offsets, key_lengths = query_offsets, _lengths("query_offsets, for keys too,", query_offsets, key.size(1))
    else:
        key_lengths = _lengths("key_offsets", key_offsets, key.size(1))
    if query_offsets.numel() != key_offsets.numel():
        raise ValueError(
            "query_offsets and key_offsets must be of as many sequences, "
            f"got {query_offsets.numel() - 1} and {key_offsets.numel() - 1}"
        )
    query_parts, key_parts, value_parts = (
        torch.split(tensor[None], lengths, 2)
        for tensor, lengths in ((query, query_lengths), (key, key_lengths), (value, key_lengths))
    )
    sequences = list(zip(query_parts, key_parts, value_parts, strict=True))
    reasons = (torch_refuses(*parts, causal, window, alibi_slopes, return_lse=return_lse) for parts in sequences)
    chosen = choose_backend(
        backend,
        *(query, key, value) if alibi_slopes is None else (query, key, value, alibi_slopes),
        triton_refuses=triton_refuses(query, key, value),
        torch_refuses=next(filter(None, reasons), None),
    )
    if chosen == "triton":
        output, log_sums = triton_flash_attention(
            query,
            key,
            value,
            causal=causal,
            window=window,
            alibi_slopes=alibi_slopes,
            scale=scale,
            query_offsets=query_offsets.to(query.device),
            key_offsets=key_offsets.to(query.device),
            max_query_length=max(query_lengths, default=0),
            max_key_length=max(key_lengths, default=0),
        )
        return (output, log_sums) if return_lse else output
    if chosen == "torch":
        return torch.cat([torch_flash_attention(*parts, causal, scale) for parts in sequences], 2)[0]
    settings = FlashSettings(causal, window, alibi_slopes, scale)
    results = [tiled_flash_attention(*parts, settings) for parts in sequences]
    packed = torch.cat([output for output, _ in results], 2)[0]
    return (packed, torch.cat([log_sums for _, log_sums in results], 2)[0]) if return_lse else packed


def _lengths(name: str, offsets: Tensor, total: int) -> list[int]:
    if offsets.dim() != 1 or offsets.dtype not in (torch.int32, torch.int64) or not offsets.numel():
        raise ValueError(
            f"{name} must be int32 or int64 (n_sequences + 1,), got {offsets.dtype} {tuple(offsets.shape)}"
        )
    ends = offsets.tolist()
    lengths = [stop - start for start, stop in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != total or min(lengths, default=0) < 0:
        raise ValueError(f"{name} must rise from 0 to the {total} tokens that there are, got {ends}")
    return lengths or [0]  # no sequence is one of no tokens
