"""Bringing tokens to their experts and the answers back: by sorting, or by one-hot matrices with a capacity.

Sorting has four steps, each a function of its own: :func:`plan_dispatch`, :func:`permute`, the experts,
:func:`unpermute`. Rows sorted by expert with the number for each are also what an all-to-all sends where experts live
on several ranks.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from minillm.layers.experts import Experts
from minillm.layers.routers.routing import Routing


def expert_capacity(n_tokens: int, n_experts: int, k: int, capacity_factor: float) -> int:
    """``ceil(capacity_factor * k * n_tokens / n_experts)``: places that each expert has (Fedus et al. 2022, eq. 3).

    At least 1 where there are tokens, and at most n_tokens, which is room for all. The factor is taken as it is
    written: 1.1 is eleven tenths, not the number a little above that a float holds.
    """
    if n_tokens == 0:
        return 0
    places = math.ceil(Fraction(repr(float(capacity_factor))) * k * n_tokens / n_experts)
    return min(max(1, places), n_tokens)


def kept_assignments(routing: Routing, capacity: int | None) -> Tensor:
    """bool (assignments,): those for which the expert has room, in the order of their priority; None is room for all.

    What is False here is what an expert leaves out: it stays in :class:`minillm.layers.MoERecord` to be counted.
    """
    if capacity is None:
        return torch.ones_like(routing.experts, dtype=torch.bool)
    return _places(routing) < capacity


def _places(routing: Routing) -> Tensor:
    """int64 (assignments,): how many earlier assignments go to the same expert."""
    experts, order = routing.experts.sort(stable=True)
    starts = torch.searchsorted(experts, torch.arange(routing.n_experts, device=experts.device))
    place = torch.arange(len(order), device=experts.device) - starts[experts]
    return torch.empty_like(order).scatter_(0, order, place)


@dataclass(frozen=True)
class DispatchPlan:
    """Where the rows of the experts come from.

    Attributes:
        order: int64 (assignments,): row r is assignment ``order[r]``; by expert, within one by priority, the dropped
            last.
        tokens: int64 (assignments,): row r is token ``tokens[r]``.
        counts: int64 (n_experts,): rows of each expert; less than all in sum if some are dropped.
        places: int64 (k, n_tokens), the row of token t's choice c; None if tokens differ in their number of experts.
    """

    order: Tensor
    tokens: Tensor
    counts: Tensor
    places: Tensor | None


def plan_dispatch(routing: Routing, kept: Tensor) -> DispatchPlan:
    """Sort the assignments by expert. Reads no value, so that a GPU need not wait."""
    experts, order = routing.experts.masked_fill(~kept, routing.n_experts).sort(stable=True)
    ends = torch.searchsorted(experts, torch.arange(routing.n_experts, device=experts.device), right=True)
    places = None
    if routing.choices is not None:
        rows = torch.arange(len(order), device=order.device)
        places = torch.empty_like(order).scatter_(0, order, rows).view(routing.choices, routing.n_tokens)
    return DispatchPlan(order, routing.tokens[order], ends.diff(prepend=ends.new_zeros(1)), places)


def permute(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Tokens (n_tokens, d_model) to the experts' rows (assignments, d_model)."""
    if plan.places is None:
        return x.index_select(0, plan.tokens)
    rows: Tensor = _Permute.apply(x, plan.tokens, plan.places)  # type: ignore[no-untyped-call]
    return rows


def unpermute(rows: Tensor, weights: Tensor, plan: DispatchPlan, n_tokens: int) -> Tensor:
    """The experts' rows to tokens: ``out_t = sum of weight * row`` over the rows of token t.

    Args:
        rows: (assignments, d_model), in the order of the plan.
        weights: (assignments,), in the order of the routing.

    Returns: (n_tokens, d_model) in float32, or in float64 if one of them is: half precision is summed without rounding.
    """
    if plan.places is None:
        weighted = rows * weights.index_select(0, plan.order).unsqueeze(1)  # weights are float32 or float64
        return weighted.new_zeros(n_tokens, rows.size(1)).index_add(0, plan.tokens, weighted)
    parts = (rows, weights, plan.order, plan.tokens, plan.places)
    out: Tensor = _Unpermute.apply(*parts)  # type: ignore[no-untyped-call]
    return out


def sorted_dispatch(x: Tensor, routing: Routing, kept: Tensor, experts: Experts) -> Tensor:
    """Each token's ``sum of weight * expert(x)`` over its kept assignments: dropless if all are kept.

    Its cost follows the assignments, whatever the number of experts. (n_tokens, d_model) to the same, in the type of x.
    """
    way = plan_dispatch(routing, kept)
    rows = experts(permute(x, way), way.counts)
    return unpermute(rows, routing.weights, way, routing.n_tokens).to(x.dtype)


def einsum_dispatch(x: Tensor, routing: Routing, kept: Tensor, experts: Experts) -> Tensor:
    """The same sums by the papers' dispatch and combine tensors, both (n_tokens, n_experts, capacity).

    ``dispatch[t, e, c]`` is 1 where token t has place c of expert e; combine has the routing weight there (Lepikhin et
    al. 2021, "GShard", algorithm 1 and section 3.2; so in Mesh TensorFlow's Switch). All shapes are fixed by the
    capacity, which compilers for TPUs want; but moving a token this way costs n_experts * capacity products.
    """
    places = _places(routing)
    capacity = int(places[kept].max()) + 1 if bool(kept.any()) else 0
    index = (routing.tokens[kept], routing.experts[kept], places[kept])
    dispatch = x.new_zeros(routing.n_tokens, routing.n_experts, capacity)
    dispatch[index] = 1.0
    answers = experts.batched(torch.einsum("tec,td->ecd", dispatch, x))
    with torch.autocast(x.device.type, enabled=False):
        combine = routing.weights.new_zeros(dispatch.shape).index_put(index, routing.weights[kept])
        dtype = torch.promote_types(combine.dtype, answers.dtype)
        return torch.einsum("tec,ecd->td", combine.to(dtype), answers.to(dtype)).to(x.dtype)


class _Permute(torch.autograd.Function):
    """``x[tokens]``, whose gradient is gathered: in a fixed order, unlike what scattering with atomic sums gives."""

    @staticmethod
    def forward(x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        return x.index_select(0, tokens)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, *d_rows: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        exact = torch.promote_types(d_rows[0].dtype, torch.float32)
        d_x = d_rows[0].index_select(0, places[0]).to(exact)
        for place in places[1:]:
            d_x = d_x + d_rows[0].index_select(0, place)
        return d_x.to(d_rows[0].dtype), None, None


class _Unpermute(torch.autograd.Function):
    """``sum over choices c of weights[c] * rows[places[c]]``, without a copy of the rows in float32."""

    @staticmethod
    def forward(rows: Tensor, weights: Tensor, order: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        by_choice = weights.reshape(places.shape).unsqueeze(2)  # (k, n_tokens, 1)
        out = rows.index_select(0, places[0]) * by_choice[0]
        for place, weight in zip(places[1:], by_choice[1:], strict=True):
            out.addcmul_(rows.index_select(0, place).to(out.dtype), weight)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, order, tokens, places = ctx.saved_tensors
        d_out, d_rows, d_weights = d_outputs[0], None, None
        if ctx.needs_input_grad[0]:
            d_rows = (d_out.index_select(0, tokens) * weights.index_select(0, order).unsqueeze(1)).to(rows.dtype)
        if ctx.needs_input_grad[1]:
            d_weights = torch.cat([(rows.index_select(0, place) * d_out).sum(1) for place in places]).to(weights.dtype)
        return d_rows, d_weights, None, None, None
