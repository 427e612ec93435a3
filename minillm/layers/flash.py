"""Flash attention: exact attention whose matrix of scores is never in memory. The loops are in ``flash_loops``."""

from dataclasses import dataclass
from typing import Literal, overload

import torch
from torch import Tensor

from minillm.kernels.flash_attention import BlockSparse, triton_flash_attention, triton_refuses
from minillm.kernels.runtime import Backend, choose_backend
from minillm.layers.arguments import true_or_false
from minillm.layers.attention_arguments import check_attention
from minillm.layers.block_layout import BlockLayout
from minillm.layers.flash_arguments import (
    check_layout,
    check_scores,
    check_seed,
    torch_flash_attention,
    torch_refuses,
)
from minillm.layers.flash_autograd import tiled_flash_attention
from minillm.layers.flash_tiles import FlashSettings


@overload
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = ...,
    window: int | None = ...,
    alibi_slopes: Tensor | None = ...,
    scale: float | None = ...,
    layout: BlockLayout | None = ...,
    dropout: float = ...,
    seed: int | None = ...,
    return_lse: Literal[False] = ...,
    backend: Backend = ...,
) -> Tensor: ...
@overload
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = ...,
    window: int | None = ...,
    alibi_slopes: Tensor | None = ...,
    scale: float | None = ...,
    layout: BlockLayout | None = ...,
    dropout: float = ...,
    seed: int | None = ...,
    return_lse: Literal[True],
    backend: Backend = ...,
) -> tuple[Tensor, Tensor]: ...
def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    layout: BlockLayout | None = None,
    dropout: float = 0.0,
    seed: int | None = None,
    return_lse: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """``softmax(scale * query key^T) value`` over the keys that a query may see, by tiles (Dao et al. 2022; Dao 2023).

    Memory beyond inputs and outputs grows with the length, not with its square, forward and backward. A query stands at
    the place of a key, the last query at the last key: as many queries as keys, or the last few after a cache.

    Args:
        query: (batch, n_heads, query_length, head_dim), floating point.
        key: (batch, n_kv_heads, key_length, head_dim); n_kv_heads divides n_heads. Query head ``i`` uses key head
            ``i // (n_heads / n_kv_heads)``, which is not repeated in memory.
        value: (batch, n_kv_heads, key_length, value_dim).
        causal: no query looks at keys after its own place; tiles that lie there are not computed.
        window: with ``causal`` a query sees the last ``window`` keys, its own included; without it those with
            ``|place - key| < window``.
        alibi_slopes: (n_heads,), floating point: ``slope * |place - key|`` is taken from the scores. Constants: they
            get no gradient.
        scale: of the scores, finite; None is ``1 / sqrt(head_dim)``.
        layout: tiles of a sparse pattern (``Pattern.blocks(query_length, key_length, block_size)``); dead ones are not
            computed. ``causal`` and ``window`` hide more on top.
        dropout: probability of zeroing a weight, whatever the training mode; the others are scaled up. Which ones, a
            counter-based generator says (:mod:`minillm.layers.counter_random`): the same for equal ``seed``, in the
            forward and the backward pass, whatever the tiles. Only the reference has it, so that on a GPU it is slow.
        seed: of dropout, in [0, 2**64); None draws one from torch's generator.
        return_lse: give the log-sum-exp too, by which partial results are merged
            (:func:`minillm.layers.online_softmax.merge_partial_attention`).
        backend: "triton": the kernels of :mod:`minillm.kernels.flash_attention`. "torch":
            ``F.scaled_dot_product_attention``, where it keeps no scores. "reference": the loops of
            :mod:`minillm.layers.flash_loops`. See :func:`minillm.kernels.choose_backend`.

    Returns: (batch, n_heads, query_length, value_dim) in the dtype of ``query``; with ``return_lse`` also, in float32
    (float64 for float64), (batch, n_heads, query_length): the natural logarithm of the sum of exp of the scaled scores.
    A query that sees nothing gets zeros and -inf. Differentiable in both. Autocast changes neither dtype; the reference
    computes in float32 (float64 for float64). A second derivative raises RuntimeError. NaN or infinity in a key or
    value that is hidden may reach the queries of its tile; to a query of NaN torch's CPU kernels may give zeros.

    Raises TypeError and ValueError for arguments that do not fit, and for a backend that cannot do the call.
    """
    check_attention(query, key, value, None, None, dropout)
    true_or_false("return_lse", return_lse)
    check_scores(query.size(1), causal, window, alibi_slopes, scale)
    if layout is not None:
        check_layout(layout, query.size(2), key.size(2))
    if seed is not None:
        check_seed(seed)
    chosen = choose_backend(
        backend,
        *(query, key, value) if alibi_slopes is None else (query, key, value, alibi_slopes),
        triton_refuses="the kernels have no dropout"
        if dropout
        else triton_refuses(query, key, value, block_size=None if layout is None else layout.block_size),
        torch_refuses=torch_refuses(
            query, key, value, causal, window, alibi_slopes, layout=layout, dropout=dropout, return_lse=return_lse
        ),
    )
    if chosen == "torch":
        return torch_flash_attention(query, key, value, causal, scale)
    if chosen == "triton":
        sparse = None
        if layout is not None:
            states, numbers, masks = (
                part.to(query.device) for part in (layout.states, layout.mask_numbers, layout.masks)
            )
            sparse = BlockSparse(states=states, mask_numbers=numbers, masks=masks, block_size=layout.block_size)
        output, log_sums = triton_flash_attention(
            query, key, value, causal=causal, window=window, alibi_slopes=alibi_slopes, scale=scale, sparse=sparse
        )
    else:
        if dropout and seed is None:
            seed = int(torch.randint(2**63 - 1, ()))
        settings = FlashSettings(causal, window, alibi_slopes, scale, layout, dropout, seed or 0)
        output, log_sums = tiled_flash_attention(query, key, value, settings)
    return (output, log_sums) if return_lse else output


@dataclass(frozen=True, eq=False)
class FlashAttention:
    """:func:`flash_attention` as the ``attend`` of :class:`minillm.layers.MultiHeadAttention` and its like.

    window, alibi_slopes, backend: as there. What a layer passes on besides query, key and value must be what flash
    attention knows: a mask, a bias and a request for the weights are refused, as each is a matrix of all pairs.
    """

    window: int | None = None
    alibi_slopes: Tensor | None = None
    backend: Backend = "auto"

    def __call__(
        self,
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
    ) -> Tensor:
        if mask is not None:
            raise ValueError("mask must be None: flash attention never holds all pairs; use causal, window or a layout")
        if bias is not None:
            raise ValueError("bias must be None: flash attention never holds all pairs; use alibi_slopes")
        if return_weights:
            raise ValueError("return_weights must be False: flash attention never holds the weights of all pairs")
        slopes = None if self.alibi_slopes is None else self.alibi_slopes.to(query.device)
        return flash_attention(
            query,
            key,
            value,
            causal=causal,
            window=self.window,
            alibi_slopes=slopes,
            scale=scale,
            dropout=dropout,
            backend=self.backend,
        )
