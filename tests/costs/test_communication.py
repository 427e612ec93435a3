"""Bytes, steps and seconds of collectives: against rings and trees played message by message in exact arithmetic."""

import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.costs import (
    bytes_sent_by_ring,
    communication_bytes,
    communication_seconds,
    communication_steps,
    data_parallel_step_seconds,
)

# A schedule: rounds that follow one another; a round is its messages (source, destination, bytes), all at one time.
Rounds = list[list[tuple[int, int, Fraction]]]

LATENCY, BANDWIDTH = Fraction(1, 1000), Fraction(1000)
LINK = {"latency": float(LATENCY), "bandwidth": float(BANDWIDTH)}
COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce", "gather", "scatter", "all_to_all")


def _ring(chunks: list[Fraction], *, gather: bool) -> Rounds:
    """n - 1 rounds of a ring: the chunks travel so that rank r ends with chunk r, or starts with it."""
    n = len(chunks)
    return [
        [(r, (r + 1) % n, chunks[(r - step - (0 if gather else 1)) % n]) for r in range(n)] for step in range(n - 1)
    ]


def _tree_up(n: int, whole: Fraction) -> Rounds:
    rounds, distance = [], 1
    while distance < n:
        rounds.append([(r, r - distance, whole) for r in range(distance, n, 2 * distance)])
        distance *= 2
    return rounds


def _halving(n: int, whole: Fraction) -> Rounds:
    """Distances n/2 ... 1, each rank and its partner exchange what the other keeps."""
    distances = [n >> k for k in range(1, n.bit_length())]
    return [[(r, r ^ distance, whole * distance / n) for r in range(n)] for distance in distances]


def _sent(rounds: Rounds) -> Counter[int]:
    sent: Counter[int] = Counter()
    for messages in rounds:
        for source, _, n_bytes in messages:
            sent[source] += n_bytes  # type: ignore[assignment]
    return sent


def _seconds(rounds: Rounds) -> Fraction:
    """Of a schedule, after a check that no port carries two messages of one round."""
    for messages in rounds:
        assert len({source for source, _, _ in messages}) == len({end for _, end, _ in messages}) == len(messages)
    return sum((LATENCY + max(b for _, _, b in messages) / BANDWIDTH for messages in rounds), Fraction(0))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9))
def test_ranks_send_what_a_ring_played_out_sends(sizes: list[int]) -> None:
    chunks, ranks = [Fraction(size) for size in sizes], range(len(sizes))
    scatter, gather = _ring(chunks, gather=False), _ring(chunks, gather=True)
    for operation, rounds in (("reduce_scatter", scatter), ("all_gather", gather), ("all_reduce", scatter + gather)):
        played = _sent(rounds)
        assert [bytes_sent_by_ring(operation, sizes, r) for r in ranks] == [played[r] for r in ranks]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=9), st.data())
def test_all_ranks_together_send_what_must_arrive(sizes: list[int], data: st.DataObject) -> None:
    n, whole = len(sizes), sum(sizes)
    root = data.draw(st.integers(0, n - 1))
    arrives = {
        "all_reduce": 2 * (n - 1) * whole,
        "reduce_scatter": (n - 1) * whole,
        "all_gather": (n - 1) * whole,
        "broadcast": (n - 1) * whole,
        "reduce": (n - 1) * whole,
        "gather": whole - sizes[root],
        "scatter": whole - sizes[root],
        "barrier": 0,
    }
    for operation, expected in arrives.items():
        assert sum(bytes_sent_by_ring(operation, sizes, rank, root) for rank in range(n)) == expected


@pytest.mark.parametrize("n", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("operation", COLLECTIVES)
def test_the_busiest_rank_with_chunks_all_alike(operation: str, n: int) -> None:
    busiest = max(bytes_sent_by_ring(operation, [12] * n, rank) for rank in range(n))
    assert communication_bytes(operation, 12 * n, n) == busiest


@pytest.mark.parametrize("root", [0, 1, 3])
def test_a_chain_begins_or_ends_at_the_root(root: int) -> None:
    last = (root - 1) % 4
    for operation, silent in (("broadcast", last), ("reduce", root)):
        sent = [bytes_sent_by_ring(operation, [5, 6, 7, 8], rank, root) for rank in range(4)]
        assert sent == [0 if rank == silent else 26 for rank in range(4)]


def test_an_all_reduce_sends_no_less_than_the_lower_bound() -> None:
    """Patarasuk and Yuan 2009: by no algorithm does the busiest rank send less than 2 (n-1)/n of the buffer."""
    for n in (2, 3, 5, 8):
        for rounds in (
            _tree_up(n, Fraction(n)) + _tree_up(n, Fraction(n)),
            _ring([Fraction(1)] * n, gather=False) + _ring([Fraction(1)] * n, gather=True),
        ):
            assert max(_sent(rounds).values()) >= communication_bytes("all_reduce", n, n)
    assert communication_bytes("all_reduce", 1e9, 1024) == pytest.approx(2e9, rel=1e-3)  # hardly grows with n


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8, 16])
def test_seconds_and_steps_are_those_of_schedules_played_out(n: int) -> None:
    whole = Fraction(720_720)
    chunks = [whole / n] * n
    scatter, gather = _ring(chunks, gather=False), _ring(chunks, gather=True)
    to_server: Rounds = [[(worker, 0, whole)] for worker in range(1, n)]
    to_all: Rounds = [[(r, (r + k) % n, whole / n) for r in range(n)] for k in range(1, n)]
    to_root: Rounds = [[(rank, 0, whole / n)] for rank in range(1, n)]
    up = _tree_up(n, whole)
    schedules = {
        ("all_reduce", "ring"): scatter + gather,
        ("reduce_scatter", "ring"): scatter,
        ("all_gather", "ring"): gather,
        ("all_to_all", "ring"): to_all,
        ("gather", "ring"): to_root,
        ("scatter", "ring"): to_root,
        ("send", "ring"): [[(0, 1, whole)]],
        ("all_reduce", "tree"): up + up,
        ("reduce", "tree"): up,
        ("broadcast", "tree"): up,
        ("all_reduce", "parameter_server"): to_server + to_server,
    }
    if n & (n - 1) == 0:
        schedules["all_reduce", "recursive_halving"] = 2 * _halving(n, whole)
        schedules["reduce_scatter", "recursive_halving"] = _halving(n, whole)
        schedules["all_gather", "recursive_halving"] = _halving(n, whole)
    for (operation, algorithm), rounds in schedules.items():
        assert communication_steps(operation, n, algorithm=algorithm) == len(rounds)
        predicted = communication_seconds(operation, float(whole), n, algorithm=algorithm, **LINK)
        assert predicted == pytest.approx(float(_seconds(rounds)), rel=1e-12)


def test_ranks_beyond_a_power_of_two_fold_into_the_others() -> None:
    # 6 ranks are 4, and two steps of the whole buffer more (Thakur et al. 2005, section 4.5).
    four = communication_seconds("all_reduce", 4000, 4, algorithm="recursive_halving", **LINK)
    six = communication_seconds("all_reduce", 4000, 6, algorithm="recursive_halving", **LINK)
    assert six == pytest.approx(four + 2 * (0.001 + 4))
    assert communication_steps("all_reduce", 6, algorithm="recursive_halving") == 6


def test_a_chain_of_small_pieces_passes_a_broadcast_on_in_little_more_than_one_message() -> None:
    """m pieces take (n - 2 + m) (alpha + b / m beta): without latency that tends to b / beta."""
    n, whole = 8, 1e6
    free = communication_seconds("broadcast", whole, n, latency=0.0, bandwidth=1000.0)
    pieces = 10**6
    assert free == pytest.approx((n - 2 + pieces) * whole / pieces / 1000.0, rel=1e-4)
    assert communication_seconds("reduce", 0, n, latency=1e-3, bandwidth=1.0) == pytest.approx(7e-3)


def test_a_barrier_by_dissemination_pays_latency_alone() -> None:
    for n, steps in ((1, 0), (2, 1), (5, 3), (8, 3), (9, 4)):
        assert communication_seconds("barrier", 0, n, latency=1.0, bandwidth=1.0) == steps


def test_the_server_grows_with_the_ranks_and_the_ring_does_not() -> None:
    ring, server = (
        [
            communication_seconds("all_reduce", 1e9, n, latency=0.0, bandwidth=1e9, algorithm=name)
            for n in (2, 16, 128, 1024)
        ]
        for name in ("ring", "parameter_server")
    )
    assert server == pytest.approx([2, 30, 254, 2046])
    assert ring == pytest.approx([1, 1.875, 1.984375, 1.998046875])


def test_short_messages_are_faster_by_trees_and_long_ones_by_rings() -> None:
    def seconds(n_bytes: float, algorithm: str) -> float:
        return communication_seconds("all_reduce", n_bytes, 64, latency=5e-6, bandwidth=25e9, algorithm=algorithm)

    assert seconds(100, "tree") < seconds(100, "ring")
    assert seconds(1e9, "ring") < seconds(1e9, "tree")
    assert all(seconds(b, "recursive_halving") < seconds(b, "ring") for b in (100, 1e9))  # links that nobody shares


@settings(max_examples=60, deadline=None)
@given(
    st.fractions(0, 10),
    st.fractions(0, 10),
    st.integers(0, 10**6),
    st.integers(1, 9),
    st.integers(1, 12),
    st.booleans(),
)
def test_a_step_takes_what_its_events_take(
    forward: Fraction, backward: Fraction, n_bytes: int, n: int, n_buckets: int, overlap: bool
) -> None:
    """One lane computes, one sends: a bucket's all-reduce begins when it is full and the one before has ended."""
    each = Fraction(n_bytes, n_buckets)
    reduced = 2 * (n - 1) * (LATENCY + each / n / BANDWIDTH)
    computed, sent = forward, Fraction(0)
    ready = [forward + backward * (bucket + 1) / n_buckets for bucket in range(n_buckets)]
    computed = ready[-1]
    for moment in ready:
        sent = max(sent, moment if overlap else computed) + reduced
    taken = data_parallel_step_seconds(
        float(forward), float(backward), n_bytes, n, n_buckets=n_buckets, overlap=overlap, **LINK
    )
    assert taken == pytest.approx(float(max(computed, sent)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: bytes_sent_by_ring("gossip", [1, 2], 0), "operation must be one of all_reduce, .*, got 'gossip'"),
        (lambda: communication_bytes("gossip", 8, 2), "operation must be one of"),
        (lambda: communication_bytes("all_reduce", -1, 2), "n_bytes must be at least 0, got -1"),
        (lambda: communication_bytes("all_reduce", math.nan, 2), "n_bytes must be at least 0, got nan"),
        (lambda: communication_bytes("all_reduce", 8, 0), "world_size must be at least 1, got 0"),
        (lambda: communication_steps("all_reduce", 4, algorithm="magic"), "algorithm must be one of ring, tree"),
        (lambda: communication_steps("gather", 4, algorithm="tree"), "'tree' does all_reduce, broadcast, reduce"),
        (
            lambda: communication_steps("all_gather", 6, algorithm="recursive_halving"),
            "needs a power of two as world_size, got 6",
        ),
        (
            lambda: communication_seconds("send", 8, 2, latency=-1.0, bandwidth=1.0),
            "latency must be at least 0, got -1",
        ),
        (lambda: communication_seconds("send", 8, 2, latency=0.0, bandwidth=0.0), "bandwidth must be positive"),
        (lambda: data_parallel_step_seconds(1, 2, 8, 2, n_buckets=0, **LINK), "n_buckets must be at least 1"),
    ],
)
def test_refuses_what_no_network_does(run, words) -> None:
    with pytest.raises(ValueError, match=words):
        run()
