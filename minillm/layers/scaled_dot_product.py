"""Scaled dot-product attention: the plain version to read, and the fast one on torch's kernels."""

import math
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from minillm.layers.attention_arguments import check_attention


def causal_mask(
    query_length: int, key_length: int, *, window: int | None = None, device: torch.device | None = None
) -> Tensor:
    """Boolean (query_length, key_length), True where a query may look: at no key after its own place.

    The last query stands at the last key (as when earlier keys come from a cache), so query ``i`` sees keys
    ``j <= i + key_length - query_length``. With ``window`` it sees the last ``window`` of those, its own place included
    (sliding-window attention: Beltagy et al. 2020; Jiang et al. 2023, "Mistral 7B").
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1 (a token sees itself), got {window}")
    offset = key_length - query_length
    allowed = torch.ones(query_length, key_length, dtype=torch.bool, device=device).tril(offset)
    return allowed if window is None else allowed.triu(offset - window + 1)


@overload
def plain_scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    dropout: float = ...,
    return_weights: Literal[False] = ...,
) -> Tensor: ...
@overload
def plain_scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    dropout: float = ...,
    return_weights: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def plain_scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`scaled_dot_product_attention` written out: the version to read, and the one that can show its weights."""
    check_attention(query, key, value, mask, bias, dropout)
    if causal:
        triangle = causal_mask(query.size(2), key.size(2), device=query.device)
        mask = triangle if mask is None else triangle & mask
    weights, empty = attention_weights(query, key, mask=mask, bias=bias, scale=scale)
    weights = weights.to(value.dtype)
    output = weighted_sum(F.dropout(weights, dropout) if dropout else weights, value).masked_fill(empty, 0.0)
    return (output, weights.masked_fill(empty, 0.0)) if return_weights else output


def attention_weights(
    query: Tensor, key: Tensor, *, mask: Tensor | None, bias: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor]:
    """``softmax(query key^T * scale + bias)``, and which queries see no key; arguments as of the whole attention.

    Returns: weights (batch, n_heads, query_length, key_length), float32 (float64 for float64): a score above 65504
    would be infinite in float16. And ``empty``, boolean (batch, n_heads, query_length, 1): a row of -inf only (no key,
    none that may be seen, or a bias of -inf) would become 0/0. It is scored with zeros instead, and whoever uses the
    weights sets its output to zero: so is its gradient then, and no second matrix of weights need be kept.
    """
    batch, n_heads, query_length, head_dim = query.shape
    n_kv_heads = key.size(1)
    wide = torch.promote_types(query.dtype, torch.float32)
    # A group of query heads shares one key head. Laying the group's queries one after another makes it one matrix
    # product with that key head, so that the keys need not be repeated in memory.
    grouped = query.reshape(batch, n_kv_heads, (n_heads // n_kv_heads) * query_length, head_dim).to(wide)
    grouped = grouped * (1 / math.sqrt(head_dim) if scale is None else scale)  # smaller than the scores
    scores = grouped @ key.to(wide).transpose(-2, -1)
    scores = scores.view(batch, n_heads, query_length, key.size(2))
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    empty = (scores.detach() == -math.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0.0).softmax(-1), empty


def weighted_sum(weights: Tensor, value: Tensor) -> Tensor:
    """``weights`` (batch, n_heads, query_length, key_length) times the value head that each group of heads shares."""
    batch, n_heads, query_length, key_length = weights.shape
    n_kv_heads = value.size(1)
    grouped = weights.reshape(batch, n_kv_heads, (n_heads // n_kv_heads) * query_length, key_length)
    return (grouped @ value).view(batch, n_heads, query_length, value.size(-1))


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    dropout: float = ...,
    return_weights: Literal[False] = ...,
) -> Tensor: ...
@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    dropout: float = ...,
    return_weights: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    dropout: float = ...,
    return_weights: bool = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(query key^T * scale + bias) value`` over the keys a query may see (Vaswani et al. 2017, eq. 1).

    Runs on torch's fused kernels, which keep no scores and read shared key heads where they are; with
    ``return_weights`` on the written-out version, which gives the same numbers. On a CPU torch has no fused kernel for
    dropout, for a bias that learns and for value_dim other than head_dim: there it repeats the keys and keeps scores.

    Args:
        query: (batch, n_heads, query_length, head_dim), floating point.
        key: (batch, n_kv_heads, key_length, head_dim). n_kv_heads divides n_heads: 1 is multi-query attention (Shazeer
            2019), a number between is grouped-query attention (Ainslie et al. 2023); query head ``i`` uses key head
            ``i // (n_heads / n_kv_heads)``.
        value: (batch, n_kv_heads, key_length, value_dim).
        mask: boolean, True where a query may look; broadcasts to (batch, n_heads, query_length, key_length).
        bias: added to the scaled scores, floating point; broadcasts likewise.
        causal: no query looks at keys after its own place; the last query stands at the last key. Adds to ``mask``.
        scale: of the scores; None is ``1 / sqrt(head_dim)``.
        dropout: probability of zeroing a weight, whatever the training mode (the caller knows it).
        return_weights: give the weights too: (batch, n_heads, query_length, key_length), before dropout.

    Returns: (batch, n_heads, query_length, value_dim), and the weights if asked for. A query that may see no key gets
    zeros, never NaN. Raises TypeError for tensors of unequal dtypes, ValueError for shapes and for a mask or a bias
    that does not fit.
    """
    if return_weights:
        return plain_scaled_dot_product_attention(
            query, key, value, mask=mask, bias=bias, causal=causal, scale=scale, dropout=dropout, return_weights=True
        )
    check_attention(query, key, value, mask, bias, dropout)
    batch, n_heads, query_length, head_dim = query.shape
    n_kv_heads, key_length = key.shape[1], key.shape[2]
    group = n_heads // n_kv_heads

    if query_length == 1:  # a single query stands at the last key and sees them all
        causal = False
    if causal and not (mask is None and bias is None and query_length == key_length):
        # The kernels' own causal flag puts the first query at the first key and takes no mask beside it.
        triangle = causal_mask(query_length, key_length, device=query.device)
        mask = triangle if mask is None else triangle & mask
        causal = False
    if bias is not None:
        # The CPU's kernels add a float32 bias to their float32 scores; rounded to bfloat16, one of 100 would be off by
        # a quarter. Other devices' kernels want the dtype of the queries.
        bias = bias.to(torch.promote_types(query.dtype, torch.float32) if query.is_cpu else query.dtype)
        mask = bias if mask is None else torch.where(mask, bias, -math.inf)
    if mask is not None:  # with three axes torch leaves its fused kernels: several times slower, and keys are repeated
        mask = mask[(None,) * (4 - mask.dim())]

    if group > 1 and query_length == 1:
        # One token being generated: the heads of a group become the rows of one product with the head they share. (For
        # more queries the kernels read that head once for each query head, which then costs no more time; neither way
        # repeats it in memory.)
        if mask is not None and mask.size(1) > 1:
            mask = mask.reshape(mask.size(0), n_kv_heads, group, mask.size(3))
        grouped = query.reshape(batch, n_kv_heads, group, head_dim)
        output = F.scaled_dot_product_attention(grouped, key, value, mask, dropout, scale=scale)
        return output.reshape(batch, n_heads, 1, value.size(3))
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scale, enable_gqa=group > 1)
