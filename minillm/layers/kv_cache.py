"""The key/value cache: what lets a decoder generate a token without running over the text before it again.

At step ``t`` of generation the keys and values of tokens ``0 .. t-1`` are the same as they were at step ``t-1``, since
a causal model's states never depend on later tokens. Keeping them turns one step from ``O(t)`` token passes into one.

Memory: ``2 * n_layers * n_kv_heads * head_dim`` values a token (see ``minillm.costs.kv_cache_bytes_per_token``). A
model that looks back over a window only needs no more than the window: its cache rolls.
"""

import torch
from torch import Tensor


class LayerKVCache:
    """Keys and values of one attention layer, in buffers allocated once: (batch, n_kv_heads, capacity, head_dim).

    ``length`` counts the tokens that were appended.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.length = 0

    def n_keys(self, seq: int) -> int:
        """Keys that :meth:`append` will give back for ``seq`` more tokens."""
        return self.length + seq

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``key`` and ``value`` (batch, n_kv_heads, seq, head_dim) behind what is there; return views of it all.

        The values are cast to the cache's dtype. Raises ValueError if the shapes do not fit or the capacity is
        exceeded.
        """
        self._check(key, value)
        capacity, seq = self.keys.size(2), key.size(2)
        end = self.length + seq
        if end > capacity:
            raise ValueError(f"the KV cache holds {capacity} tokens: {self.length} are stored, {seq} more do not fit")
        self.keys[:, :, self.length : end] = key
        self.values[:, :, self.length : end] = value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _check(self, key: Tensor, value: Tensor) -> None:
        batch, n_kv_heads, _, head_dim = self.keys.shape
        if key.shape != (batch, n_kv_heads, key.size(2), head_dim) or value.shape != key.shape:
            raise ValueError(
                f"key and value must have shape (batch={batch}, n_kv_heads={n_kv_heads}, seq, head_dim={head_dim}) "
                f"to fit this cache, got {tuple(key.shape)} and {tuple(value.shape)}"
            )


class RollingLayerKVCache(LayerKVCache):
    """The last ``window`` tokens of one layer, however many come (Jiang et al. 2023, "Mistral 7B", section 2).

    The paper writes token ``i`` to slot ``i mod window``, which gives the keys back out of order. Here the buffers are
    a little longer than the window (:func:`rolling_capacity`): tokens are written one behind the other, and when the
    end is reached the window moves to the front, once every few tokens. So the keys always come in order of time and
    as views, and masks and biases that count distances hold as they do without a cache.
    """

    def __init__(self, keys: Tensor, values: Tensor, window: int) -> None:
        super().__init__(keys, values)
        self.window = window
        self._end = 0  # in the buffers: behind the newest token

    def n_keys(self, seq: int) -> int:
        return min(self.length, self.window - 1) + seq

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store ``key`` and ``value``; return all that a new token may see: theirs and the ``window - 1`` before them.

        The result holds until the next call. Raises ValueError if the shapes do not fit.
        """
        self._check(key, value)
        seq = key.size(2)
        before = min(self.length, self.window - 1)
        self.length += seq
        if before + seq > self.keys.size(2):  # a long prompt: its first tokens see keys that need not be kept
            start, kept = self._end - before, min(before + seq, self.window)
            everything = []
            for buffer, new in ((self.keys, key), (self.values, value)):
                both = torch.cat((buffer[:, :, start : self._end], new.to(buffer.dtype)), dim=2)
                buffer[:, :, :kept] = both[:, :, -kept:]
                everything.append(both)
            self._end = kept
            return everything[0], everything[1]
        if self._end + seq > self.keys.size(2):
            for buffer in (self.keys, self.values):
                buffer[:, :, :before] = buffer[:, :, self._end - before : self._end].clone()  # they may overlap
            self._end = before
        start, end = self._end - before, self._end + seq
        self.keys[:, :, self._end : end] = key
        self.values[:, :, self._end : end] = value
        self._end = end
        return self.keys[:, :, start:end], self.values[:, :, start:end]


def rolling_capacity(window: int) -> int:
    """Tokens that the buffers of a rolling cache hold: an eighth more than the window, at least one more.

    The window is then copied once every ``window / 8`` tokens: about eight tokens copied for each one written.
    """
    return window + max(1, window // 8)


class KVCache:
    """One :class:`LayerKVCache` for each layer of a decoder.

    Args:
        n_layers, batch_size, n_kv_heads, head_dim: the model's shape.
        capacity: tokens a row can hold; the memory is taken at once.
        window: tokens that a token can see, itself included; None is all. Where a rolling cache is smaller than
            ``capacity``, the layers are :class:`RollingLayerKVCache`, which never fill up.
        dtype, device: of the buffers.

    Attributes: ``window``, what a rolling cache keeps; None where nothing is forgotten.

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
        window: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        sizes = {"n_layers": n_layers, "batch_size": batch_size, "n_kv_heads": n_kv_heads, "head_dim": head_dim}
        sizes |= {"capacity": capacity} | ({} if window is None else {"window": window})
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.batch_size = batch_size
        self.capacity = capacity
        if window is not None and rolling_capacity(window) >= capacity:
            window = None  # all of it fits: nothing need be moved
        room = capacity if window is None else rolling_capacity(window)
        self.window = window
        self.layers: list[LayerKVCache] = []
        for _ in range(n_layers):
            shape = (batch_size, n_kv_heads, room, head_dim)
            keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
            layer = LayerKVCache(keys, values) if window is None else RollingLayerKVCache(keys, values, window)
            self.layers.append(layer)

    @property
    def length(self) -> int:
        """Tokens appended to each row (padding included)."""
        return self.layers[0].length

    def n_keys(self, seq: int) -> int:
        """Keys that ``seq`` more tokens will be given to look at, their own included."""
        return self.layers[0].n_keys(seq)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, used or not."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)
