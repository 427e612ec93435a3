"""Which expert gets which tokens: counts by label, preferences, and what the expert tells about the label."""

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from minillm.layers.routers.routing import Routing

if TYPE_CHECKING:
    from minillm.layers.moe import MoERecord


@torch.no_grad()
def main_experts(record: "MoERecord | Routing") -> list[int | None]:
    """For each token the expert whose answer weighs most, the lowest number on a tie; None if no expert has the token.

    Of a record only what was not dropped counts. What :func:`minillm.plots.routing_map` colours a text by.
    """
    routing, kept = _kept(record)
    weights = torch.full_like(routing.probabilities, -math.inf)
    weights[routing.tokens[kept], routing.experts[kept]] = routing.weights[kept].to(weights.dtype)
    served = (weights > -math.inf).any(dim=1).tolist()
    return [expert if has else None for expert, has in zip(weights.argmax(dim=1).tolist(), served, strict=True)]


@torch.no_grad()
def expert_token_counts(record: "MoERecord | Routing", labels: Tensor, n_labels: int) -> Tensor:
    """How many tokens of each label each expert works on; add the results of several batches.

    Args:
        record: of one call. Dropped assignments do not count; of a :class:`Routing`, all assignments do.
        labels: integers in [0, n_labels), one for each routed token in their order, in any shape: token ids,
            positions, the number of the corpus. With a ``token_mask``: ``labels[token_mask]``.
        n_labels: how many labels there are.

    Returns: int64 (n_experts, n_labels), on the device of the record. A token with two experts counts for both.
    Raises TypeError for labels that are not integers, ValueError for another number of them or one out of range.
    """
    routing, kept = _kept(record)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype is torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if labels.numel() != routing.n_tokens:
        raise ValueError(
            f"labels must have an entry for each of the {routing.n_tokens} routed tokens, got {tuple(labels.shape)}"
        )
    if n_labels < 1:
        raise ValueError(f"n_labels must be at least 1, got {n_labels}")
    labels = labels.flatten().to(routing.experts)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < n_labels:
        raise ValueError(f"labels must lie in [0, n_labels={n_labels}), got {int(labels.min())} to {int(labels.max())}")
    pairs = routing.experts[kept] * n_labels + labels[routing.tokens[kept]]
    return torch.bincount(pairs, minlength=routing.n_experts * n_labels).view(routing.n_experts, n_labels)


def expert_lift(counts: Tensor) -> Tensor:
    """``P(expert | label) / P(expert)``: how many times more of a label's tokens an expert gets than of all tokens.

    1 is no preference. counts: (n_experts, n_labels), see :func:`expert_token_counts`. Returns float64 of that shape,
    NaN in the row of an expert or the column of a label that was never seen.
    """
    counts = _checked(counts)
    return counts * counts.sum() / (counts.sum(dim=1, keepdim=True) * counts.sum(dim=0))


class Preference(NamedTuple):
    """A label whose tokens an expert gets ``lift`` times as often as other tokens, and of which it got ``n_tokens``."""

    label: int
    n_tokens: int
    lift: float


def expert_preferences(counts: Tensor, *, top: int = 10, min_count: int = 10) -> list[list[Preference]]:
    """For each expert the labels it prefers (lift above 1), at most ``top`` of them, strongest first.

    min_count: leave out labels that the expert got less often: of a label seen twice, chance alone gives one expert
    both. On equal lift the larger count stands first, then the lower label.
    """
    for name, value, least in (("top", top, 1), ("min_count", min_count, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    lift = expert_lift(counts)
    found = []
    for row, lifts in zip(counts, lift, strict=True):
        labels = ((row >= min_count) & (lifts > 1.0)).nonzero().flatten()
        numbers = zip(labels.tolist(), row[labels].tolist(), lifts[labels].tolist(), strict=True)
        preferences = (Preference(*triple) for triple in numbers)
        found.append(sorted(preferences, key=lambda one: (-one.lift, -one.n_tokens, one.label))[:top])
    return found


class Association(NamedTuple):
    """How much two things tell about each other; see :func:`expert_information`.

    nats: the mutual information. normalised: the same over its maximum, in [0, 1]. chance: nats to be expected from a
    finite count if expert and label had nothing to do with each other; a value near it says nothing.
    """

    nats: float
    normalised: float
    chance: float


def expert_information(counts: Tensor) -> Association:
    """``I(expert; label) = sum P(e, l) log(P(e, l) / (P(e) P(l)))``: what the expert tells about the label.

    Normalised by ``min(H(expert), H(label))``, so that 1 means that one of them determines the other, whether labels
    are 2 corpora or 30,000 token ids; 0 where there is nothing to tell (one expert, one label, no tokens). Chance is
    ``(n_experts - 1)(n_labels - 1) / (2 n)`` over the experts and labels seen (Miller 1955): too high where most labels
    occur only a few times, or where a token has several experts, which are never the same one twice. The order
    of experts and labels does not change a bit of the result.
    """
    counts = _checked(counts)
    total = counts.sum()
    if total == 0:
        return Association(0.0, 0.0, 0.0)
    by_expert, by_label = counts.sum(dim=1), counts.sum(dim=0)
    nats = max(_sum(torch.xlogy(counts, expert_lift(counts)).nan_to_num()) / float(total), 0.0)
    limit = min(_sum(torch.special.entr(margin / total)) for margin in (by_expert, by_label))
    chance = (int((by_expert > 0).sum()) - 1) * (int((by_label > 0).sum()) - 1) / (2.0 * float(total))
    return Association(nats, min(nats / limit, 1.0) if limit > 0.0 else 0.0, chance)


def _kept(record: "MoERecord | Routing") -> tuple[Routing, Tensor]:
    if isinstance(record, Routing):
        return record, torch.ones_like(record.experts, dtype=torch.bool)
    return record.routing, record.kept


def _checked(counts: Tensor) -> Tensor:
    """``counts`` in float64, in which every count below 2^53 is exact."""
    if counts.dim() != 2 or 0 in counts.shape:
        raise ValueError(f"counts must be (n_experts, n_labels), neither 0, got {tuple(counts.shape)}")
    if not bool((counts >= 0).all()) or counts.isinf().any():
        raise ValueError("counts must be numbers of tokens, none negative")
    return counts.cpu().double()


def _sum(terms: Tensor) -> float:
    """The sum, taken in the order of size: the same bits in whatever order the terms come."""
    return float(terms.flatten().sort().values.sum())
