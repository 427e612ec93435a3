"""FlashAttention-1 and -2 as loops over tiles: attention whose matrix of scores is never in memory.

Attention needs ``S = scale Q K^T``, ``P = softmax(S)`` and ``O = P V``. Written out, S and P go to slow memory and come
back: Theta(N d + N^2) elements for N tokens of d numbers. Here a tile of S is made, used and forgotten, as online
softmax (:mod:`minillm.layers.online_softmax`) lets the output grow over tiles of keys. The two versions differ in which
loop is the outer one:

    FlashAttention-1 (Dao et al. 2022, Algorithm 1)  keys outside: K and V are loaded once, and the unfinished output
        and its two sums come and go with every tile.
    FlashAttention-2 (Dao 2023, Algorithm 1)  queries outside: output and sums stay in fast memory until they are
        finished and are divided and stored once; K and V are loaded again for every row of tiles. Rows are independent,
        so that a GPU computes them at the same time.

The backward pass keeps no P either. One number a query, ``L = log sum exp S``, gives back any tile: ``P = exp(S - L)``.

Each function takes query, key and value as :func:`minillm.layers.flash_attention` does, unchecked; computes in float32
at least; and writes what it visits, loads and stores into ``record`` if it is given one.
"""

import math

import torch
from torch import Tensor

from minillm.layers.flash_tiles import FlashSettings, Record, Walk
from minillm.layers.online_softmax import SoftmaxState, exponential_, finite


def flash_attention_1_forward(
    query: Tensor, key: Tensor, value: Tensor, settings: FlashSettings | None = None, record: Record | None = None
) -> tuple[Tensor, Tensor]:
    """FlashAttention-1: output (batch, n_heads, query_length, value_dim) and L (batch, n_heads, query_length)."""
    walk = Walk(query, key, value, settings or FlashSettings(), record)
    for name, width, start in (("output", value.size(3), 0.0), ("total", 1, 0.0), ("highest", 1, -math.inf)):
        walk.room(name, like="query", width=width)
        walk.fill(name, start)
    for column, part in walk.columns():
        keys, values = walk.load("key", part), walk.load("value", part)
        for tile in walk.tiles_of_column(column, part):
            queries, output = walk.load("query", tile.queries), walk.load("output", tile.queries)
            total, highest = walk.load("total", tile.queries), walk.load("highest", tile.queries)
            scores = walk.scores(tile, queries, keys)
            here = scores.amax(-1, keepdim=True)
            weights = exponential_(scores.sub_(finite(here)))
            risen = torch.maximum(highest, here)
            before, after = exponential_(highest - finite(risen)) * total, exponential_(here - finite(risen))
            new_total = before + after * weights.sum(-1, keepdim=True)
            kept = walk.kept(tile)
            if kept is not None:
                weights.mul_(kept)
            # What is stored is the softmax over the keys so far: undo its division, add, divide again.
            output = (before * output + after * (weights @ values)) / new_total.masked_fill(new_total == 0, 1.0)
            walk.store("output", tile.queries, output)
            walk.store("total", tile.queries, new_total)
            walk.store("highest", tile.queries, risen)
            del scores, weights, kept  # before the next tile's are made
    log_sums = walk.take("highest", query) + walk.take("total", query).log()
    return walk.take("output", query).to(query.dtype), log_sums.squeeze(-1)


def flash_attention_2_forward(
    query: Tensor, key: Tensor, value: Tensor, settings: FlashSettings | None = None, record: Record | None = None
) -> tuple[Tensor, Tensor]:
    """FlashAttention-2: output (batch, n_heads, query_length, value_dim) and L (batch, n_heads, query_length)."""
    walk = Walk(query, key, value, settings or FlashSettings(), record)
    walk.room("output", like="query", width=value.size(3))
    walk.room("log_sum", like="query", width=1)
    for row, part in walk.rows():
        queries = walk.load("query", part)
        state = SoftmaxState.empty(queries, value.size(3))
        for tile in walk.tiles_of_row(row, part):
            keys, values = walk.load("key", tile.keys), walk.load("value", tile.keys)
            state.update(walk.scores(tile, queries, keys), values, walk.kept(tile))
        output, log_sum = state.result()
        walk.store("output", part, output)
        walk.store("log_sum", part, log_sum)
    return walk.take("output", query).to(query.dtype), walk.take("log_sum", query).squeeze(-1)


def flash_attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    log_sums: Tensor,
    d_output: Tensor,
    d_log_sums: Tensor | None = None,
    settings: FlashSettings | None = None,
    record: Record | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value by recomputation of P (Dao 2023, Algorithm 2; both versions loop like this).

        dV = P^T dO      dP = dO V^T      dS = P * (dP - D)      dQ = scale dS K      dK = scale dS^T Q

    The softmax's own derivative needs ``rowsum(P * dP)``, a sum over a whole row of tiles. But ``rowsum(P * dP) =
    rowsum(P * dO V^T) = rowsum(dO * P V) = rowsum(dO * O) = D``, which is there before any tile is. ``L`` has the
    derivative ``dL/dS = P``, so that a gradient of L only changes D to ``D - dL``. With dropout P is the dropped and
    scaled one in dV and O, dP is dropped and scaled likewise, and all else stands.

    Keys are outside: dK and dV stay in fast memory and dQ comes and goes (GPUs add to it atomically).

    Args:
        output, log_sums: what the forward pass returned. d_output, d_log_sums: their gradients; None is zero.
    """
    walk = Walk(query, key, value, settings or FlashSettings(), record)
    walk.put("output", output)
    walk.put("d_output", d_output)
    # With nothing to see L is -inf; +inf makes P = exp(S - L) the zeros that it should be.
    walk.put("log_sum", log_sums.masked_fill(log_sums == -math.inf, math.inf)[..., None])
    walk.room("delta", like="query", width=1)
    for _, part in walk.rows():
        walk.store("delta", part, (walk.load("output", part) * walk.load("d_output", part)).sum(-1, keepdim=True))
    if d_log_sums is not None:
        walk.memory["delta"] -= d_log_sums.to(walk.dtype).reshape(walk.memory["delta"].shape)
    walk.room("d_query", like="query", width=query.size(3))
    walk.fill("d_query", 0.0)
    walk.room("d_key", like="key", width=key.size(3))
    walk.room("d_value", like="value", width=value.size(3))
    for column, part in walk.columns():
        keys, values = walk.load("key", part), walk.load("value", part)
        d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
        for tile in walk.tiles_of_column(column, part):
            queries, d_outputs = walk.load("query", tile.queries), walk.load("d_output", tile.queries)
            log_sum, delta = walk.load("log_sum", tile.queries), walk.load("delta", tile.queries)
            scores = walk.scores(tile, queries, keys)
            weights = exponential_(scores.sub_(log_sum))
            d_weights = d_outputs @ values.mT
            kept = walk.kept(tile)
            if kept is not None:
                d_weights.mul_(kept)
            dropped = weights if kept is None else kept.mul_(weights)
            torch.baddbmm(d_values, dropped.mT, d_outputs, out=d_values)
            d_scores = d_weights.sub_(delta).mul_(weights)
            torch.baddbmm(d_keys, d_scores.mT, queries, alpha=walk.scale, out=d_keys)
            d_query = torch.baddbmm(walk.load("d_query", tile.queries), d_scores, keys, alpha=walk.scale)
            walk.store("d_query", tile.queries, d_query)
            del scores, weights, d_weights, d_scores, kept, dropped  # before the next tile's are made
        walk.store("d_key", part, d_keys)
        walk.store("d_value", part, d_values)
    return (
        walk.take("d_query", query).to(query.dtype),
        walk.take("d_key", key).to(key.dtype),
        walk.take("d_value", value).to(value.dtype),
    )
