"""What a mixture of experts did with its tokens, as plain numbers: load, drops and the router's entropy."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from minillm.layers.moe import MoERecord


@dataclass(frozen=True)
class RoutingStatistics:
    """Counts of one mixture over one or several batches; everything else follows from them.

    Fractions lie in [0, 1], entropies are in nats. Where there is nothing to divide by (no token, no assignment) a
    number is 0, so that an empty batch is all zeros.

    Attributes:
        n_tokens: tokens that were routed.
        assigned: by expert, the assignments that the router gave it.
        load: by expert, the assignments it worked on: the same without those that found it full.
        n_tokens_without_expert: tokens that no expert worked on: every assignment dropped, or chosen by nobody.
        entropy_sum: summed over the tokens, the entropy of the router's distribution over experts.
    """

    n_tokens: int
    assigned: tuple[int, ...]
    load: tuple[int, ...]
    n_tokens_without_expert: int
    entropy_sum: float

    @property
    def n_experts(self) -> int:
        return len(self.assigned)

    @property
    def n_assignments(self) -> int:
        return sum(self.assigned)

    @property
    def dropped(self) -> tuple[int, ...]:
        """By expert, the assignments for which it had no room."""
        return tuple(asked - done for asked, done in zip(self.assigned, self.load, strict=True))

    @property
    def drop_rate(self) -> float:
        """Fraction of the assignments that were dropped."""
        return _fraction(sum(self.dropped), self.n_assignments)

    @property
    def tokens_without_expert(self) -> float:
        """Fraction of the tokens that no expert worked on: they pass by the layer unchanged."""
        return _fraction(self.n_tokens_without_expert, self.n_tokens)

    @property
    def share(self) -> tuple[float, ...]:
        """By expert, its part of the assignments; the parts sum to 1. Before drops: what the router wanted."""
        return tuple(_fraction(count, self.n_assignments) for count in self.assigned)

    @property
    def entropy(self) -> float:
        """Mean entropy of the router's distribution for one token: 0 is certain, ``log n_experts`` undecided."""
        return _fraction(self.entropy_sum, self.n_tokens)

    @property
    def load_entropy(self) -> float:
        """Entropy of :attr:`share`: ``log n_experts`` when experts get the same, 0 when one gets everything."""
        return abs(math.fsum(-share * math.log(share) for share in self.share if share))

    @property
    def max_over_mean(self) -> float:
        """Assignments of the busiest expert over the mean: from 1 (balanced) to n_experts (one gets everything).

        The capacity factor from which on nothing is dropped, and how much longer than a balanced layer the slowest
        expert makes the others wait when each has its own device.
        """
        return _fraction(max(self.assigned) * self.n_experts, self.n_assignments)

    @property
    def coefficient_of_variation(self) -> float:
        """Standard deviation of :attr:`assigned` over its mean (Shazeer et al. 2017, section 4, squares it): 0 is
        balanced, ``sqrt(n_experts - 1)`` everything on one expert."""
        mean = self.n_assignments / self.n_experts
        squares = math.fsum((count - mean) ** 2 for count in self.assigned)
        return _fraction(math.sqrt(squares / self.n_experts), mean)

    @property
    def idle_experts(self) -> int:
        """Experts that no token was assigned to."""
        return sum(count == 0 for count in self.assigned) if self.n_assignments else 0

    @classmethod
    def merge(cls, parts: "Iterable[RoutingStatistics]") -> "RoutingStatistics":
        """The statistics of all batches together, each token counting once; ValueError for none or other experts."""
        parts = list(parts)
        sizes = sorted({part.n_experts for part in parts})
        if len(sizes) != 1:
            raise ValueError(f"parts must be statistics of one number of experts, got {sizes or 'none'}")
        return cls(
            sum(part.n_tokens for part in parts),
            tuple(map(sum, zip(*(part.assigned for part in parts), strict=True))),
            tuple(map(sum, zip(*(part.load for part in parts), strict=True))),
            sum(part.n_tokens_without_expert for part in parts),
            math.fsum(part.entropy_sum for part in parts),  # rounded once: the order of the batches does not show
        )

    def to_dict(self) -> dict[str, Any]:
        """All numbers by name, fit for JSON."""
        lists = {name: list(getattr(self, name)) for name in ("assigned", "load", "share")}
        balance = ("load_entropy", "max_over_mean", "coefficient_of_variation", "idle_experts")
        numbers = ("n_tokens", "drop_rate", "tokens_without_expert", "entropy", *balance)
        return {name: getattr(self, name) for name in numbers} | lists


@torch.no_grad()
def routing_statistics(record: "MoERecord") -> RoutingStatistics:
    """Load, drops and entropy of one call of a :class:`minillm.layers.MixtureOfExperts`.

    The router's distribution is ``record.routing.probabilities``, each row divided by its sum: a softmax stays what it
    is, sigmoid scores become comparable to it. A row of zeros prefers nobody: uniform. Reads from the device.
    """
    routing = record.routing
    scores = routing.probabilities.cpu().double()  # not every device has float64
    totals = scores.sum(dim=1, keepdim=True)
    distribution = torch.where(totals > 0.0, scores / totals, 1.0 / routing.n_experts)
    return RoutingStatistics(
        routing.n_tokens,
        tuple(routing.assigned.tolist()),
        tuple(record.load.tolist()),
        int((record.experts_per_token == 0).sum()),
        float(torch.special.entr(distribution).sum()),
    )


def _fraction(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
