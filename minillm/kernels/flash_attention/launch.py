"""The custom operators ``minillm::flash_attention`` and ``minillm::flash_attention_backward``: memory, grids, gradient.

Tensors are (batch, heads, length, head_dim), or packed (heads, total, head_dim) with offsets. ``left`` and ``right``: a
query looks at that many keys before and after its own place; None for all. ``tables``: none, or the seven of
:func:`minillm.kernels.flash_attention.block_tables.block_tables`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minillm.kernels.flash_attention.arguments import Call, block_d, empty_as, empty_lse, side_by_side, strides_of
from minillm.kernels.runtime import launch, wide


@torch.library.custom_op("minillm::flash_attention", mutates_args=())
def flash_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    alibi_slopes: Tensor | None,
    query_offsets: Tensor | None,
    key_offsets: Tensor | None,
    tables: Sequence[Tensor],
    scale: float,
    left: int | None,
    right: int | None,
    max_query_length: int,
    max_key_length: int,
) -> tuple[Tensor, Tensor]:
    """The output, laid out as query is, and the log-sum-exp of the scaled scores, (batch, n_heads, query_length)."""
    from minillm.kernels.flash_attention import kernel_forward

    query, key, value = side_by_side(query), side_by_side(key), side_by_side(value)
    output, lse = empty_as(query), empty_lse(query)
    if query_offsets is not None:  # there may be rows that belong to no sequence
        output.zero_()
        lse.fill_(-torch.inf)
    call = Call(alibi_slopes, query_offsets, key_offsets, tables, scale, left, right, max_query_length, max_key_length)
    sizes = call.tile_sizes("forward", query)
    n_tiles = -(-max_query_length // sizes.block_m)
    launch(
        kernel_forward.flash_forward,
        (n_tiles * query.size(-3) * call.n_sequences(query),),
        query,
        key,
        value,
        output,
        lse,
        **strides_of(query=query, key=key, value=value, output=output, lse=lse.unsqueeze(-1)),
        n_tiles=n_tiles,
        n_heads=query.size(-3),
        **call.arguments(query, key, sizes, tables[:3]),
    )
    return output, lse


@torch.library.custom_op("minillm::flash_attention_backward", mutates_args=())
def flash_attention_backward(
    d_output: Tensor,
    d_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    alibi_slopes: Tensor | None,
    query_offsets: Tensor | None,
    key_offsets: Tensor | None,
    tables: Sequence[Tensor],
    scale: float,
    left: int | None,
    right: int | None,
    max_query_length: int,
    max_key_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value."""
    from minillm.kernels.flash_attention import kernel_backward_delta, kernel_backward_keys, kernel_backward_queries

    query, key, value = side_by_side(query), side_by_side(key), side_by_side(value)
    output, d_output = side_by_side(output), side_by_side(d_output)
    lse, d_lse = lse.contiguous(), d_lse.contiguous()
    delta = torch.empty_like(lse)
    d_query, d_key, d_value = empty_as(query), empty_as(key), empty_as(value)
    if query_offsets is not None:
        for gradient in (d_query, d_key, d_value):
            gradient.zero_()
    call = Call(alibi_slopes, query_offsets, key_offsets, tables, scale, left, right, max_query_length, max_key_length)
    shared = (query, key, value, d_output, lse, delta)
    strides = strides_of(query=query, key=key, value=value, d_output=d_output, lse=lse.unsqueeze(-1))

    sizes = call.tile_sizes("queries", query)
    n_tiles = -(-query.size(-2) // sizes.block_m)
    launch(
        kernel_backward_delta.flash_backward_delta,
        (n_tiles * lse.numel() // max(1, query.size(-2)),),
        output,
        d_output,
        lse,
        d_lse,
        delta,
        **strides_of(output=output, d_output=d_output),
        n_tiles=n_tiles,
        n_heads=query.size(-3),
        query_length=query.size(-2),
        HEAD_DIM=query.size(-1),
        BLOCK_D=block_d(query),
        BLOCK_M=sizes.block_m,
        WIDE=wide(query.dtype),
        num_warps=sizes.num_warps,
    )
    n_tiles = -(-max_query_length // sizes.block_m)
    launch(
        kernel_backward_queries.flash_backward_queries,
        (n_tiles * query.size(-3) * call.n_sequences(query),),
        *shared,
        d_query,
        **strides,
        **strides_of(d_query=d_query),
        n_tiles=n_tiles,
        n_heads=query.size(-3),
        **call.arguments(query, key, sizes, tables[:3]),
    )
    sizes = call.tile_sizes("keys", query)
    n_tiles = -(-max_key_length // sizes.block_n)
    launch(
        kernel_backward_keys.flash_backward_keys,
        (n_tiles * key.size(-3) * call.n_sequences(query),),
        *shared,
        d_key,
        d_value,
        **strides,
        **strides_of(d_key=d_key, d_value=d_value),
        n_tiles=n_tiles,
        n_key_heads=key.size(-3),
        GROUPED=query.size(-3) > key.size(-3),
        **call.arguments(query, key, sizes, tables[3:6]),
    )
    return d_query, d_key, d_value


@flash_attention_forward.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_as(side_by_side(query)), empty_lse(query)


@flash_attention_backward.register_fake
def _(d_output: Tensor, d_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return empty_as(side_by_side(query)), empty_as(side_by_side(key)), empty_as(side_by_side(value))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, alibi_slopes, query_offsets, key_offsets, tables, *ctx.numbers = inputs
    ctx.save_for_backward(query, key, value, *output, alibi_slopes, query_offsets, key_offsets, *tables)


def _backward(ctx: Any, d_output: Tensor, d_lse: Tensor) -> tuple[Any, ...]:
    query, key, value, output, lse, alibi_slopes, query_offsets, key_offsets, *tables = ctx.saved_tensors
    gradients = flash_attention_backward(
        d_output, d_lse, query, key, value, output, lse, alibi_slopes, query_offsets, key_offsets, tables, *ctx.numbers
    )
    return (*gradients, None, None, None, [None] * len(tables), None, None, None, None, None)


flash_attention_forward.register_autograd(_backward, setup_context=_setup_context)
