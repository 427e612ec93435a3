"""Cross-attention: queries from one sequence, keys and values from another, which is read once and remembered."""

from dataclasses import dataclass
from typing import Literal, overload

from torch import Tensor, nn

from minillm.layers.attention import Attend
from minillm.layers.positions import rotate
from minillm.layers.scaled_dot_product import scaled_dot_product_attention


@dataclass(frozen=True)
class CrossMemory:
    """Keys and values of a memory, (batch, n_kv_heads, memory_length, head_dim) each: see `CrossAttention.remember`."""

    key: Tensor
    value: Tensor

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
        n_kv_heads = n_heads if n_kv_heads is None else n_kv_heads
        if n_heads < 1 or n_kv_heads < 1 or n_heads % n_kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads, got n_heads={n_heads}, n_kv_heads={n_kv_heads}")
        if head_dim is None and d_model % n_heads:
            raise ValueError(f"n_heads must divide d_model unless head_dim is given, got {n_heads} and {d_model}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.d_model, self.memory_size = d_model, d_model if memory_size is None else memory_size
        self.n_heads, self.n_kv_heads = n_heads, n_kv_heads
        self.head_dim = d_model // n_heads if head_dim is None else head_dim
        self.dropout = dropout
        self.query = nn.Linear(d_model, n_heads * self.head_dim, bias=bias)
        self.key_value = nn.Linear(self.memory_size, 2 * n_kv_heads * self.head_dim, bias=bias)
        self.output = nn.Linear(n_heads * self.head_dim, d_model, bias=bias)

    def remember(self, memory: Tensor, *, rotation: tuple[Tensor, Tensor] | None = None) -> CrossMemory:
        """Keys and values of ``memory`` (batch, memory_length, memory_size), for any number of :meth:`forward` calls.

        Args:
            rotation: cosines and sines of the memory's rotary positions, (memory_length, head_dim / 2) or
                (batch, memory_length, head_dim / 2); None turns nothing.
        """
        _check_sequence("memory", memory, self.memory_size, "memory_size")
        key, value = self.key_value(memory).chunk(2, dim=-1)
        key, value = (t.unflatten(-1, (self.n_kv_heads, self.head_dim)).transpose(1, 2) for t in (key, value))
        return CrossMemory(_turn(key, rotation, "the memory's rotation"), value)

    @overload
    def forward(
        self,
        x: Tensor,
        memory: Tensor | CrossMemory,
        *,
        rotation: tuple[Tensor, Tensor] | None = ...,
        memory_rotation: tuple[Tensor, Tensor] | None = ...,
        mask: Tensor | None = ...,
        bias: Tensor | None = ...,
        attend: Attend = ...,
        return_weights: Literal[False] = ...,
    ) -> Tensor: ...
    @overload
    def forward(
        self,
        x: Tensor,
        memory: Tensor | CrossMemory,
        *,
        rotation: tuple[Tensor, Tensor] | None = ...,
        memory_rotation: tuple[Tensor, Tensor] | None = ...,
        mask: Tensor | None = ...,
        bias: Tensor | None = ...,
        attend: Attend = ...,
        return_weights: Literal[True],
    ) -> tuple[Tensor, Tensor]: ...
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
                remembered memory is turned already: there ``memory_rotation`` is refused.
            mask: boolean, True where a query may look; broadcasts to (batch, n_heads, seq, memory_length). For padded
                memories with ``present`` (batch, memory_length) give ``present[:, None, None]``. A query that may see
                nothing gets the output map of zeros.
            bias: added to the scaled scores; broadcasts likewise.
            attend: computes the attention; any function with the signature of :func:`scaled_dot_product_attention`.
            return_weights: give the weights too.

        Returns: (batch, seq, d_model), and (batch, n_heads, seq, memory_length) if asked for. Raises ValueError for
        shapes that do not fit.
        """
        _check_sequence("x", x, self.d_model, "d_model")
        if not isinstance(memory, CrossMemory):
            memory = self.remember(memory, rotation=memory_rotation)
        elif memory_rotation is not None:
            raise ValueError("memory_rotation must be None for a remembered memory: give the rotation to remember()")
        query = self.query(x).unflatten(-1, (self.n_heads, self.head_dim)).transpose(1, 2)
        query = _turn(query, rotation, "rotation").to(memory.key.dtype)  # under autocast the memory may be wider
        attended = attend(
            query,
            memory.key,
            memory.value,
            mask=mask,
            bias=bias,
            dropout=self.dropout if self.training else 0.0,
            return_weights=return_weights,
        )
        heads, weights = attended if isinstance(attended, tuple) else (attended, None)
        out: Tensor = self.output(heads.transpose(1, 2).flatten(-2))
        return out if weights is None else (out, weights)

    def extra_repr(self) -> str:
        return f"n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}, head_dim={self.head_dim}, dropout={self.dropout}"


def _check_sequence(name: str, sequence: Tensor, size: int, size_name: str) -> None:
    if sequence.dim() != 3 or sequence.size(-1) != size:
        raise ValueError(f"{name} must be (batch, seq, {size_name}={size}), got shape {tuple(sequence.shape)}")


def _turn(heads: Tensor, rotation: tuple[Tensor, Tensor] | None, name: str) -> Tensor:
    """``heads`` (batch, heads, seq, head_dim) turned by the same angles in every head."""
    if rotation is None:
        return heads
    batch, _, seq, head_dim = heads.shape
    for angle in rotation:
        if angle.shape not in ((seq, head_dim // 2), (batch, seq, head_dim // 2)):
            raise ValueError(
                f"{name} must be cosines and sines of shape ({seq}, {head_dim // 2}) or "
                f"({batch}, {seq}, {head_dim // 2}), got {tuple(angle.shape)}"
            )
    cos, sin = (angle.unsqueeze(-3) for angle in rotation)
    return rotate(heads, cos, sin)
