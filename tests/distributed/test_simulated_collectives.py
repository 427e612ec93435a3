"""Every operation of `torch.distributed` on simulated ranks, against gloo on real processes."""

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed import ReduceOp

from minillm.costs.communication import bytes_sent_by_ring, communication_bytes
from minillm.distributed import run_ranks, simulate_ranks
from minillm.distributed.tensor_collectives import all_gather_tensor, reduce_scatter_tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.uint8)


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Other ones on each rank, and small integers: sums are exact in every dtype."""
    return torch.randint(0, 5, shape).to(dtype)


def reductions() -> list[torch.Tensor]:
    results = []
    for dtype in FLOATS + INTEGERS:
        for op in (ReduceOp.SUM, ReduceOp.PRODUCT, ReduceOp.MIN, ReduceOp.MAX):
            x = numbers(3, 2, dtype=dtype)
            dist.all_reduce(x, op=op)
            results.append(x)
    for op in (ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR):
        x = numbers(5, dtype=torch.int64)
        dist.all_reduce(x, op=op)
        results.append(x)
    x = numbers(7)
    work = dist.all_reduce(x, async_op=True)
    assert work is not None
    work.wait()
    y = numbers(4)
    dist.reduce(y, dst=1)
    keep = dist.get_rank() == 1  # gloo leaves half-sums with the others
    return [*results, x, y if keep else torch.zeros(0)]


def gathers() -> list[torch.Tensor]:
    rank, n = dist.get_rank(), dist.get_world_size()
    results = []
    for dtype in FLOATS + INTEGERS:
        parts = [torch.empty(2, 3, dtype=dtype) for _ in range(n)]
        dist.all_gather(parts, numbers(2, 3, dtype=dtype))
        flat = torch.empty(n * 4, dtype=dtype)
        all_gather_tensor(flat, numbers(4, dtype=dtype))
        stacked = torch.empty(n * 2, 2, dtype=dtype)
        all_gather_tensor(stacked, numbers(2, 2, dtype=dtype))
        results += [*parts, flat, stacked]
    gathered = [torch.empty(3) for _ in range(n)] if rank == 1 else None
    dist.gather(numbers(3), gathered, dst=1)
    taken = torch.empty(2)
    dist.scatter(taken, [numbers(2) for _ in range(n)] if rank == 0 else None, src=0)
    sent = numbers(2, 5)
    dist.broadcast(sent, src=n - 1)
    return [*results, *(gathered or []), taken, sent]


def scatters() -> list[torch.Tensor]:
    rank, n = dist.get_rank(), dist.get_world_size()
    results = []
    for dtype in FLOATS:
        own = torch.empty(3, dtype=dtype)
        reduce_scatter_tensor(own, numbers(3 * n, dtype=dtype))
        listed = torch.empty(2, 2, dtype=dtype)
        dist.reduce_scatter(listed, [numbers(2, 2, dtype=dtype) for _ in range(n)])
        results += [own, listed]
    even = torch.empty(2 * n, 3)
    dist.all_to_all_single(even, numbers(2 * n, 3))
    splits = [(rank + place) % 3 for place in range(n)]  # symmetric; some are zero
    uneven = torch.empty(sum(splits), 2)
    dist.all_to_all_single(uneven, numbers(sum(splits), 2), splits, splits)
    return [*results, even, uneven]


def messages() -> list[torch.Tensor]:
    rank, n = dist.get_rank(), dist.get_world_size()
    right, left = (rank + 1) % n, (rank - 1) % n
    a, b = torch.empty(3), torch.empty(2, 2, dtype=torch.bfloat16)
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, numbers(3), right), dist.P2POp(dist.irecv, a, left)]):
        work.wait()
    sent = numbers(2, 2, dtype=torch.bfloat16)
    works = [dist.isend(sent, right, tag=5), dist.irecv(b, left, tag=5)]
    for started in works:
        assert started is not None
        started.wait()
    c = torch.empty(1)
    if rank == 0:
        total = torch.zeros(1)
        sources = set()
        for _ in range(n - 1):
            sources.add(dist.recv(c))  # from anybody
            total += c
        assert sources == set(range(1, n))
        c = total
    else:
        dist.send(torch.tensor([10.0 * rank]), 0)
    dist.barrier()
    return [a, b, c if rank == 0 else torch.zeros(0)]


def subgroups() -> list[torch.Tensor]:
    rank, n = dist.get_rank(), dist.get_world_size()
    results = []
    for ranks in ([0, n - 1], list(range(1, n)), [1]):
        group = dist.new_group(ranks)
        if rank in ranks:
            x, y = numbers(3), numbers(2)
            dist.all_reduce(x, group=group)
            dist.broadcast(y, src=ranks[-1], group=group)
            results += [x, y, torch.tensor([dist.get_rank(group), dist.get_world_size(group)])]
    return results


@pytest.mark.parametrize("ranks", [reductions, gathers, scatters, messages, subgroups])
def test_the_same_function_gives_the_same_on_gloo(ranks: object) -> None:
    simulated = simulate_ranks(ranks, 3).results  # type: ignore[arg-type]
    real = run_ranks(ranks, 3)  # type: ignore[arg-type]

    for ours, theirs in zip(simulated, real, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


def test_a_mean_is_the_sum_over_the_number_of_ranks() -> None:
    def ranks() -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.arange(4.0, dtype=torch.float64) + dist.get_rank()
        dist.all_reduce(x, op=ReduceOp.AVG)
        y = torch.empty(2, dtype=torch.float64)
        reduce_scatter_tensor(y, torch.arange(6.0, dtype=torch.float64) * dist.get_rank(), op=ReduceOp.AVG)
        return x, y

    for rank, (x, y) in enumerate(simulate_ranks(ranks, 3).results):
        assert torch.equal(x, torch.arange(4.0, dtype=torch.float64) + 1)
        assert torch.equal(y, torch.arange(6.0, dtype=torch.float64)[2 * rank : 2 * rank + 2])


def test_tensors_of_other_sizes_from_each_rank() -> None:
    """As NCCL allows; gloo does not."""

    def ranks() -> torch.Tensor:
        parts = [torch.empty(place) for place in range(4)]
        dist.all_gather(parts, torch.full((dist.get_rank(),), float(dist.get_rank())))
        return torch.cat(parts)

    simulation = simulate_ranks(ranks, 4)

    assert all(torch.equal(result, torch.tensor([1.0, 2, 2, 3, 3, 3])) for result in simulation.results)
    assert simulation.bytes_sent == [4 * (6 - (rank + 1) % 4) for rank in range(4)]  # all but the successor's


def test_views_and_empty_tensors() -> None:
    def ranks() -> torch.Tensor:
        x = torch.zeros(4, 6)
        dist.all_reduce(x[:, ::2].add_(1.0))
        column = torch.ones(6, 4).t()  # contiguous in the other order
        dist.all_reduce(column)
        dist.all_reduce(torch.zeros(0))
        all_gather_tensor(torch.zeros(0), torch.zeros(0))
        return torch.cat([x.flatten(), column.flatten()])

    for result in simulate_ranks(ranks, 2).results:
        expected = torch.zeros(4, 6)
        expected[:, ::2] = 2.0
        assert torch.equal(result, torch.cat([expected.flatten(), torch.full((24,), 2.0)]))


def test_parameters_may_be_given_that_need_gradients() -> None:
    def ranks() -> torch.Tensor:
        weight = torch.nn.Parameter(torch.full((2,), float(dist.get_rank())))
        with torch.no_grad():
            dist.broadcast(weight, 1)
        (weight * weight).sum().backward()
        assert weight.grad is not None
        dist.all_reduce(weight.grad)
        return weight.grad

    assert all(torch.equal(grad, torch.full((2,), 6.0)) for grad in simulate_ranks(ranks, 3).results)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_what_is_logged_are_the_bytes_of_the_ring(n: int) -> None:
    """And of all messages together, the closed forms."""
    size = 7  # float64 elements: cut unevenly

    def ranks() -> None:
        dist.all_reduce(torch.ones(size, dtype=torch.float64))
        dist.broadcast(torch.ones(size), 0)
        all_gather_tensor(torch.empty(n * size), torch.ones(size))
        reduce_scatter_tensor(torch.empty(size), torch.ones(n * size))
        dist.all_to_all_single(torch.ones(n * 2), torch.ones(n * 2))
        dist.barrier()

    simulation = simulate_ranks(ranks, n)
    sent: dict[str, list[int]] = {}
    for message in simulation.messages:
        sent.setdefault(message.operation, [0] * n)[message.source] += message.n_bytes

    if n == 1:
        assert simulation.bytes_sent == [0]
        return
    assert sum(sent["all_reduce"]) == 2 * (n - 1) * size * 8
    assert sum(sent["all_reduce"]) == pytest.approx(n * communication_bytes("all_reduce", size * 8, n))
    assert sent["broadcast"] == [size * 4] * (n - 1) + [0]
    assert sent["all_gather"] == sent["reduce_scatter"] == [(n - 1) * size * 4] * n
    assert sent["all_to_all"] == [(n - 1) * 2 * 4] * n
    assert "barrier" not in sent
    chunks = [part.nbytes for part in torch.ones(size, dtype=torch.float64).tensor_split(n)]
    assert sent["all_reduce"] == [bytes_sent_by_ring("all_reduce", chunks, rank) for rank in range(n)]
    assert simulation.bytes_sent == [sum(column) for column in zip(*sent.values(), strict=True)]


def test_bytes_sent_are_bytes_received() -> None:
    def ranks() -> None:
        dist.all_reduce(torch.ones(12))
        gathered = [torch.empty(3) for _ in range(4)] if dist.get_rank() == 2 else None
        dist.gather(torch.ones(3), gathered, dst=2)
        dist.scatter(torch.empty(5), [torch.ones(5)] * 4 if dist.get_rank() == 1 else None, src=1)
        dist.reduce(torch.ones(6), dst=3)
        dist.send(torch.ones(2), 1) if dist.get_rank() == 0 else None
        dist.recv(torch.ones(2), 0) if dist.get_rank() == 1 else None

    simulation = simulate_ranks(ranks, 4)
    by = {
        operation: [(message.source, message.destination, message.n_bytes) for message in group]
        for operation, group in itertools.groupby(simulation.messages, key=lambda message: message.operation)
    }

    assert by["all_reduce"] == [(rank, (rank + 1) % 4, 72) for rank in range(4)]
    assert by["gather"] == [(0, 2, 12), (1, 2, 12), (3, 2, 12)]
    assert by["scatter"] == [(1, 0, 20), (1, 2, 20), (1, 3, 20)]
    assert by["reduce"] == [(0, 1, 24), (1, 2, 24), (2, 3, 24)]
    assert by["send"] == [(0, 1, 8)]


def test_sizes_that_cannot_be_cut_are_refused() -> None:
    def ranks() -> None:
        reduce_scatter_tensor(torch.empty(2), torch.ones(5))

    with pytest.raises(RuntimeError, match="rank 0 failed: ValueError"):
        simulate_ranks(ranks, 2)
