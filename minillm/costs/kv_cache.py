"""What a generated token leaves behind: bytes of the key/value cache."""

from minillm.costs.shape import ModelShape


def kv_cache_bytes_per_token(config: ModelShape, bytes_per_value: float = 2) -> float:
    """Bytes that one token keeps over all layers: ``2 n_layers n_kv_heads head_dim bytes_per_value``.

    Args:
        config: multi-head attention keeps n_heads key heads, grouped-query attention n_kv_heads.
        bytes_per_value: 2 for bfloat16 and float16, 4 for float32, 1 for 8 bits; may be a fraction.

    For instance 512 KiB for Llama 2 7B and 128 KiB for Llama 3 8B in 2 bytes.
    """
    if not bytes_per_value > 0:
        raise ValueError(f"bytes_per_value must be positive, got {bytes_per_value}")
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * bytes_per_value
