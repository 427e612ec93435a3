"""The key/value cache: what lets a decoder generate a token without running over the text before it again.

At step ``t`` of generation the keys and values of tokens ``0 .. t-1`` are the same as they were at step ``t-1``, since
a causal model's states never depend on later tokens. Keeping them turns one step from ``O(t)`` token passes into one.

Memory: ``2 * n_layers * n_kv_heads * head_dim`` values a token (see ``minillm.costs.kv_cache_bytes_per_token``).
"""

import torch
from torch import Tensor


class LayerKVCache:
    """Keys and values of one attention layer, in buffers allocated once: (batch, n_kv_heads, capacity, head_dim)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``key`` and ``value`` (batch, n_kv_heads, seq, head_dim) behind what is there; return views of it all.

        The values are cast to the cache's dtype. Raises ValueError if the shapes do not fit or the capacity is
        exceeded.
        """
        batch, n_kv_heads, capacity, head_dim = self.keys.shape
        seq = key.size(2)
        if key.shape != (batch, n_kv_heads, seq, head_dim) or value.shape != key.shape:
            raise ValueError(
                f"key and value must have shape (batch={batch}, n_kv_heads={n_kv_heads}, seq, head_dim={head_dim}) "
                f"to fit this cache, got {tuple(key.shape)} and {tuple(value.shape)}"
            )
        end = self.length + seq
        if end > capacity:
            raise ValueError(f"the KV cache holds {capacity} tokens: {self.length} are stored, {seq} more do not fit")
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class KVCache:
    """One :class:`LayerKVCache` for each layer of a decoder.

    Args:
        n_layers, batch_size, n_kv_heads, head_dim: the model's shape.
        capacity: tokens a row can hold; the memory is taken at once.
        dtype, device: of the buffers.

    ``Transformer.new_cache`` makes a fitting one. Not differentiable: for generation, under ``torch.no_grad``.
    """

    def __init__(
        self,
        n_layers: int,
        batch_size: int,
        n_kv_heads: int,
        head_dim: int,
        capacity: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = {"n_layers": n_layers, "batch_size": batch_size, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
        for name, size in (sizes | {"capacity": capacity}).items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        shape = (batch_size, n_kv_heads, capacity, head_dim)
        self.batch_size = batch_size
        self.capacity = capacity
        self.layers = [
            LayerKVCache(torch.empty(shape, dtype=dtype, device=device), torch.empty(shape, dtype=dtype, device=device))
            for _ in range(n_layers)
        ]

    @property
    def length(self) -> int:
        """Tokens stored in each row (padding included)."""
        return self.layers[0].length

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, used or not."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)
