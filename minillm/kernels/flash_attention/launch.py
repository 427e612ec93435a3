"""The custom operators ``minillm::flash_attention`` and ``minillm::flash_attention_backward``: memory, grids, gradient.

Tensors are (batch, heads, length, head_dim), or packed (heads, total, head_dim) with offsets. ``left`` and ``right``: a
query looks at that many keys before and after its own place; None for all. ``tables``: none, or the seven of
:func:`minillm.kernels.flash_attention.block_tables.block_tables`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minillm.kernels.flash_attention.tile_sizes import Direction, TileSizes, tile_sizes
from minillm.kernels.runtime import interpreted, launch, upcast, wide


def capability_of(device: torch.device) -> int:
    """90 for a GPU of compute capability 9.0; 0 under the interpreter."""
    if interpreted():
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


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

    query, key, value = _rows(query), _rows(key), _rows(value)
    output, lse = _empty_as(query), _empty_lse(query)
    if query_offsets is not None:  # there may be rows that belong to no sequence
        output.zero_()
        lse.fill_(-torch.inf)
    call = _Call(alibi_slopes, query_offsets, key_offsets, tables, scale, left, right, max_query_length, max_key_length)
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
        **_strides(query=query, key=key, value=value, output=output, lse=lse.unsqueeze(-1)),
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

    query, key, value, output, d_output = _rows(query), _rows(key), _rows(value), _rows(output), _rows(d_output)
    lse, d_lse = lse.contiguous(), d_lse.contiguous()
    delta = torch.empty_like(lse)
    d_query, d_key, d_value = _empty_as(query), _empty_as(key), _empty_as(value)
    if query_offsets is not None:
        for gradient in (d_query, d_key, d_value):
            gradient.zero_()
    call = _Call(alibi_slopes, query_offsets, key_offsets, tables, scale, left, right, max_query_length, max_key_length)
    shared = (query, key, value, d_output, lse, delta)
    strides = _strides(query=query, key=key, value=value, d_output=d_output, lse=lse.unsqueeze(-1))

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
        **_strides(output=output, d_output=d_output),
        n_tiles=n_tiles,
        n_heads=query.size(-3),
        query_length=query.size(-2),
        HEAD_DIM=query.size(-1),
        BLOCK_D=_block_d(query),
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
        **_strides(d_query=d_query),
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
        **_strides(d_key=d_key, d_value=d_value),
        n_tiles=n_tiles,
        n_key_heads=key.size(-3),
        **call.arguments(query, key, sizes, tables[3:6]),
    )
    return d_query, d_key, d_value


class _Call(NamedTuple):
    """What all of a call's kernels are told."""

    alibi_slopes: Tensor | None
    query_offsets: Tensor | None
    key_offsets: Tensor | None
    tables: Sequence[Tensor]
    scale: float
    left: int | None
    right: int | None
    max_query_length: int
    max_key_length: int

    def n_sequences(self, query: Tensor) -> int:
        return query.size(0) if self.query_offsets is None else self.query_offsets.size(0) - 1

    def tile_sizes(self, direction: Direction, query: Tensor) -> TileSizes:
        block = self.tables[6].size(-1) if self.tables else None
        return tile_sizes(direction, query.size(-1), query.dtype, capability_of(query.device), block)

    def arguments(self, query: Tensor, key: Tensor, sizes: TileSizes, lists: Sequence[Tensor]) -> dict[str, Any]:
        bounds, tiles, numbers = lists or (None, None, None)
        return {
            "slopes_ptr": self.alibi_slopes,
            "query_offsets_ptr": self.query_offsets,
            "key_offsets_ptr": self.key_offsets,
            "bounds_ptr": bounds,
            "tiles_ptr": tiles,
            "numbers_ptr": numbers,
            "masks_ptr": self.tables[6] if self.tables else None,
            "group": query.size(-3) // max(1, key.size(-3)),
            "query_length": self.max_query_length,
            "key_length": self.max_key_length,
            "scale": self.scale,
            "left": self.left or 0,
            "right": self.right or 0,
            "HEAD_DIM": query.size(-1),
            "BLOCK_D": _block_d(query),
            "BLOCK_M": sizes.block_m,
            "BLOCK_N": sizes.block_n,
            "LEFT": self.left is not None,
            "RIGHT": self.right is not None,
            "ALIBI": self.alibi_slopes is not None,
            "VARLEN": self.query_offsets is not None,
            "SPARSE": len(self.tables) > 0,
            "UPCAST": upcast(query.dtype),
            "WIDE": wide(query.dtype),
            "PRECISION": "ieee",
            "num_warps": sizes.num_warps,
            "num_stages": sizes.num_stages,
        }


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension side by side in memory, as the kernels take it for granted."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty_as(tensor: Tensor) -> Tensor:
    """New memory in the same order of dimensions, if that leaves the last one side by side."""
    empty = torch.empty_like(tensor)
    return empty if empty.stride(-1) == 1 else torch.empty_like(tensor, memory_format=torch.contiguous_format)


def _empty_lse(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:-1], dtype=torch.promote_types(query.dtype, torch.float32))


def _block_d(query: Tensor) -> int:
    return max(16, 1 << (query.size(-1) - 1).bit_length())


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Strides by the kernels' names for them; a packed tensor has one batch, at stride 0."""
    strides: dict[str, int] = {}
    for name, tensor in tensors.items():
        batch, head, row = (0, *tensor.stride())[-4:-1]
        strides |= {f"{name}_stride_b": batch, f"{name}_stride_h": head}
        if name != "lse":
            strides[f"{name}_stride_{'n' if 'key' in name or 'value' in name else 'm'}"] = row
    return strides


@flash_attention_forward.register_fake
def _(query: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _empty_as(_rows(query)), _empty_lse(query)


@flash_attention_backward.register_fake
def _(d_output: Tensor, d_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _empty_as(_rows(query)), _empty_as(_rows(key)), _empty_as(_rows(value))


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
