"""What the closed forms need to know of a model: a few numbers and switches, no torch."""

from typing import Protocol


class AttentionShape(Protocol):
    """What one attention layer depends on."""

    @property
    def d_model(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


class CacheShape(Protocol):
    """What a KV cache depends on."""

    @property
    def n_layers(self) -> int: ...
    @property
    def n_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def window(self) -> int | None: ...


class ModelShape(AttentionShape, CacheShape, Protocol):
    """The fields of ``minillm.models.TransformerConfig`` that costs depend on; any object that has them will do."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...
    @property
    def d_ff(self) -> int: ...
    @property
    def norm(self) -> str: ...
    @property
    def positions(self) -> str: ...
    @property
    def activation(self) -> str: ...
    @property
    def bias(self) -> bool: ...
    @property
    def tied_embeddings(self) -> bool: ...
    @property
    def relative_distance(self) -> int: ...
    @property
    def relative_buckets(self) -> int: ...


def qkv_width(config: ModelShape) -> int:
    """Output size of the query, key and value maps together."""
    return (config.n_heads + 2 * config.n_kv_heads) * config.head_dim


def feed_forward_matrices(config: ModelShape) -> int:
    """Matrices of size d_model x d_ff in a block: SwiGLU has a gate beside up and down."""
    return 3 if config.activation == "swiglu" else 2
