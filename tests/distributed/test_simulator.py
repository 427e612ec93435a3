"""The simulated cluster: what it promises of ranks, generators, errors in words, and of leaving nothing behind."""

import contextlib
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minillm.distributed import DeadlockError, MismatchError, RankError, simulate_ranks
from minillm.distributed.simulator import Network, annotate, compute, is_simulated, subscribe


def test_each_rank_knows_itself_and_its_result_comes_back_in_order() -> None:
    def ranks(greeting: str) -> tuple[str, int, int, bool]:
        return greeting, dist.get_rank(), dist.get_world_size(), is_simulated()

    assert simulate_ranks(ranks, 3, "hello").results == [("hello", rank, 3, True) for rank in range(3)]


def test_ranks_are_interleaved_and_yet_each_draws_from_its_own_generator() -> None:
    def ranks() -> torch.Tensor:
        drawn = []
        for _ in range(3):
            drawn.append(torch.rand(2))
            dist.all_reduce(torch.zeros(1))
        return torch.cat(drawn)

    results = simulate_ranks(ranks, 4, seed=7).results

    for rank, drawn in enumerate(results):
        assert torch.equal(drawn, torch.rand(6, generator=torch.Generator().manual_seed(7 + rank)))


def test_the_callers_generator_is_left_alone() -> None:
    expected = torch.rand(3, generator=torch.Generator().manual_seed(5))
    torch.manual_seed(5)

    simulate_ranks(lambda: torch.rand(9), 2)

    assert torch.equal(torch.rand(3), expected)


def test_the_same_run_twice_is_the_same_to_the_last_message() -> None:
    def ranks() -> torch.Tensor:
        x = torch.rand(5)
        compute(float(x[0]))
        for _ in range(3):
            others = [torch.empty(5) for _ in range(4)]
            dist.all_gather(others, x)
            x = torch.stack(others).mean(0)
            compute(float(x[1]) * (dist.get_rank() + 1))
        return x

    first, second = simulate_ranks(ranks, 4), simulate_ranks(ranks, 4)

    assert first.messages == second.messages
    assert first.timeline == second.timeline
    assert all(torch.equal(a, b) for a, b in zip(first.results, second.results, strict=True))


@pytest.mark.parametrize("world_size", [2, 5])
def test_a_ring_that_sends_first_and_receives_then_is_told_in_words(world_size: int) -> None:
    def ranks() -> None:
        rank, n = dist.get_rank(), dist.get_world_size()
        dist.send(torch.ones(1), (rank + 1) % n)
        dist.recv(torch.ones(1), (rank - 1) % n)

    with pytest.raises(DeadlockError) as error:
        simulate_ranks(ranks, world_size)

    for rank in range(world_size):
        assert f"rank {rank} waits for send to rank {(rank + 1) % world_size}" in str(error.value)


def test_a_rank_that_has_returned_is_named_where_others_wait_for_it() -> None:
    def ranks() -> None:
        if dist.get_rank() != 1:
            dist.all_reduce(torch.ones(1))

    with pytest.raises(DeadlockError, match="not come: 1") as error:
        simulate_ranks(ranks, 3)

    assert "rank 1 has returned" in str(error.value)
    assert "rank 0 waits for all_reduce on group 0 of ranks 0, 1, 2" in str(error.value)


def test_a_receive_that_nobody_answers_and_its_tag_are_named() -> None:
    def ranks() -> None:
        if dist.get_rank() == 0:
            dist.recv(torch.ones(1), 1, tag=3)
        else:
            dist.send(torch.ones(1), 0, tag=4)

    with pytest.raises(DeadlockError, match="rank 0 waits for recv from rank 1, tag 3"):
        simulate_ranks(ranks, 2)


def a_send() -> None:
    if dist.get_rank() == 0:
        dist.isend(torch.ones(1), 1, tag=2)


def a_receive() -> None:
    if dist.get_rank() == 1:
        dist.irecv(torch.ones(1), 0)


def a_collective() -> None:
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(1), async_op=True)


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (a_send, "rank 0: send to rank 1, tag 2"),
        (a_receive, "rank 1: recv from rank 0"),
        (a_collective, "all_reduce on group 0 of ranks 0, 1; not come: 1"),
    ],
)
def test_what_nobody_waited_for_and_nobody_answered_is_told(ranks: Callable[[], None], words: str) -> None:
    with pytest.raises(MismatchError, match="all ranks have returned, and nobody answered") as error:
        simulate_ranks(ranks, 2)

    assert words in str(error.value)


def test_a_peer_that_is_not_there_is_refused() -> None:
    with pytest.raises(RankError, match=r"ValueError: a message goes to or comes from a rank of 0 \.\.\. 1, got 2"):
        simulate_ranks(lambda: dist.isend(torch.ones(1), 2) and None, 2)


def different_operations() -> None:
    x = torch.ones(2)
    dist.all_reduce(x) if dist.get_rank() == 0 else dist.broadcast(x, 0)


def different_sizes() -> None:
    dist.all_reduce(torch.ones(2 + dist.get_rank()))


def different_dtypes() -> None:
    dist.all_reduce(torch.ones(2, dtype=[torch.float32, torch.int32][dist.get_rank()]))


def different_roots() -> None:
    dist.broadcast(torch.ones(2), dist.get_rank())


def different_reductions() -> None:
    dist.all_reduce(torch.ones(2), op=[dist.ReduceOp.SUM, dist.ReduceOp.MAX][dist.get_rank()])


def different_message_sizes() -> None:
    dist.send(torch.ones(2), 1) if dist.get_rank() == 0 else dist.recv(torch.ones(3), 0)


def different_splits() -> None:
    sizes = [[1, 2], [1, 2]][dist.get_rank()]
    dist.all_to_all([torch.ones(size) for size in sizes], [torch.ones(size) for size in sizes])


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (different_operations, "rank 0 called all_reduce, SUM, 8 bytes of float32\n.*rank 1 called broadcast, root 0"),
        (different_sizes, "rank 0 called all_reduce, SUM, 8 bytes.*\n.*rank 1 called all_reduce, SUM, 12 bytes"),
        (different_dtypes, "float32\n.*int32"),
        (different_roots, "root 0.*\n.*root 1"),
        (different_reductions, "SUM.*\n.*MAX"),
        (different_message_sizes, "rank 0 sends 2 elements of torch.float32 to rank 1, which expects 3"),
        (different_splits, "elements of torch.float32 come where"),
    ],
)
def test_ranks_that_call_different_things_are_told_apart(ranks: object, words: str) -> None:
    with pytest.raises(MismatchError, match=words):
        simulate_ranks(ranks, 2)  # type: ignore[arg-type]


def test_a_tensor_that_is_changed_before_its_message_has_gone_is_found() -> None:
    def ranks() -> None:
        x = torch.ones(2)
        if dist.get_rank() == 0:
            work = dist.isend(x, 1)
            x.add_(1)
            work.wait()
        else:
            compute(1.0)
            dist.recv(x, 0)

    with pytest.raises(MismatchError, match="rank 0 changed a tensor between its send and the wait"):
        simulate_ranks(ranks, 2)


def test_a_mismatch_that_the_program_catches_still_ends_it() -> None:
    def ranks() -> None:
        with contextlib.suppress(Exception):
            dist.all_reduce(torch.ones(dist.get_rank() + 1))
        dist.barrier()

    with pytest.raises(MismatchError, match="rank 1 called all_reduce, SUM, 8 bytes"):
        simulate_ranks(ranks, 2)


def test_an_average_of_whole_numbers_is_refused_as_by_gloo() -> None:
    with pytest.raises(RankError, match=r"TypeError: AVG needs floating-point or complex numbers, got torch\.int64"):
        simulate_ranks(lambda: dist.all_reduce(torch.ones(2, dtype=torch.int64), dist.ReduceOp.AVG), 2)


def test_only_the_numbers_count_not_their_shape() -> None:
    def ranks() -> torch.Tensor:
        x = torch.arange(6.0).view((3, 2) if dist.get_rank() else (1, 6))
        dist.all_reduce(x)
        return x

    first, second = simulate_ranks(ranks, 2).results

    assert torch.equal(first, 2 * torch.arange(6.0).view(1, 6))
    assert torch.equal(second, 2 * torch.arange(6.0).view(3, 2))


def test_a_part_of_a_buffer_may_go_while_its_neighbour_changes() -> None:
    def ranks() -> list[float]:
        buffer = torch.zeros(4)
        work = dist.all_reduce(buffer[:2], async_op=True)
        buffer[2:] += 1
        assert work is not None
        work.wait()
        return buffer.tolist()

    assert simulate_ranks(ranks, 2).results == [[0.0, 0.0, 1.0, 1.0]] * 2


def test_a_view_of_a_whole_buffer_may_go_while_an_empty_one_is_filled() -> None:
    """Both share one count of changes, and nothing changes."""

    def ranks() -> float:
        rank, buffer = dist.get_rank(), torch.full((1,), 3.0)
        whole, empty = buffer[:1], buffer[1:]
        sending = dist.isend((whole, empty)[rank], 1 - rank)
        receiving = dist.irecv((empty, whole)[rank], 1 - rank)
        for work in (receiving, sending):
            assert work is not None
            work.wait()
        return buffer.item()

    assert simulate_ranks(ranks, 2).results == [3.0, 3.0]


def test_the_first_failing_rank_and_its_own_exception() -> None:
    def ranks() -> None:
        if dist.get_rank() == 2:
            raise KeyError("lost")
        dist.barrier()

    with pytest.raises(RankError, match="rank 2 failed: KeyError: 'lost'") as error:
        simulate_ranks(ranks, 4)

    assert error.value.rank == 2
    assert isinstance(error.value.__cause__, KeyError)
    assert any(entry.name == "ranks" for entry in _frames(error.value.__cause__))


def _frames(error: BaseException) -> list[object]:
    import traceback

    return list(traceback.extract_tb(error.__traceback__))


def test_what_others_clean_up_when_a_rank_fails() -> None:
    cleaned = []

    def ranks() -> None:
        try:
            if dist.get_rank() == 0:
                raise ValueError("first")
            dist.barrier()
        except Exception:  # must not hold up the end: a rank that is stopped sees no Exception
            cleaned.append(("caught", dist.get_rank()))
            raise
        finally:
            cleaned.append(("finally", dist.get_rank()))

    with pytest.raises(RankError, match="rank 0 failed: ValueError: first"):
        simulate_ranks(ranks, 1)
    assert cleaned == [("caught", 0), ("finally", 0)]
    cleaned.clear()

    with pytest.raises(RankError, match="rank 0 failed"):
        simulate_ranks(ranks, 2)
    assert ("caught", 0) in cleaned
    assert ("caught", 1) not in cleaned


def test_leaving_is_failing() -> None:
    def ranks() -> None:
        sys.exit(3)

    with pytest.raises(RankError, match="rank 0 failed: SystemExit: 3"):
        simulate_ranks(ranks, 2)


def test_a_rank_that_does_not_come_back_is_named_with_its_place() -> None:
    gate = threading.Event()

    def ranks() -> None:
        if dist.get_rank() == 1:
            gate.wait()
        dist.barrier()

    try:
        with pytest.raises(TimeoutError, match=r"rank 0 waits for barrier[^\n]*\n *rank 1 is in wait, .*threading.py"):
            simulate_ranks(ranks, 2, timeout=0.2)
    finally:
        gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith("rank "):
            thread.join()


def test_a_late_rank_leaves_the_callers_own_group_alone() -> None:
    gate = threading.Event()
    seen = []

    def ranks() -> None:
        gate.wait()
        seen.append(dist.get_world_size())
        dist.barrier()

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(TimeoutError, match=r"rank 1 waits for its turn"):
            simulate_ranks(ranks, 2, timeout=0.2)
        gate.set()
        for thread in threading.enumerate():
            if thread.name.startswith("rank "):
                thread.join()
        assert seen == [2]
        assert dist.is_initialized()
        assert dist.get_world_size() == 1
        assert simulate_ranks(dist.get_world_size, 3).results == [3, 3, 3]
    finally:
        dist.destroy_process_group()


def test_nothing_is_left_behind() -> None:
    hook, threads = sys.excepthook, threading.active_count()
    tensors = []

    def ranks() -> None:
        x = torch.ones(1000)
        tensors.append(weakref.ref(x))
        dist.all_reduce(x)
        dist.send(x, 1) if dist.get_rank() == 0 else dist.recv(x, 0)

    simulate_ranks(ranks, 2)
    gc.collect()

    assert not dist.is_initialized()
    assert sys.excepthook is hook
    assert threading.active_count() == threads
    assert all(tensor() is None for tensor in tensors)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="this system does not list its threads in /proc")
def test_the_systems_threads_are_gone_too_as_a_fork_needs_it() -> None:
    """A thread on its way out holds locks of libraries, which a process forked in that moment never gets."""

    def ranks() -> None:
        dist.all_reduce(torch.ones(64, 64) @ torch.ones(64, 64))

    before = set(os.listdir("/proc/self/task"))
    for _ in range(20):
        simulate_ranks(ranks, 8)
        assert set(os.listdir("/proc/self/task")) <= before


def test_a_failed_simulation_leaves_room_for_the_next() -> None:
    for _ in range(3):
        with pytest.raises(DeadlockError):
            simulate_ranks(lambda: dist.barrier() if dist.get_rank() else None, 2)
        assert not dist.is_initialized()
        assert simulate_ranks(dist.get_rank, 2).results == [0, 1]


def test_the_function_may_destroy_its_group_itself() -> None:
    def ranks() -> bool:
        dist.barrier()
        dist.destroy_process_group()
        return dist.is_initialized()

    assert simulate_ranks(ranks, 2).results == [False, False]


def test_a_tensor_lives_no_longer_than_its_message() -> None:
    """Else what is measured of a rank's memory would have the last message in it."""

    def ranks() -> list[bool]:
        gone = []
        for work in (lambda x: dist.all_reduce(x, async_op=True), lambda x: None):
            x = torch.ones(1000)
            alive = weakref.ref(x)
            handle = work(x)
            if handle is None:
                dist.all_reduce(x)
            else:
                handle.wait()
            del x, handle
            gone.append(alive() is None)
        return gone

    assert simulate_ranks(ranks, 3).results == [[True, True]] * 3


def test_sixty_four_ranks_and_their_subgroups() -> None:
    def ranks() -> tuple[float, float]:
        mine, _ = dist.new_subgroups(8)
        x, y = torch.tensor([float(dist.get_rank())]), torch.tensor([float(dist.get_rank())])
        dist.all_reduce(x, group=mine)
        dist.all_reduce(y)
        return x.item(), y.item()

    results = simulate_ranks(ranks, 64).results

    assert results == [(sum(range(rank // 8 * 8, rank // 8 * 8 + 8)), 2016.0) for rank in range(64)]


def test_objects_too() -> None:
    def ranks() -> list[object]:
        gathered: list[object] = [None] * 3
        dist.all_gather_object(gathered, {"rank": dist.get_rank()})
        return gathered

    assert simulate_ranks(ranks, 3).results == [[{"rank": rank} for rank in range(3)]] * 3


def test_asking_again_and_again_whether_it_is_done_comes_to_an_end() -> None:
    def ranks() -> int:
        x, asked = torch.ones(1), 0
        if dist.get_rank() == 0:
            compute(5e-5)
            dist.send(x, 1)
            return 0
        work = dist.irecv(x, 0)
        assert work is not None
        while not work.is_completed():
            asked += 1
        return asked

    asked = simulate_ranks(ranks, 2, network=Network(latency=1e-5)).results[1]

    assert 55 <= asked <= 65  # a microsecond a question


def test_a_listener_hears_of_its_own_ranks_calls_only() -> None:
    def ranks() -> list[tuple[str, int, int, str]]:
        heard = []
        with subscribe(lambda call: heard.append((call.operation, call.n_bytes, call.bytes_sent, call.label))):
            if dist.get_rank() == 0:
                with annotate("a greeting"):
                    dist.send(torch.ones(3), 1)
            else:
                dist.recv(torch.ones(3), 0)
            dist.all_reduce(torch.ones(4))
        dist.barrier()
        return heard

    assert simulate_ranks(ranks, 2).results == [
        [("send", 12, 12, "a greeting"), ("all_reduce", 16, 16, "")],
        [("recv", 12, 0, ""), ("all_reduce", 16, 16, "")],
    ]


def test_a_listener_is_told_the_place_within_the_group() -> None:
    def ranks() -> list[tuple[int, int]]:
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        heard = []
        with subscribe(lambda call: heard.append((call.group_size, call.rank_in_group))):
            dist.all_reduce(torch.ones(4), group=groups[dist.get_rank() // 2])
        return heard

    assert simulate_ranks(ranks, 4).results == [[(2, 0)], [(2, 1)], [(2, 0)], [(2, 1)]]


def test_a_listener_needs_a_simulated_rank() -> None:
    with pytest.raises(RuntimeError, match="simulated ranks only"), subscribe(print):
        pass


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"fn": 3}, TypeError, "fn must be a function, got 3"),
        ({"world_size": 0}, ValueError, "world_size must be at least 1, got 0"),
        ({"world_size": 2.0}, TypeError, "world_size must be an integer, got 2.0"),
        ({"world_size": True}, TypeError, "world_size must be an integer, got True"),
        ({"seed": 1.5}, TypeError, "seed must be an integer, got 1.5"),
        ({"network": 3}, TypeError, "network must be a Network or None, got 3"),
        ({"timeout": "3"}, TypeError, "timeout must be a number, got '3'"),
        ({"timeout": 0}, ValueError, "timeout must be above 0 seconds and finite, got 0"),
        ({"timeout": float("inf")}, ValueError, "timeout must be above 0 seconds and finite, got inf"),
        ({"flops_per_second": "fast"}, TypeError, "flops_per_second must be a number, got 'fast'"),
        ({"flops_per_second": -1.0}, ValueError, "flops_per_second must be above 0, got -1.0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        simulate_ranks(**({"fn": print, "world_size": 2} | arguments))  # type: ignore[arg-type]


def test_a_cluster_in_a_cluster_is_refused() -> None:
    with pytest.raises(RankError, match="ValueError: simulate_ranks cannot be called on a simulated rank"):
        simulate_ranks(lambda: simulate_ranks(print, 2), 1)


def test_the_backend_outside_of_a_simulation_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"works within minillm\.distributed\.simulate_ranks only"):
        dist.init_process_group("simulated", store=dist.HashStore(), rank=0, world_size=1)
    assert not dist.is_initialized()
