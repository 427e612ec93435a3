"""Bringing tokens to their experts and the answers back: by one-hot matrices with a capacity, or by sorting."""

import math

import torch
from torch import Tensor

from minillm.layers.experts import Experts
from minillm.layers.routers.routing import Routing


def expert_capacity(n_tokens: int, n_experts: int, k: int, capacity_factor: float) -> int:
    """``ceil(capacity_factor * k * n_tokens / n_experts)``: places that each expert has (Fedus et al. 2022, eq. 3)."""
    return math.ceil(capacity_factor * k * n_tokens / n_experts)


def kept_assignments(routing: Routing, capacity: int | None) -> Tensor:
    """bool (assignments,): those for which the expert has room, in the order of their priority."""
    if capacity is None:
        return torch.ones_like(routing.experts, dtype=torch.bool)
    return _places(routing) < capacity


def _places(routing: Routing) -> Tensor:
    """int64 (assignments,): how many earlier assignments go to the same expert."""
    one_hot = torch.nn.functional.one_hot(routing.experts, routing.n_experts)
    return (one_hot.cumsum(dim=0) * one_hot).sum(dim=1) - 1


def sorted_dispatch(x: Tensor, routing: Routing, kept: Tensor, experts: Experts) -> Tensor:
    """Dropless (or limited by ``kept``): sort the assignments by expert, run each group, add up."""
    chosen = kept.nonzero().squeeze(1)
    order = chosen[routing.experts[chosen].argsort(stable=True)]
    counts = torch.bincount(routing.experts[chosen], minlength=routing.n_experts)
    rows = experts(x[routing.tokens[order]], counts)
    rows = rows * routing.weights[order].unsqueeze(1).to(rows.dtype)
    return torch.zeros_like(x).index_add(0, routing.tokens[order], rows)


def einsum_dispatch(x: Tensor, routing: Routing, kept: Tensor, experts: Experts) -> Tensor:
    """The papers' form: dispatch and combine tensors of (n_tokens, n_experts, capacity)."""
    places = _places(routing)
    capacity = int(places[kept].max()) + 1 if bool(kept.any()) else 0
    dispatch = x.new_zeros(routing.n_tokens, routing.n_experts, capacity)
    index = (routing.tokens[kept], routing.experts[kept], places[kept])
    dispatch[index] = 1.0
    combine = x.new_zeros(dispatch.shape).index_put(index, routing.weights[kept].to(x.dtype))
    answers = experts.batched(torch.einsum("tec,td->ecd", dispatch, x))
    return torch.einsum("tec,ecd->td", combine, answers)
