"""Which blocks of a transformer have experts, how many, and how tokens find them."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
        for name, lowest in (("n_experts", 1), ("k", 1), ("d_ff", 1), ("n_shared_experts", 0)):
            value = getattr(self, name)
            if value is None and name == "d_ff":
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < lowest:
                raise ValueError(f"{name} must be at least {lowest}, got {value}")
        for name in ("capacity_factor", "eval_capacity_factor"):
            factor = getattr(self, name)
            if factor is not None and not 0.0 < factor < math.inf:
                raise ValueError(f"{name} must be None or above 0 and finite, got {factor!r}")
        if self.layers is not None:  # a list where it was read from a file
            layers = tuple(self.layers)
            if not layers or any(not isinstance(layer, int) or isinstance(layer, bool) for layer in layers):
                raise TypeError(f"layers must be None or some integers, got {self.layers!r}")
            if min(layers) < 0 or len(set(layers)) < len(layers):
                raise ValueError(f"layers must be different numbers of at least 0, got {self.layers!r}")
            object.__setattr__(self, "layers", tuple(sorted(layers)))
        object.__setattr__(self, "router_options", dict(self.router_options))
        make_router(self.router, 1, self.n_experts, self.k, **self._options())  # refuses what it does not know

    def layer(self, d_model: int, d_ff: int, *, activation: Any, bias: bool) -> MixtureOfExperts:
        """One such layer, for a model of these sizes."""
        return MixtureOfExperts(
            d_model,
            self.d_ff or d_ff,
            self.n_experts,
            self.k,
            router=make_router(self.router, d_model, self.n_experts, self.k, **self._options()),
            capacity_factor=self.capacity_factor,
            eval_capacity_factor=self.eval_capacity_factor,
            activation=activation,
            bias=bias,
            n_shared_experts=self.n_shared_experts,
        )

    def _options(self) -> dict[str, Any]:
        given = {"balance_loss": self.balance_loss, "z_loss": self.z_loss}
        return {name: value for name, value in given.items() if value is not None} | dict(self.router_options)


def moe_config_from_dict(fields: Mapping[str, Any]) -> MoEConfig:
    """The config that ``dataclasses.asdict`` made; unknown fields are refused by name."""
    known = [entry.name for entry in dataclasses.fields(MoEConfig)]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"unknown moe field {', '.join(unknown)}; the fields are {', '.join(known)}")
    if "n_experts" not in fields:
        raise ValueError("n_experts is missing from the moe config")
    return MoEConfig(**fields)
