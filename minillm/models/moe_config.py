"""Which blocks of a transformer have experts, how many, and how tokens find them."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from minillm.layers.moe import MixtureOfExperts
from minillm.layers.routers import make_router


@dataclass(frozen=True)
class MoEConfig:
    """The mixture of experts in the feed-forward layers of a :class:`TransformerConfig`. Checked when made.

    Fields:
        n_experts: experts in each of these layers.
        k: experts that a token uses (in expert choice: on average).
        layers: the blocks that have experts, counted from 0; None is all of them. The others keep one feed-forward
            layer: every second one in Switch and GLaM (``range(1, n_layers, 2)``), the first three in DeepSeek-V3.
        d_ff: width of an expert; None is the model's d_ff.
        router: see :class:`minillm.layers.MixtureOfExperts`, as for the two capacity factors and shared experts.
        balance_loss, z_loss: coefficients; None leaves the router its own.
        router_options: its other keyword arguments, by name.
    """

    n_experts: int
    k: int = 2
    layers: tuple[int, ...] | None = None
    d_ff: int | None = None
    router: str = "softmax"
    capacity_factor: float | None = None
    eval_capacity_factor: float | None = None
    n_shared_experts: int = 0
    balance_loss: float | None = None
    z_loss: float | None = None
    router_options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.layers is not None:  # a list where it was read from a file
            layers = tuple(self.layers) if isinstance(self.layers, Iterable) else (self.layers,)
            if any(not isinstance(layer, int) or isinstance(layer, bool) for layer in layers):
                raise TypeError(f"layers must be None or integers, got {self.layers!r}")
            if not layers or min(layers) < 0 or len(set(layers)) < len(layers):
                raise ValueError(f"layers must be different numbers of at least 0, got {self.layers!r}")
            object.__setattr__(self, "layers", tuple(sorted(layers)))
        if not isinstance(self.router_options, Mapping):
            raise TypeError(f"router_options must be a dict, got {self.router_options!r}")
        object.__setattr__(self, "router_options", dict(self.router_options))
        fields = sorted({entry.name for entry in dataclasses.fields(self)} & set(self.router_options))
        if fields:
            raise ValueError(f"router_options must not hold {', '.join(fields)}: give them as fields")
        with torch.device("meta"):  # takes no memory; what the layer refuses is refused here already
            self.layer(1, 1, activation="gelu", bias=False)

    def layer(self, d_model: int, d_ff: int, *, activation: Any, bias: bool) -> MixtureOfExperts:
        """One such layer, for a model of these sizes."""
        return MixtureOfExperts(
            d_model,
            d_ff if self.d_ff is None else self.d_ff,
            self.n_experts,
            self.k,
            router=make_router(self.router, d_model, self.n_experts, self.k, **self.options),
            capacity_factor=self.capacity_factor,
            eval_capacity_factor=self.eval_capacity_factor,
            activation=activation,
            bias=bias,
            n_shared_experts=self.n_shared_experts,
        )

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of the router."""
        fields = {"balance_loss": self.balance_loss, "z_loss": self.z_loss}
        given = {name: value for name, value in fields.items() if value is not None}
        return given | dict(self.router_options)


def moe_config_from_dict(fields: Mapping[str, Any]) -> MoEConfig:
    """The config that ``dataclasses.asdict`` made; unknown fields are refused by name."""
    known = [entry.name for entry in dataclasses.fields(MoEConfig)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"unknown moe field {', '.join(unknown)}; the fields are {', '.join(known)}")
    if "n_experts" not in fields:
        raise ValueError("n_experts is missing from the moe config")
    return MoEConfig(**fields)
