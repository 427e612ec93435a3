"""What a decoder-only transformer looks like, in one frozen and validated record."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from minillm.layers.positions import RopeScaling, rope_scaling_from_dict
from minillm.models.moe_config import MoEConfig, moe_config_from_dict

_CHOICES = {
    "norm": ("layernorm", "rmsnorm"),
    "positions": ("learned", "sinusoidal", "shaw", "t5", "rope", "alibi", "none"),
    "activation": ("gelu", "gelu_tanh", "swiglu"),
}
_SIZES = (
    "vocab_size", "context_length", "d_model", "n_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff",
    "relative_buckets", "relative_distance", "window",
)  # fmt: skip
_SWITCHES = ("bias", "tied_embeddings")


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches of a :class:`minillm.models.Transformer`. Checked when made: a bad value is refused by name.

    Three sizes may be left None and are worked out at once, so that reading them always gives a number:

    - ``n_kv_heads``: ``n_heads`` (multi-head attention; 1 is multi-query, between is grouped-query).
    - ``head_dim``: ``d_model / n_heads``.
    - ``d_ff``: ``4 * d_model``; for SwiGLU, which has three matrices instead of two, ``8/3 * d_model`` rounded up to a
      multiple of 32, about as many parameters.

    To vary a config use :meth:`replace`, which works these out again.

    Fields:
        vocab_size: token ids are 0 .. vocab_size - 1.
        context_length: most tokens the model takes at once.
        d_model: width of the residual stream.
        norm, norm_eps: "layernorm" or "rmsnorm", and the number added to the variance or mean square.
        positions: how a token knows its place (chapter 04): "learned" or "sinusoidal" vectors added to the embedding
            (which sinusoidal ones multiply by ``sqrt(d_model)`` first, as Vaswani et al. 2017 do), "rope" turns queries
            and keys, "alibi" and "t5" add a bias to the scores, "shaw" adds vectors to keys and values, "none".
        rope_base, rope_scaling: for "rope"; see :class:`minillm.layers.RotaryEmbedding`.
        relative_distance: for "shaw" the farthest distance told apart, for "t5" where the last bucket begins.
        relative_buckets: for "t5", the number of distances told apart.
        window: tokens that a token sees, itself included (sliding-window attention); None is all before it.
        activation: "gelu", "gelu_tanh" (GPT-2's approximation) or "swiglu".
        bias: whether linear maps and LayerNorm have one (RMSNorm and the output head never do).
        tied_embeddings: the output head is the token embedding.
        dropout: probability, after the embedding, on attention weights and at the end of each residual branch.
        initializer_std: standard deviation of the initial weights.
        moe: experts in place of feed-forward layers (chapter 06); None is none.
    """

    vocab_size: int
    context_length: int = 256
    d_model: int = 128
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int = None  # type: ignore[assignment]  # worked out in __post_init__, so that readers see an int
    head_dim: int = None  # type: ignore[assignment]
    d_ff: int = None  # type: ignore[assignment]
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    positions: Literal["learned", "sinusoidal", "shaw", "t5", "rope", "alibi", "none"] = "learned"
    rope_base: float = 10000.0
    activation: Literal["gelu", "gelu_tanh", "swiglu"] = "gelu"
    bias: bool = True
    tied_embeddings: bool = True
    dropout: float = 0.0
    initializer_std: float = 0.02
    rope_scaling: RopeScaling | None = None
    relative_distance: int = 128
    relative_buckets: int = 32
    window: int | None = None
    moe: MoEConfig | None = None

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        for name in _SIZES:
            value = getattr(self, name)
            if value is None and name in _DERIVED:
                value = _DERIVED[name](self)
                object.__setattr__(self, name, value)
            if value is None and name == "window":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_kv_heads must divide n_heads={self.n_heads}, got {self.n_kv_heads}")
        if self.positions == "rope" and self.head_dim % 2:
            raise ValueError(f"head_dim must be even for positions='rope', got {self.head_dim}")
        if self.positions == "sinusoidal" and self.d_model % 2:
            raise ValueError(f"d_model must be even for positions='sinusoidal', got {self.d_model}")
        if self.positions == "t5" and not 2 <= self.relative_buckets < 2 * self.relative_distance:
            raise ValueError(
                "relative_buckets must be at least 2 and half of them below relative_distance for positions='t5', "
                f"got {self.relative_buckets} and {self.relative_distance}"
            )
        for name, low, high in (
            ("norm_eps", 0.0, 1.0), ("rope_base", 0.0, float("inf")), ("initializer_std", 0.0, float("inf")),
        ):  # fmt: skip
            if not low < _number(self, name) < high:
                raise ValueError(f"{name} must be above {low:g} and below {high:g}, got {getattr(self, name)}")
        if not 0.0 <= _number(self, "dropout") < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.rope_scaling is not None:
            if not isinstance(self.rope_scaling, RopeScaling):
                raise TypeError(f"rope_scaling must be None or a RoPE scaling, got {self.rope_scaling!r}")
            if self.positions != "rope":
                raise ValueError(f"rope_scaling must be None unless positions='rope', got {self.rope_scaling!r}")
        if self.moe is not None:
            if not isinstance(self.moe, MoEConfig):
                raise TypeError(f"moe must be None or a MoEConfig, got {self.moe!r}")
            if self.moe.layers is not None and self.moe.layers[-1] >= self.n_layers:
                raise ValueError(f"moe.layers must be below n_layers={self.n_layers}, got {self.moe.layers}")

    def has_experts(self, layer: int) -> bool:
        """Whether block ``layer`` (from 0) has experts."""
        return self.moe is not None and (self.moe.layers is None or layer in self.moe.layers)

    def replace(self, **changes: Any) -> "TransformerConfig":
        """A copy with ``changes``. A size at its default takes the default that follows from the changes."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, derive in _DERIVED.items():
            if (name != "head_dim" or self.d_model % self.n_heads == 0) and fields[name] == derive(self):
                fields[name] = None
        return TransformerConfig(**_known(fields | changes))

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON and TOML can hold (None where unset: drop those for TOML)."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TransformerConfig":
        """The config that :meth:`to_dict` came from; unknown fields are refused by name."""
        fields = dict(_known(fields))
        if isinstance(fields.get("rope_scaling"), dict):
            fields["rope_scaling"] = rope_scaling_from_dict(fields["rope_scaling"])
        if isinstance(fields.get("moe"), dict):
            fields["moe"] = moe_config_from_dict(fields["moe"])
        if "vocab_size" not in fields:
            raise ValueError("vocab_size is missing from the config")
        return cls(**fields)


def _head_dim(config: TransformerConfig) -> int:
    if config.d_model % config.n_heads:
        raise ValueError(f"n_heads must divide d_model={config.d_model} unless head_dim is given, got {config.n_heads}")
    return config.d_model // config.n_heads


def _d_ff(config: TransformerConfig) -> int:
    return -(-8 * config.d_model // (3 * 32)) * 32 if config.activation == "swiglu" else 4 * config.d_model


_DERIVED = {"n_kv_heads": lambda config: config.n_heads, "head_dim": _head_dim, "d_ff": _d_ff}


def _number(config: TransformerConfig, name: str) -> float:
    value = getattr(config, name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return value


def _known(fields: dict[str, Any]) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(TransformerConfig)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"unknown config field {', '.join(unknown)}; the fields are {', '.join(known)}")
    return fields
