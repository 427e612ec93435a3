"""Bytes that a collective operation makes each rank send, its steps, and its seconds by the alpha-beta model.

The convention of this course: what is counted are the bytes that a rank SENDS when the operation is done by the ring
algorithm (Patarasuk and Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"), whatever
the library really does. A buffer of n ranks is cut into n chunks; rank r passes chunks on to rank r + 1. What a send
sends is all of it, and what an all-to-all sends is all but the rank's own chunk: these two are no rings.

Seconds are those of Hockney's model (1994): a message of b bytes takes latency + b / bandwidth, and a rank sends one
message and receives one at a time. Arithmetic is free. With alpha = latency and beta = 1 / bandwidth, a buffer of B
bytes and n ranks:

    ring                 all_reduce 2 (n-1) (alpha + B beta / n)              Patarasuk and Yuan 2009
    tree                 all_reduce 2 ceil(log2 n) (alpha + B beta)           Thakur et al. 2005, section 4.4
    recursive_halving    all_reduce 2 log2(n) alpha + 2 B beta (n-1) / n      the same, section 4.5 (Rabenseifner)
    parameter_server     2 (n-1) (alpha + B beta), all of it through the      Li et al. 2014
                         one port of the server

Sources: Thakur, Rabenseifner and Gropp 2005, "Optimization of Collective Communication Operations in MPICH"; Li et al.
2014, "Scaling Distributed Machine Learning with the Parameter Server".
"""

from __future__ import annotations

from collections.abc import Sequence

from minillm.costs.arguments import at_least, one_of, positive

_BARE = ("barrier", "send", "recv")  # moves that know no chunks
OPERATIONS = (
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "all_to_all",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    *_BARE,
)
_ALGORITHMS = {
    "ring": OPERATIONS,
    "tree": ("all_reduce", "broadcast", "reduce"),
    "recursive_halving": ("all_reduce", "reduce_scatter", "all_gather"),
    "parameter_server": ("all_reduce",),
}


def ring_chunks(n_elements: int, element_bytes: int, world_size: int) -> list[int]:
    """Bytes of each rank's chunk of a buffer, cut as `torch.tensor_split` cuts it: the first ones hold one more."""
    at_least(0, n_elements=n_elements, element_bytes=element_bytes)
    at_least(1, world_size=world_size)
    each, rest = divmod(n_elements, world_size)
    return [(each + (rank < rest)) * element_bytes for rank in range(world_size)]


def bytes_sent_by_ring(operation: str, chunks: Sequence[int], rank: int, root: int = 0) -> int:
    """The bytes that `rank` sends in one operation on a ring of `len(chunks)` ranks; see the module for the convention.

        all_reduce       every chunk but its own (reduce-scatter), then every chunk but its successor's (all-gather)
        reduce_scatter   every chunk but its own
        all_gather       every chunk but its successor's
        broadcast        the whole buffer, but for the last rank of the chain that starts at `root`
        reduce           the whole buffer, but for `root`, at which the chain ends
        gather           its own chunk, unless it is `root`
        scatter          `root`: every chunk but its own
        all_to_all       every chunk but its own: here `chunks` are what this rank holds for each of the others
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
        "all_to_all": others,
        "barrier": 0,
    }
    one_of(sent, operation=operation)
    return sent[operation]


def communication_bytes(operation: str, n_bytes: float, world_size: int) -> float:
    """The bytes that the busiest rank sends in one operation by the ring algorithm, its chunks all alike.

        all_reduce                                        2 (n-1)/n B
        reduce_scatter, all_gather, all_to_all, scatter   (n-1)/n B
        gather                                            B / n
        broadcast, reduce, send                           B
        recv, barrier                                     0

    Args:
        operation: one of :data:`OPERATIONS`.
        n_bytes: B, the whole buffer: what an all-reduce holds, what an all-gather fills, what a reduce-scatter is
            given, what a rank gives to an all-to-all, what a send sends.
        world_size: n, ranks of the group. On one rank nothing is sent.

    Raises:
        ValueError: another operation, a negative number of bytes, no rank.
    """
    one_of(OPERATIONS, operation=operation)
    at_least(0, n_bytes=n_bytes)
    at_least(1, world_size=world_size)
    if world_size == 1:
        return 0.0
    share = n_bytes / world_size
    if operation == "all_reduce":
        return 2 * (n_bytes - share)
    if operation in ("broadcast", "reduce", "send"):
        return float(n_bytes)
    if operation == "gather":
        return share
    return 0.0 if operation in _BARE else n_bytes - share


def communication_steps(operation: str, world_size: int, *, algorithm: str = "ring") -> int:
    """Messages that follow one another, each of which waits for the one before: how often latency is paid.

        ring                all_reduce 2 (n-1); barrier ceil(log2 n) (Hensgen et al. 1988); send 1; the others n-1
        tree                all_reduce 2 ceil(log2 n); broadcast, reduce ceil(log2 n)
        recursive_halving   all_reduce 2 log2 n, and 2 more for an n that is no power of two (the ranks beyond it hand
                            their whole buffer to a partner, and get the result from there); the others log2 n
        parameter_server    2 (n-1): all workers' gradients, one after another into the server, and the parameters out

    Raises:
        ValueError: an algorithm that does not do the operation; recursive halving of a reduce-scatter or an all-gather
            on an n that is no power of two.
    """
    _check(operation, world_size, algorithm)
    if world_size == 1:
        return 0
    doublings = (world_size - 1).bit_length()  # ceil(log2 n)
    if algorithm == "tree":
        return doublings * (2 if operation == "all_reduce" else 1)
    if algorithm == "recursive_halving":
        left_over = not _power_of_two(world_size)
        return 2 * (world_size.bit_length() - 1 + left_over) if operation == "all_reduce" else doublings
    if algorithm == "parameter_server" or operation == "all_reduce":
        return 2 * (world_size - 1)
    return {"barrier": doublings, "send": 1, "recv": 1}.get(operation, world_size - 1)


def communication_seconds(
    operation: str, n_bytes: float, world_size: int, *, latency: float, bandwidth: float, algorithm: str = "ring"
) -> float:
    """Seconds of one operation by the alpha-beta model; see the module for its formulas.

    Broadcast and reduce on the ring are a chain that passes small pieces on at once: (n-1) latency + B / bandwidth.
    Gather and scatter go through the root's one port, message by message. An all-to-all has n-1 steps, in step k to the
    k-th rank after.

    Args:
        operation: one of :data:`OPERATIONS`. n_bytes: B, the whole buffer, as in `communication_bytes`.
        world_size: n. With "parameter_server" one of the ranks is the server and n-1 are workers.
        latency: seconds before the first byte of a message. bandwidth: bytes per second, one way.
        algorithm: "ring", "tree" (binomial), "recursive_halving" or "parameter_server".

    Raises:
        ValueError: a value out of range, or an algorithm that does not do the operation.
    """
    at_least(0, n_bytes=n_bytes, latency=latency)
    positive(bandwidth=bandwidth)
    steps = communication_steps(operation, world_size, algorithm=algorithm)
    if world_size == 1:
        return 0.0
    whole, chunk = n_bytes / bandwidth, n_bytes / bandwidth / world_size
    if algorithm == "recursive_halving":
        power = 1 << (world_size.bit_length() - 1)
        once = whole * (power - 1) / power
        folded = 0.0 if power == world_size else 2 * whole
        return steps * latency + (2 * once + folded if operation == "all_reduce" else once)
    if algorithm in ("tree", "parameter_server") or operation in ("send", "recv"):
        return steps * (latency + whole)
    if operation in ("broadcast", "reduce"):
        return steps * latency + whole
    return steps * latency + (0.0 if operation == "barrier" else steps * chunk)


def data_parallel_step_seconds(
    forward: float,
    backward: float,
    n_bytes: float,
    world_size: int,
    *,
    latency: float,
    bandwidth: float,
    n_buckets: int = 1,
    overlap: bool = True,
) -> float:
    """Seconds of one step whose gradients are all-reduced in buckets, by the ring algorithm.

    Backward fills `n_buckets` buckets of equal bytes in equal times t; the all-reduce of one takes c. With overlap a
    bucket is reduced while backward fills the next: forward + t + (k - 1) max(t, c) + c. Without, all of them follow
    backward: forward + k t + k c. More buckets hide more, until their latency costs more than they hide (Li et al.
    2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training", section 3.2).

    Args:
        forward, backward: seconds of computing. n_bytes: of all gradients. latency, bandwidth: of a link.

    Raises:
        ValueError: a value out of range.
    """
    at_least(0, forward=forward, backward=backward)
    at_least(1, n_buckets=n_buckets)
    filled = backward / n_buckets
    reduced = communication_seconds(
        "all_reduce", n_bytes / n_buckets, world_size, latency=latency, bandwidth=bandwidth, algorithm="ring"
    )
    if not overlap:
        return forward + n_buckets * (filled + reduced)
    return forward + filled + (n_buckets - 1) * max(filled, reduced) + reduced


def _check(operation: str, world_size: int, algorithm: str) -> None:
    one_of(OPERATIONS, operation=operation)
    one_of(_ALGORITHMS, algorithm=algorithm)
    at_least(1, world_size=world_size)
    if operation not in _ALGORITHMS[algorithm]:
        does = ", ".join(_ALGORITHMS[algorithm])
        raise ValueError(f"algorithm {algorithm!r} does {does}; operation is {operation!r}")
    if algorithm == "recursive_halving" and operation != "all_reduce" and not _power_of_two(world_size):
        raise ValueError(f"recursive halving of {operation} needs a power of two as world_size, got {world_size}")


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
