"""How long the simulator lets a library's collective take: the ring algorithm's steps on the group's slowest link."""

from __future__ import annotations

import math
from collections.abc import Sequence


def collective_seconds(operation: str, chunks: Sequence[int], latency: float, bandwidth: float) -> float:
    """Seconds of one operation whose buffer is cut into these chunks (bytes), one a rank.

    reduce_scatter, all_gather   (n - 1) (latency + chunk / bandwidth), the largest chunk
    all_reduce                   both of them
    broadcast, reduce            (n - 1) latency + whole / bandwidth: a chain that passes small pieces on at once
    gather, scatter              one message after another through the root's port
    barrier                      ceil(log2 n) latency: dissemination (Hensgen et al. 1988)
    """
    n, whole, largest = len(chunks), sum(chunks), max(chunks)
    if n == 1:
        return 0.0
    pass_round = (n - 1) * (latency + largest / bandwidth)
    if operation == "barrier":
        return math.ceil(math.log2(n)) * latency
    if operation == "all_reduce":
        return 2 * pass_round
    if operation in ("broadcast", "reduce"):
        return (n - 1) * latency + whole / bandwidth
    if operation in ("reduce_scatter", "all_gather", "gather", "scatter"):
        return pass_round
    raise ValueError(f"no time is known for {operation!r}")
