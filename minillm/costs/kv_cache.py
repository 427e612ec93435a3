"""What a token leaves behind: bytes of the key/value cache, for every variant of attention and any length of text."""

from minillm.costs.shape import CacheShape


def kv_cache_bytes_per_token(config: CacheShape, bytes_per_value: float = 2) -> float:
    """Bytes that one token keeps over all layers: ``2 n_layers n_kv_heads head_dim bytes_per_value``.

    Args:
        config: multi-head attention keeps n_heads key heads, grouped-query attention n_kv_heads.
        bytes_per_value: 2 for bfloat16 and float16, 4 for float32, 1 for 8 bits; may be a fraction.

    For instance 512 KiB for Llama 2 7B and 128 KiB for Llama 3 8B in 2 bytes.
    """
    if not bytes_per_value > 0:
        raise ValueError(f"bytes_per_value must be positive, got {bytes_per_value}")
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * bytes_per_value


def kv_cache_bytes(
    config: CacheShape,
    n_tokens: int,
    *,
    window: int | None = None,
    batch_size: int = 1,
    bytes_per_value: float = 2,
) -> float:
    """Bytes that ``batch_size`` texts of ``n_tokens`` tokens keep: with a window they stop growing where it is full.

    ``batch_size min(n_tokens, window)`` times :func:`kv_cache_bytes_per_token`. It is the least there is to keep: a
    ``minillm.layers.KVCache`` that rolls takes an eighth more room, so as to move its keys seldom. The memory that
    cross-attention remembers has the same size, with ``n_tokens`` the memory's length.

    Args:
        window: tokens that a token sees, itself included (``W`` of Jiang et al. 2023, "Mistral 7B", section 2); None is
            the config's own, which may be None too: all tokens are kept.
        bytes_per_value: 2 for bfloat16 and float16; may be a fraction.
    """
    window = config.window if window is None else window
    for name, value in (("n_tokens", n_tokens), ("batch_size", batch_size), ("window", window)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    kept = n_tokens if window is None else min(n_tokens, window)
    return batch_size * kept * kv_cache_bytes_per_token(config, bytes_per_value)
