"""What one attention layer costs in closed form: operations and the bytes kept for the backward pass.

One pair of functions serves every variant, told apart by a few numbers:

- multi-head, grouped-query, multi-query: ``n_kv_heads`` of the config. Only the key and value projections and what is
  kept of them shrink; each query head still scores each key, so scores cost the same.
- self-attention, a step of generation (``cached``), cross-attention (``memory_length``, and ``remembered`` once its
  keys and values are made).
- written out, with all scores in memory, or fused: flash attention keeps one number for each row of scores.
- causal, sliding-window, sparse: ``live``, the share of the pairs of a query and a key that is computed, from
  :func:`live_fraction` or from a sparse pattern's blocks.

Operations are those of the matrix products, two for each multiplication and addition (see ``minillm.costs.flops``).
"""

from minillm.costs.arguments import at_least
from minillm.costs.shape import AttentionShape


def live_pairs(query_length: int, key_length: int | None = None, *, window: int | None = None) -> int:
    """Pairs of a query and a key that a causal mask lets through: ``query_length (query_length + 1) / 2`` when square.

    Args:
        key_length: None is query_length. The last query stands at the last key; it may not be shorter than that.
        window: keys that a query sees, its own included; None is all before it.
    """
    key_length = query_length if key_length is None else key_length
    window = key_length if window is None else window
    at_least(1, query_length=query_length, window=window)
    at_least(query_length, key_length=key_length)
    # The first query sees key_length - query_length + 1 keys, each next one more, until the window is full.
    first = min(key_length - query_length + 1, window)
    growing = min(window - first, query_length)
    return growing * first + growing * (growing - 1) // 2 + (query_length - growing) * min(window, key_length)


def live_fraction(query_length: int, key_length: int | None = None, *, window: int | None = None) -> float:
    """:func:`live_pairs` as a share of all pairs: a half of a long text; ``window / length`` with a short window."""
    pairs = live_pairs(query_length, key_length, window=window)
    return pairs / (query_length * (query_length if key_length is None else key_length))


def attention_flops_by_part(
    config: AttentionShape,
    seq: int,
    *,
    batch_size: int = 1,
    cached: int = 0,
    memory_length: int | None = None,
    memory_size: int | None = None,
    remembered: bool = False,
    live: float = 1.0,
) -> dict[str, int]:
    """Operations of one layer's forward pass; the backward pass takes twice as many.

    Args:
        seq: queries.
        cached: keys and values that a cache holds from before: a step of generation has seq = 1. A rolling cache holds
            at most ``window - 1``, whatever the config's window: give the number that is there.
        memory_length, memory_size: cross-attention to a memory of this length and width (None: d_model).
        remembered: the memory's keys and values are there already.
        live: share of the pairs of a query and a key that is computed; 1 is what an implementation computes that masks
            the scores.

    Keys: query, key_value, output (the projections), scores (``query key^T``), weighted_sum (``weights value``).
    """
    keys, made, width = _lengths(config, seq, batch_size, cached, memory_length, memory_size, remembered, live)
    heads = config.n_heads * config.head_dim
    pairs = round(live * seq * keys)
    parts = {
        "query": seq * config.d_model * heads,
        "key_value": made * width * 2 * config.n_kv_heads * config.head_dim,
        "scores": pairs * heads,
        "weighted_sum": pairs * heads,
        "output": seq * heads * config.d_model,
    }
    return {name: 2 * batch_size * products for name, products in parts.items()}


def attention_flops(
    config: AttentionShape,
    seq: int,
    *,
    batch_size: int = 1,
    cached: int = 0,
    memory_length: int | None = None,
    memory_size: int | None = None,
    remembered: bool = False,
    live: float = 1.0,
) -> int:
    """The sum of :func:`attention_flops_by_part`: ``8 seq d_model**2 + 4 seq**2 d_model`` for plain self-attention."""
    parts = attention_flops_by_part(
        config,
        seq,
        batch_size=batch_size,
        cached=cached,
        memory_length=memory_length,
        memory_size=memory_size,
        remembered=remembered,
        live=live,
    )
    return sum(parts.values())


def attention_activation_bytes_by_part(
    config: AttentionShape,
    seq: int,
    *,
    batch_size: int = 1,
    memory_length: int | None = None,
    memory_size: int | None = None,
    fused: bool = True,
    dropout: bool = False,
    live: float = 1.0,
    bytes_per_value: float = 2,
) -> dict[str, float]:
    """Bytes that one layer keeps from its forward pass for its backward pass, parameters aside.

    Args:
        seq, batch_size, memory_length, memory_size, live: as in :func:`attention_flops_by_part`.
        fused: the scores are never in memory as a whole (Dao et al. 2022, "FlashAttention", section 3.1): of each row
            of weights only the logarithm of its sum is kept, in float32. Otherwise the weights are: the term that grows
            with ``seq**2`` (``5 a s**2 b`` of Korthikanti et al. 2022, section 4.1, with dropout).
        dropout: of the weights; when they are in memory it keeps a byte a weight, and the weights that it let through
            (as on a GPU: torch's dropout on a CPU keeps a whole number, and its fused kernel there has no dropout).
        bytes_per_value: of an activation: 2 for bfloat16 and float16, 4 for float32.

    Keys: input (what the projections read, the memory included), query, key_value, weights, heads (what the output
    projection reads).
    """
    keys, _, width = _lengths(config, seq, batch_size, 0, memory_length, memory_size, False, live)
    if not bytes_per_value > 0:
        raise ValueError(f"bytes_per_value must be positive, got {bytes_per_value}")
    pairs = live * seq * keys
    if fused:
        weights = 4.0 * seq
    else:
        weights = pairs * (2 * bytes_per_value + 1) if dropout else pairs * bytes_per_value
    memory = 0 if memory_length is None else memory_length * width
    parts = {
        "input": (seq * config.d_model + memory) * bytes_per_value,
        "query": seq * config.n_heads * config.head_dim * bytes_per_value,
        "key_value": 2 * keys * config.n_kv_heads * config.head_dim * bytes_per_value,
        "weights": config.n_heads * weights,
        "heads": seq * config.n_heads * config.head_dim * bytes_per_value,
    }
    return {name: batch_size * size for name, size in parts.items()}


def attention_activation_bytes(
    config: AttentionShape,
    seq: int,
    *,
    batch_size: int = 1,
    memory_length: int | None = None,
    memory_size: int | None = None,
    fused: bool = True,
    dropout: bool = False,
    live: float = 1.0,
    bytes_per_value: float = 2,
) -> float:
    """The sum of :func:`attention_activation_bytes_by_part`."""
    parts = attention_activation_bytes_by_part(
        config,
        seq,
        batch_size=batch_size,
        memory_length=memory_length,
        memory_size=memory_size,
        fused=fused,
        dropout=dropout,
        live=live,
        bytes_per_value=bytes_per_value,
    )
    return sum(parts.values())


def _lengths(
    config: AttentionShape,
    seq: int,
    batch_size: int,
    cached: int,
    memory_length: int | None,
    memory_size: int | None,
    remembered: bool,
    live: float,
) -> tuple[int, int, int]:
    """Keys looked at, keys made from an input, and that input's width; bad numbers are refused."""
    at_least(1, seq=seq, batch_size=batch_size)
    at_least(0, cached=cached)
    if not 0.0 <= live <= 1.0:
        raise ValueError(f"live must be a share from 0 to 1, got {live}")
    if memory_length is None:
        if memory_size is not None or remembered:
            raise ValueError("memory_size and remembered are for cross-attention: give memory_length too")
        return cached + seq, seq, config.d_model
    if cached:
        raise ValueError(f"cached must be 0 for cross-attention, whose keys are the memory's, got {cached}")
    width = config.d_model if memory_size is None else memory_size
    at_least(1, memory_length=memory_length, memory_size=width)
    return memory_length, 0 if remembered else memory_length, width
