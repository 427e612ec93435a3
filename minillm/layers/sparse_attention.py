"""Block-sparse attention: only the live tiles of a pattern are computed, forward and backward.

The queries are taken a block at a time. The keys that any of them may see are a few ranges of the text, so the block's
scores are one matrix product with those ranges laid side by side, and a softmax over them is the whole softmax: nothing
has to be merged afterwards. For the backward pass the output and one logarithm a query are kept, and the scores are
computed again block by block (Dao et al. 2022, "FlashAttention", section 3.1): memory grows with the length, not with
its square.
"""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, overload

import torch
from torch import Tensor

from minillm.layers.attention_arguments import check_attention
from minillm.layers.block_layout import BlockLayout
from minillm.layers.scaled_dot_product import plain_scaled_dot_product_attention
from minillm.layers.sparse_algebra import Pattern
from minillm.layers.sparse_patterns import causal as causal_pattern
from minillm.layers.sparse_walk import Walk


@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    dropout: float = ...,
    return_weights: Literal[False] = ...,
    block_size: int = ...,
) -> Tensor: ...
@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    dropout: float = ...,
    return_weights: Literal[True],
    block_size: int = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    mask: Tensor | None = ...,
    bias: Tensor | None = ...,
    causal: bool = ...,
    scale: float | None = ...,
    dropout: float = ...,
    return_weights: bool = ...,
    block_size: int = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def block_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
    return_weights: bool = False,
    block_size: int = 64,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`scaled_dot_product_attention` with ``mask=pattern.dense(...)``, without the work on the dead tiles.

    ``partial(block_sparse_attention, pattern=...)`` is an ``attend`` for :class:`MultiHeadAttention`.

    Args:
        query, key, value, mask, bias, causal, scale, dropout: as in :func:`scaled_dot_product_attention`; ``mask`` and
            ``causal`` add to the pattern. A bias that is learned gets its gradient.
        pattern: which query may look at which key.
        return_weights: give the weights too. They are a dense matrix, so the dense reference computes them.
        block_size: side of a tile in tokens. Small ones follow the pattern closer, large ones compute faster.

    Computed in float32 at least; under autocast, too, the inputs' own dtype decides. Memory beyond inputs, output and
    gradients: the scores of one block of queries, twice in the backward pass; a mask for each different partial tile;
    and a copy of inputs that are narrower or whose heads lie side by side (as :class:`MultiHeadAttention` makes them).
    Differentiable once. Returns and raises what :func:`scaled_dot_product_attention` does, but that NaN or infinity in
    a hidden key reaches the queries of its tile, and a bias below -1e38 hides as -inf does.
    """
    check_attention(query, key, value, mask, bias, dropout)
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern must be a Pattern (a boolean matrix goes in as mask), got {type(pattern).__name__}")
    query_length, key_length = query.size(2), key.size(2)
    if return_weights:
        allowed = pattern.dense(query_length, key_length, device=query.device)
        return plain_scaled_dot_product_attention(
            query,
            key,
            value,
            mask=allowed if mask is None else allowed & mask,
            bias=bias,
            causal=causal,
            scale=scale,
            dropout=dropout,
            return_weights=True,
        )
    layout = (pattern & causal_pattern() if causal else pattern).blocks(query_length, key_length, block_size)
    scale = 1 / math.sqrt(query.size(3)) if scale is None else scale
    # The backward pass must drop the same weights again: it is enough to keep where the random numbers began.
    seed = int(torch.randint(2**62, ())) if dropout else 0
    arguments = (query, key, value, bias, mask, layout, scale, dropout, seed)
    output: Tensor = _BlockSparse.apply(*arguments)  # type: ignore[no-untyped-call]
    return output


def _without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """Under autocast the products would be narrowed one by one; here the inputs' dtype decides."""

    @wraps(method)
    def wrapped(ctx: Any, tensor: Tensor, *rest: Any) -> Any:
        with torch.autocast(tensor.device.type, enabled=False):
            return method(ctx, tensor, *rest)

    return wrapped


class _BlockSparse(torch.autograd.Function):
    """The walk over the rows of tiles. Shapes: n is batch * n_kv_heads, g the query heads that share a key head."""

    @staticmethod
    @_without_autocast
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        layout: BlockLayout,
        scale: float,
        dropout: float,
        seed: int,
    ) -> Tensor:
        walk = Walk(query, key, value, bias, mask, layout, scale, dropout, seed)
        output = walk.value.new_zeros(*walk.query.shape[:3], value.size(3))  # queries in dead rows stay at zero
        log_sums = walk.query.new_full((*walk.query.shape[:3], 1), math.inf)
        for number, row in enumerate(layout.rows):
            keys, values = walk.live(walk.key, row), walk.live(walk.value, row)
            scores = walk.scores(row, walk.rows_of(walk.query, row), keys)
            highest = scores.amax(-1, keepdim=True)
            highest.masked_fill_(highest == -math.inf, 0.0)  # nothing to see: every weight is 0, as it should be
            weights = scores.sub_(highest).exp2_()
            total = weights.sum(-1, keepdim=True)
            # An infinite logarithm makes the backward pass's weights of such a query zeros.
            walk.put(log_sums, row, (highest + total.log2()).masked_fill_(total == 0, math.inf))
            total.masked_fill_(total == 0, 1.0)
            if dropout:
                weights.mul_(walk.kept(number, weights))
            walk.put(output, row, torch.bmm(weights, values).div_(total))
            del scores, weights  # before the next row's are made
        output = output.to(value.dtype)
        ctx.save_for_backward(query, key, value, bias, mask, output, log_sums)
        ctx.arguments = (layout, scale, dropout, seed)
        return output.view(*query.shape[:3], value.size(3))

    @staticmethod
    @_without_autocast
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a second gradient would silently miss this part
            raise RuntimeError("block_sparse_attention is differentiable once: create_graph must be False")
        query, key, value, bias, mask, output, log_sums = ctx.saved_tensors
        layout, scale, dropout, seed = ctx.arguments
        walk = Walk(query, key, value, bias, mask, layout, scale, dropout, seed)
        gradient, output = (tensor.reshape(output.shape).to(walk.dtype) for tensor in (gradient, output))
        d_query, d_key, d_value = (torch.zeros_like(tensor) for tensor in (walk.query, walk.key, walk.value))
        d_bias = None
        if bias is not None and ctx.needs_input_grad[3]:
            d_bias = torch.zeros(walk.bias_shape, dtype=walk.dtype, device=bias.device)
        for number, row in enumerate(layout.rows):
            keys, values = walk.live(walk.key, row), walk.live(walk.value, row)
            queries, d_output = walk.rows_of(walk.query, row), walk.rows_of(gradient, row)
            weights = walk.scores(row, queries, keys).sub_(walk.rows_of(log_sums, row)).exp2_()
            d_weights = torch.bmm(d_output, values.mT)
            used = weights
            if dropout:
                kept = walk.kept(number, weights)
                used = weights * kept
                d_weights.mul_(kept)
            walk.add_product(d_value, row, used, d_output)
            # Through the softmax: dS = P * (dP - rowsum(P * dP)), and that sum is rowsum(dO * O).
            delta = (d_output * walk.rows_of(output, row)).sum(-1, keepdim=True)
            d_scores = d_weights.sub_(delta).mul_(weights)
            if d_bias is not None:
                walk.add_to_bias(d_bias, row, d_scores)
            walk.put(d_query, row, torch.bmm(d_scores, keys).mul_(scale))
            walk.add_product(d_key, row, d_scores, queries, scale)
            del weights, used, d_weights, d_scores  # before the next row's are made
        return (
            d_query.reshape(query.shape).to(query.dtype),
            d_key.view(key.shape).to(key.dtype),
            d_value.view(value.shape).to(value.dtype),
            None if d_bias is None or bias is None else d_bias.view(bias.shape).to(bias.dtype),
            *(None,) * 5,
        )
