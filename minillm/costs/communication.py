"""Bytes that a collective operation makes each rank send.

The convention of this course: what is counted are the bytes that a rank sends when the operation is done by the ring
algorithm (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"), whatever
the library really does. A buffer of n ranks is cut into n chunks; rank r passes chunks on to rank r + 1.
"""

from __future__ import annotations

from collections.abc import Sequence


def bytes_sent_by_ring(operation: str, chunks: Sequence[int], rank: int, root: int = 0) -> int:
    """The bytes that `rank` sends in one operation on a ring of `len(chunks)` ranks; see the module for the convention.

        all_reduce       every chunk but its own (reduce-scatter), then every chunk but its successor's (all-gather)
        reduce_scatter   every chunk but its own
        all_gather       every chunk but its successor's
        broadcast        the whole buffer, but for the last rank of the chain that starts at `root`
        reduce           the whole buffer, but for `root`, at which the chain ends
        gather           its own chunk, unless it is `root`
        scatter          `root`: every chunk but its own
        barrier          nothing

    Args:
        chunks: bytes of each rank's chunk, in order of rank: together the whole buffer.
        rank, root: within the group, from 0.

    Raises:
        ValueError: an operation that is not in the list.
    """
    n, whole = len(chunks), sum(chunks)
    others, passed_on = whole - chunks[rank], whole - chunks[(rank + 1) % n]
    sent = {
        "all_reduce": others + passed_on,
        "reduce_scatter": others,
        "all_gather": passed_on,
        "broadcast": 0 if (rank + 1) % n == root else whole,
        "reduce": 0 if rank == root else whole,
        "gather": 0 if rank == root else chunks[rank],
        "scatter": others if rank == root else 0,
        "barrier": 0,
    }
    if operation not in sent:
        raise ValueError(f"operation must be one of {', '.join(sent)}, got {operation!r}")
    return sent[operation]
