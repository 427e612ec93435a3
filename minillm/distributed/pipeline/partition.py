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
    these the one whose last cut is the latest, then the cut before it. Time O(n_layers^2 n_parts).

    Args:
        costs: of each layer, in any unit, at least 0 and finite.
        n_parts: 1 to the number of layers.

    Returns:
        The index of the first layer of each part: ``(0, ...)``, rising.

    Raises:
        ValueError: there are no layers, fewer than parts, or a cost is out of range.
        TypeError: n_parts is no integer.
    """
    n = len(costs)
    if isinstance(n_parts, bool) or not isinstance(n_parts, int):
        raise TypeError(f"n_parts must be an int, got {n_parts!r}")
    if n == 0:
        raise ValueError("costs must hold the cost of at least one layer, got none")
    if not all(math.isfinite(cost) and cost >= 0 for cost in costs):
        raise ValueError(f"costs must be finite and at least 0, got {list(costs)}")
    if not 1 <= n_parts <= n:
        raise ValueError(
            f"{n} layers can be cut into 1 to {n} parts, got {n_parts}; the nearest is {max(1, min(n, n_parts))}"
        )
    # A float is a whole number over a power of two. As whole numbers of one unit, sums have no rounding and ties are
    # ties: without, where ten layers of 0.1 are cut would hang on the order in which they are added.
    ratios = [float(cost).as_integer_ratio() for cost in costs]
    unit = max(below for _, below in ratios)
    sums = [0, *accumulate(above * (unit // below) for above, below in ratios)]
    limit = _least_greatest(sums, n_parts)
    # best[j]: (sum of squares, cuts) of the first j layers, in as many parts as the loop has come to.
    best: list[tuple[int, tuple[int, ...]] | None] = [(0, ())] + [None] * n
    for _ in range(n_parts):
        found: list[tuple[int, tuple[int, ...]] | None] = [None] * (n + 1)
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


def _least_greatest(sums: Sequence[int], n_parts: int) -> int:
    """A(n, n_parts), from the sums of the first 0, 1, ... layers."""
    n = len(sums) - 1
    never = sums[n] + 1  # no part holds more than all
    least = [0] + [never] * n
    for _ in range(n_parts):
        least = [never] + [min(max(least[i], sums[j] - sums[i]) for i in range(j)) for j in range(1, n + 1)]
    return least[n]
