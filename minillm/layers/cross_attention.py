"""Cross-attention: queries from one sequence, keys and values from another, which is read once and remembered."""

from dataclasses import dataclass

from torch import Tensor, nn

from minillm.layers.heads import Attend, check_sequence, head_sizes, turn
from minillm.layers.scaled_dot_product import scaled_dot_product_attention


@dataclass(frozen=True)
class CrossMemory:
    """Keys and values of a memory, (batch, n_kv_heads, memory_length, head_dim) each: see `CrossAttention.remember`.

    ``turned`` says whether the keys were turned by rotary positions.
    """

    key: Tensor
    value: Tensor
    turned: bool

    @property
    def nbytes(self) -> int:
        """Bytes that keys and values take: ``2 batch n_kv_heads memory_length head_dim`` values."""
        return self.key.nbytes + self.value.nbytes


class CrossAttention(nn.Module):
    """Attention from a sequence to another, the memory: a decoder reads an encoder (Vaswani et al. 2017, section 3.2).

    The keys and values depend on the memory only, so a decoder that writes token by token makes them once::

        remembered = cross.remember(encoder_output)
        for token in ...:
            x = cross(x, remembered)

    Args:
        d_model: width of ``x`` and of the result.
        n_heads, n_kv_heads: query heads, and key and value heads (None: as many; must divide n_heads).
        head_dim: None is d_model / n_heads.
        memory_size: width of the memory; None is d_model.
        bias: whether the three linear maps have one.
        dropout: probability of zeroing an attention weight in training.

    Attributes: ``query`` (d_model to n_heads * head_dim), ``key_value`` (memory_size to 2 * n_kv_heads * head_dim: the
    rows of the key heads, then those of the value heads), ``output``.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        n_kv_heads: int | None = None,
        head_dim: int | None = None,
        memory_size: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.n_kv_heads, self.head_dim = head_sizes(d_model, n_heads, n_kv_heads, head_dim, dropout)
        self.d_model, self.memory_size = d_model, d_model if memory_size is None else memory_size
        if self.memory_size < 1:
            raise ValueError(f"memory_size must be at least 1, got {memory_size}")
        self.n_heads, self.dropout = n_heads, dropout
        self.query = nn.Linear(d_model, n_heads * self.head_dim, bias=bias)
        self.key_value = nn.Linear(self.memory_size, 2 * self.n_kv_heads * self.head_dim, bias=bias)
        self.output = nn.Linear(n_heads * self.head_dim, d_model, bias=bias)

    def remember(self, memory: Tensor, *, rotation: tuple[Tensor, Tensor] | None = None) -> CrossMemory:
        """Keys and values of ``memory`` (batch, memory_length, memory_size), for any number of :meth:`forward` calls.

        Args:
            rotation: cosines and sines of the memory's rotary positions, (memory_length, head_dim / 2) or
                (batch, memory_length, head_dim / 2); None turns nothing.
        """
        check_sequence("memory", memory, self.memory_size, "memory_size")
        key, value = self.key_value(memory).chunk(2, dim=-1)
        key, value = (t.unflatten(-1, (self.n_kv_heads, self.head_dim)).transpose(1, 2) for t in (key, value))
        return CrossMemory(turn(key, rotation, "the memory's rotation"), value, rotation is not None)

    def forward(
        self,
        x: Tensor,
        memory: Tensor | CrossMemory,
        *,
        rotation: tuple[Tensor, Tensor] | None = None,
        memory_rotation: tuple[Tensor, Tensor] | None = None,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        attend: Attend = scaled_dot_product_attention,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from ``x`` (batch, seq, d_model) to ``memory``.

        Args:
            memory: (batch, memory_length, memory_size), or what :meth:`remember` made of it.
            rotation, memory_rotation: cosines and sines of the rotary positions (``RotaryEmbedding.cos_sin``) of ``x``
                and of ``memory``, each (seq, head_dim / 2) or (batch, seq, head_dim / 2) of its own sequence. A
                remembered memory is turned already: there ``memory_rotation`` is refused. Both sides or neither.
            mask: boolean, True where a query may look; broadcasts to (batch, n_heads, seq, memory_length). For padded
                memories with ``present`` (batch, memory_length) give ``present[:, None, None]``. A query that may see
                nothing gets the output map of zeros.
            bias: added to the scaled scores; broadcasts likewise.
            attend: computes the attention; any function with the signature of :func:`scaled_dot_product_attention`.
            return_weights: give the weights too.

        Returns: (batch, seq, d_model), and (batch, n_heads, seq, memory_length) if asked for. Raises ValueError for
        shapes that do not fit.
        """
        check_sequence("x", x, self.d_model, "d_model")
        if not isinstance(memory, CrossMemory):
            memory = self.remember(memory, rotation=memory_rotation)
        elif memory_rotation is not None:
            raise ValueError("memory_rotation must be None for a remembered memory: give the rotation to remember()")
        if (rotation is not None) != memory.turned:
            sides = ("the memory's keys", "the queries") if memory.turned else ("the queries", "the memory's keys")
            raise ValueError(f"rotation turns {sides[0]} only: give the angles of {sides[1]} too, or none")
        query = self.query(x).unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)
        query = turn(query, rotation, "rotation")
        attended = attend(
            query.to(memory.key.dtype),  # a memory made under autocast may be narrower, one made outside it wider
            memory.key,
            memory.value,
            mask=mask,
            bias=bias,
            dropout=self.dropout if self.training else 0.0,
            return_weights=return_weights,
        )
        heads, weights = attended if isinstance(attended, tuple) else (attended, None)
        out: Tensor = self.output(heads.to(query.dtype).transpose(1, 2).flatten(-2))
        return out if weights is None else (out, weights)

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}, head_dim={self.head_dim}, dropout={self.dropout}"
