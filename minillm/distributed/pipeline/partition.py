"""Cutting a row of layers into stages of about the same work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate


def partition(costs: Sequence[float], n_parts: int) -> tuple[int, ...]:
    """Cut layers into parts in a row, none empty, so that the greatest sum of costs in a part is as small as can be.

    The slowest stage sets the pace of a pipeline. With A(j, k) the least greatest sum of the first j layers in k parts,

        A(j, k) = min over i < j of max(A(i, k - 1), costs[i] + ... + costs[j - 1]),

    as in PipeDream's optimizer (Narayanan et al. 2019, section 3.1), without its replication of stages: that is for
    `data_group` to say. Of all cuts with the least greatest sum, one with the least sum of squares is taken, and of
    these the one whose parts are longest first. Time O(n_layers^2 n_parts).

    Args:
        costs: of each layer, in any unit, at least 0 and finite.
        n_parts: 1 to the number of layers.

    Returns:
        The index of the first layer of each part: ``(0, ...)``, rising.

    Raises:
        ValueError: there are fewer layers than parts, or a cost is out of range.
    """
    n = len(costs)
    if not all(math.isfinite(cost) and cost >= 0 for cost in costs):
        raise ValueError(f"costs must be finite and at least 0, got {list(costs)}")
    if not 1 <= n_parts <= n:
        raise ValueError(
            f"{n} layers can be cut into 1 to {n} parts, got {n_parts}; the nearest is {max(1, min(n, n_parts))}"
        )
    sums = [0.0, *accumulate(costs)]
    limit = _least_greatest(sums, n_parts) * (1 + 1e-12)  # other orders of the same sums round otherwise
    # best[j]: (sum of squares, cuts) of the first j layers, in as many parts as the loop has come to.
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ())] + [None] * n
    for _ in range(n_parts):
        found: list[tuple[float, tuple[int, ...]] | None] = [None] * (n + 1)
        for j in range(1, n + 1):
            for i in range(j):
                before, part = best[i], sums[j] - sums[i]
                if before is None or part > limit:
                    continue
                squares = before[0] + part * part
                if (seen := found[j]) is None or squares <= seen[0]:
                    found[j] = squares, (*before[1], i)
        best = found
    last = best[n]
    assert last is not None
    return last[1]


def _least_greatest(sums: Sequence[float], n_parts: int) -> float:
    """A(n, n_parts), from the sums of the first 0, 1, ... layers."""
    n = len(sums) - 1
    least = [0.0] + [math.inf] * n
    for _ in range(n_parts):
        least = [math.inf] + [min(max(least[i], sums[j] - sums[i]) for i in range(j)) for j in range(1, n + 1)]
    return least[n]
