"""Routers: who decides which expert a token goes to."""

from inspect import signature
from typing import Any

from minillm.layers.routers.expert_choice import ExpertChoiceRouter
from minillm.layers.routers.gshard import GShardRouter
from minillm.layers.routers.losses import load_balancing_loss, router_z_loss
from minillm.layers.routers.noisy_top_k import NoisyTopKRouter
from minillm.layers.routers.router import Router
from minillm.layers.routers.routing import Routing
from minillm.layers.routers.sigmoid import SigmoidRouter
from minillm.layers.routers.switch import SwitchRouter
from minillm.layers.routers.top_k import TopKRouter

ROUTERS: dict[str, type[Router]] = {
    "softmax": TopKRouter,
    "switch": SwitchRouter,
    "glam": GShardRouter,
    "noisy_top_k": NoisyTopKRouter,
    "expert_choice": ExpertChoiceRouter,
    "sigmoid": SigmoidRouter,
}


def make_router(name: str, d_model: int, n_experts: int, k: int, **options: Any) -> Router:
    """The router of that name; ``options`` are its keyword arguments. ValueError for a name or option there is not."""
    if name not in ROUTERS:
        raise ValueError(f"router must be one of {', '.join(ROUTERS)} or a Router, got {name!r}")
    known = list(signature(ROUTERS[name]).parameters)[3:]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"router {name!r} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    return ROUTERS[name](d_model, n_experts, k, **options)


__all__ = [
    "ROUTERS",
    "ExpertChoiceRouter",
    "GShardRouter",
    "NoisyTopKRouter",
    "Router",
    "Routing",
    "SigmoidRouter",
    "SwitchRouter",
    "TopKRouter",
    "load_balancing_loss",
    "make_router",
    "router_z_loss",
]
