"""The virtual clock against the alpha-beta model worked out by hand."""

import itertools
import random

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.distributed import Network, RankError, Simulation, Span, annotate, compute, now, simulate_ranks, start
from minillm.distributed.tensor_collectives import all_gather_tensor

A, B = 1e-3, 1e6  # seconds, bytes per second
SLOW = Network(latency=A, bandwidth=B)
FLOATS = 250  # 1000 bytes: a millisecond on this link


def spans(simulation: Simulation, rank: int, lane: str) -> list[tuple[str, float, float]]:
    return [
        (span.name, pytest.approx(span.start), pytest.approx(span.end))
        for span in simulation.timeline
        if (span.rank, span.lane) == (rank, lane)
    ]


def test_computing_moves_the_own_clock_only() -> None:
    def ranks() -> tuple[float, float]:
        before = now()
        compute(2.0 + dist.get_rank(), name="think")
        compute(0.0)
        return before, now()

    simulation = simulate_ranks(ranks, 2)

    assert simulation.results == [(0.0, 2.0), (0.0, 3.0)]
    assert simulation.timeline == [Span(0, "compute", "think", 0.0, 2.0), Span(1, "compute", "think", 0.0, 3.0)]
    assert simulation.makespan == 3.0


def test_a_message_starts_when_both_have_come_and_a_send_is_a_rendezvous() -> None:
    def ranks() -> float:
        x = torch.ones(FLOATS)
        if dist.get_rank() == 0:
            dist.send(x, 1)
        else:
            compute(5.0)
            dist.recv(x, 0)
        return now()

    simulation = simulate_ranks(ranks, 2, network=SLOW)

    assert simulation.results == [pytest.approx(5.002)] * 2
    assert [(m.start, m.end) for m in simulation.messages] == [(5.0, pytest.approx(5.002))]
    assert spans(simulation, 0, "wait") == [("send", 0.0, 5.002)]
    assert spans(simulation, 1, "wait") == [("recv", 5.0, 5.002)]


def test_a_port_carries_one_message_at_a_time_and_both_directions_at_once() -> None:
    def ranks() -> float:
        rank, others = dist.get_rank(), [1, 2]
        if rank == 0:
            inbox = [torch.empty(FLOATS) for _ in others]
            works = [dist.irecv(x, other) for x, other in zip(inbox, others, strict=True)]
            works += [dist.isend(torch.ones(FLOATS), other) for other in others]
        else:
            works = [dist.isend(torch.ones(FLOATS), 0), dist.irecv(torch.empty(FLOATS), 0)]
        for work in works:
            assert work is not None
            work.wait()
        return now()

    simulation = simulate_ranks(ranks, 3, network=SLOW)

    assert simulation.results == [pytest.approx(0.004), pytest.approx(0.002), pytest.approx(0.004)]


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_library_collectives_take_the_time_of_the_ring(n: int) -> None:
    each = 1000 * n  # bytes of the whole buffer, 1000 a chunk

    def ranks() -> list[float]:
        marks = [now()]
        for collective in (
            lambda: dist.all_reduce(torch.ones(each // 4)),
            lambda: all_gather_tensor(torch.empty(each // 4), torch.ones(FLOATS)),
            lambda: dist.broadcast(torch.ones(each // 4), 0),
            lambda: dist.all_to_all_single(torch.empty(each // 4), torch.ones(each // 4)),
            lambda: dist.barrier(),
        ):
            collective()
            marks.append(now())
        return [after - before for before, after in itertools.pairwise(marks)]

    chunk, steps = A + 1000 / B, n - 1
    expected = [2 * steps * chunk, steps * chunk, steps * A + n * 1000 / B * (n > 1), steps * chunk]
    expected += [{1: 0, 2: 1, 3: 2, 8: 3}[n] * A]

    for measured in simulate_ranks(ranks, n, network=SLOW).results:
        assert measured == pytest.approx(expected)


def test_what_is_asynchronous_runs_beside_computing() -> None:
    def ranks() -> tuple[float, float]:
        x = torch.ones(2 * FLOATS)
        work = dist.all_reduce(x, async_op=True)  # 2 steps of 2 ms
        compute(0.003)
        middle = now()
        assert work is not None
        work.wait()
        return middle, now()

    simulation = simulate_ranks(ranks, 2, network=SLOW)

    assert simulation.results == [(pytest.approx(0.003), pytest.approx(0.004))] * 2
    assert spans(simulation, 0, "communication") == [("all_reduce", 0.0, 0.004)]
    assert spans(simulation, 0, "wait") == [("all_reduce", 0.003, 0.004)]


def test_collectives_of_one_group_follow_one_another() -> None:
    def ranks() -> float:
        works = [dist.all_reduce(torch.ones(2 * FLOATS), async_op=True) for _ in range(3)]
        for work in works:
            assert work is not None
            work.wait()
        return now()

    assert simulate_ranks(ranks, 2, network=SLOW).makespan == pytest.approx(3 * 0.004)


def test_a_collective_starts_when_the_last_rank_has_come() -> None:
    def ranks() -> float:
        compute(3.0 * (dist.get_rank() == 1))
        dist.all_reduce(torch.ones(2 * FLOATS))
        return now()

    simulation = simulate_ranks(ranks, 2, network=SLOW)

    assert simulation.results == [pytest.approx(3.004)] * 2
    assert [message.start for message in simulation.messages] == [3.0] * 2
    assert spans(simulation, 0, "wait") == [("all_reduce", 0.0, pytest.approx(3.004))]


def test_a_collective_takes_the_ports_to_receive_too() -> None:
    def ranks() -> None:
        pair = dist.new_group([0, 1])
        inbox = torch.empty(FLOATS)
        if dist.get_rank() == 2:
            compute(0.001)
            dist.send(inbox, 1)
            return
        work = dist.all_reduce(torch.ones(2 * FLOATS), group=pair, async_op=True)
        if dist.get_rank() == 1:
            dist.recv(inbox, 2)
        assert work is not None
        work.wait()

    *_, sent = simulate_ranks(ranks, 3, network=SLOW).messages

    assert (sent.source, sent.start, sent.end) == (2, pytest.approx(0.004), pytest.approx(0.006))


def test_what_is_posted_first_by_the_clock_goes_first() -> None:
    def ranks() -> None:
        pair = dist.new_group([0, 1])
        inbox = torch.empty(FLOATS)
        work = dist.irecv(inbox, 2) if dist.get_rank() == 1 else None
        if dist.get_rank() == 2:
            dist.send(inbox, 1)  # at 0, though the ranks before it have gone ahead to 10
            return
        compute(10.0)
        dist.all_reduce(torch.ones(2 * FLOATS), group=pair)
        if work is not None:
            work.wait()

    sent, *_ = simulate_ranks(ranks, 3, network=SLOW).messages

    assert (sent.source, sent.start, sent.end) == (2, 0.0, pytest.approx(0.002))


def test_uneven_parts_take_as_long_as_the_largest_and_are_logged_one_by_one() -> None:
    def ranks() -> list[float]:
        rank, marks = dist.get_rank(), []
        splits = [[0, 1000, 2000], [3000, 0, 4000], [5000, 6000, 0]]
        mine, theirs = splits[rank], [splits[other][rank] for other in range(3)]
        send, receive = (torch.empty(sum(sizes), dtype=torch.uint8) for sizes in (mine, theirs))
        dist.all_to_all_single(receive, send, theirs, mine)
        marks.append(now())
        chunks = [torch.empty(1000 * (place + 1), dtype=torch.uint8) for place in range(3)]
        dist.all_gather(chunks, chunks[rank].clone())
        marks.append(now())
        dist.reduce(torch.empty(10, dtype=torch.uint8), 0)
        return [*marks, now()]

    simulation = simulate_ranks(ranks, 3, network=SLOW)

    # To the next rank at most 5000 bytes go, to the one after it at most 6000; then 2 steps of at most 3000.
    ends = [2 * A + 11000 / B, 4 * A + 17000 / B, 6 * A + 17010 / B]
    assert simulation.results == [pytest.approx(ends)] * 3
    sent = {(m.source, m.destination): m.n_bytes for m in simulation.messages if m.operation == "all_to_all"}
    assert sent == {(0, 1): 1000, (0, 2): 2000, (1, 0): 3000, (1, 2): 4000, (2, 0): 5000, (2, 1): 6000}


def test_a_message_bears_the_senders_label() -> None:
    def ranks() -> None:
        with annotate(f"rank {dist.get_rank()}'s"):
            if dist.get_rank() == 0:
                dist.send(torch.ones(1), 1)
            else:
                dist.recv(torch.ones(1), 0)

    assert [message.label for message in simulate_ranks(ranks, 2).messages] == ["rank 0's"]


def test_the_links_inside_a_node_are_their_own() -> None:
    network = Network(latency=A, bandwidth=B, ranks_per_node=2, inside_latency=0.0, inside_bandwidth=10 * B)

    def ranks() -> float:
        rank = dist.get_rank()
        inside = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
        across = [dist.new_group([0, 2]), dist.new_group([1, 3])][rank % 2]
        works = [dist.all_reduce(torch.ones(2 * FLOATS), group=g, async_op=True) for g in (inside, across)]
        marks = []
        for work in works:
            assert work is not None
            work.wait()
            marks.append(now())
        return marks[0], marks[1]  # type: ignore[return-value]

    simulation = simulate_ranks(ranks, 4, network=network)

    assert simulation.results == [(pytest.approx(0.0002), pytest.approx(0.004))] * 4  # at the same time
    assert simulate_ranks(lambda: dist.all_reduce(torch.ones(4 * FLOATS)), 4, network=network).makespan == (
        pytest.approx(6 * 0.002)  # a ring is as fast as its slowest link
    )


def test_who_asks_anybody_hears_the_first_to_come() -> None:
    delays = [0.0, 3.0, 1.0, 2.0]

    def ranks() -> list[int]:
        x = torch.empty(1)
        if dist.get_rank():
            compute(delays[dist.get_rank()])
            dist.send(x, 0)
            return []
        return [dist.recv(x) for _ in range(3)]

    assert simulate_ranks(ranks, 4).results[0] == [2, 3, 1]


def test_messages_with_one_tag_come_in_the_order_in_which_they_were_sent() -> None:
    def ranks() -> list[float]:
        if dist.get_rank() == 0:
            for work in [dist.isend(torch.tensor([float(k)]), 1, tag=k % 2) for k in range(6)]:
                assert work is not None
                work.wait()
            return []
        x = torch.empty(1)
        got = []
        for tag in (1, 1, 0, 0, 1, 0):
            dist.recv(x, 0, tag=tag)
            got.append(x.item())
        return got

    assert simulate_ranks(ranks, 2).results[1] == [1, 3, 0, 2, 5, 4]


def test_other_lanes_run_beside_and_do_one_thing_after_another() -> None:
    def ranks() -> tuple[float, float]:
        first = start(2.0, name="copy 1", lane="to host")
        second = start(2.0, name="copy 2", lane="to host")
        back = start(1.0, name="back", lane="to device")
        compute(1.0)
        back.wait()
        before = now()
        second.wait()
        first.wait()
        return before, now()

    simulation = simulate_ranks(ranks, 1)

    assert simulation.results == [(1.0, 4.0)]
    assert spans(simulation, 0, "to host") == [("copy 1", 0.0, 2.0), ("copy 2", 2.0, 4.0)]
    assert spans(simulation, 0, "to device") == [("back", 0.0, 1.0)]


def test_flops_become_time() -> None:
    def ranks() -> float:
        compute(flops=3e3, name="given")
        weight = torch.ones(8, 16, requires_grad=True)
        (torch.ones(4, 8) @ weight).sum().backward()  # 2*4*8*16 forward, as much for the weight's gradient
        return now()

    assert simulate_ranks(ranks, 1, flops_per_second=1e9).results == [pytest.approx((3000 + 2 * 1024) / 1e9)]


def test_a_clock_outside_of_a_simulation_is_the_real_one_and_work_costs_nothing() -> None:
    before = now()
    compute(1e6)
    compute(flops=1e30)
    start(1e6, name="copy", lane="to host").wait()

    assert 0 <= now() - before < 1e3


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: compute(), "either seconds or flops, got seconds=None and flops=None"),
        (lambda: compute(1.0, flops=1.0), "either seconds or flops"),
        (lambda: compute(-1.0), "must be finite and at least 0, got -1.0"),
        (lambda: compute(float("inf")), "must be finite and at least 0, got inf"),
        (lambda: compute(flops=1.0), "needs simulate_ranks"),
        (lambda: start(-1.0, name="x", lane="y"), "seconds must be a finite number of at least 0, got -1.0"),
    ],
)
def test_times_that_cannot_be_are_refused(call: object, words: str) -> None:
    with pytest.raises(RankError, match=words):
        simulate_ranks(call, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"latency": -1.0}, "latency must be at least 0, got -1.0"),
        ({"bandwidth": 0.0}, "bandwidth must be positive and finite, got 0.0"),
        ({"inside_bandwidth": float("inf")}, "inside_bandwidth must be positive and finite, got inf"),
        ({"ranks_per_node": 0}, "ranks_per_node must be at least 1, got 0"),
    ],
)
def test_links_that_cannot_be_are_refused(arguments: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Network(**arguments)  # type: ignore[arg-type]


@given(seed=st.integers(0, 10**6), n=st.integers(2, 5))
@settings(max_examples=40, deadline=None)
def test_time_never_runs_backwards_and_a_port_is_never_used_twice(seed: int, n: int) -> None:
    """A random program: rounds of computing, a random pairing of ranks, now and then a collective."""
    draw = random.Random(seed)
    rounds = []
    for _ in range(6):
        order = draw.sample(range(n), n)
        rounds.append(([draw.random() for _ in range(n)], order, draw.randrange(1, 400), draw.random() < 0.3))

    def ranks() -> None:
        rank = dist.get_rank()
        for times, order, size, together in rounds:
            compute(times[rank] * 1e-3)
            place = order.index(rank)
            if place % 2 == 0 and place + 1 < n:
                dist.send(torch.ones(size), order[place + 1])
            elif place % 2 == 1:
                dist.recv(torch.ones(size), order[place - 1])
            if together:
                dist.all_reduce(torch.ones(size))

    simulation = simulate_ranks(ranks, n, network=SLOW)

    for rank in range(n):
        for lane in ("compute", "communication", "wait"):
            of_lane = sorted((s.start, s.end) for s in simulation.timeline if (s.rank, s.lane) == (rank, lane))
            assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(of_lane))
        sent = sorted((m.start, m.end) for m in simulation.messages if m.source == rank)
        assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(sent))
    for message in simulation.messages:
        if message.operation == "send":
            assert message.end - message.start == pytest.approx(A + message.n_bytes / B)
    assert simulation.makespan >= max((message.end for message in simulation.messages), default=0.0)
