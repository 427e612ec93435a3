"""All-to-all by pairwise exchange: against slices in one process and gloo; its messages against the closed forms."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillm.costs import bytes_sent_by_ring, communication_seconds, communication_steps
from minillm.distributed import Network, RankError, all_to_all, run_ranks, simulate_ranks

NETWORK = Network(latency=0.25, bandwidth=64.0)  # sums of these are exact


def _column(table: list[list[int]], rank: int) -> list[int]:
    return [row[rank] for row in table]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=n, max_size=n)
    ),
    st.sampled_from([torch.float64, torch.bfloat16, torch.int32, torch.bool]),
)
def test_every_part_arrives_where_it_should(table: list[list[int]], dtype: torch.dtype) -> None:
    n = len(table)
    inputs = [(2 * torch.randn(3, sum(sizes))).t().to(dtype) for sizes in table]
    parts = [tensor.split(sizes) for tensor, sizes in zip(inputs, table, strict=True)]

    def ranks() -> Tensor:
        rank = dist.get_rank()
        return all_to_all(inputs[rank], send_sizes=table[rank], receive_sizes=_column(table, rank))

    simulation = simulate_ranks(ranks, n)

    for rank, result in enumerate(simulation.results):
        assert torch.equal(result, torch.cat([parts[source][rank] for source in range(n)]))
        row_bytes = 3 * dtype.itemsize
        chunks = [size * row_bytes for size in table[rank]]
        assert simulation.bytes_sent[rank] == sum(chunks) - chunks[rank]
        assert simulation.bytes_sent[rank] == bytes_sent_by_ring("all_to_all", chunks, rank)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_parts_of_one_size_take_their_steps_and_time(n: int) -> None:
    def ranks() -> Tensor:
        return all_to_all(torch.arange(n).repeat_interleave(8) + 10 * dist.get_rank())

    simulation = simulate_ranks(ranks, n, network=NETWORK)

    for rank, result in enumerate(simulation.results):
        assert result.tolist() == [10 * source + rank for source in range(n) for _ in range(8)]
    assert simulation.makespan == (n - 1) * 1.25  # 0.25 + 64 / 64 seconds a message
    assert simulation.makespan == communication_seconds("all_to_all", 64 * n, n, latency=0.25, bandwidth=64.0)
    starts = {message.label: message.start for message in simulation.messages}
    assert starts == {f"exchange step {step}": (step - 1) * 1.25 for step in range(1, n)}
    assert len(starts) == communication_steps("all_to_all", n)
    assert all(
        (message.destination - message.source) % n == int(message.label.split()[-1]) for message in simulation.messages
    )


def test_subgroups_and_no_autograd() -> None:
    def ranks() -> list[float]:
        groups = [dist.new_group([0, 3]), dist.new_group([1, 2])]
        rank = dist.get_rank()
        x = (torch.tensor([1.0, 2.0]) * (rank + 1)).requires_grad_()
        result = all_to_all(x, group=groups[rank in (1, 2)])
        assert not result.requires_grad
        return result.tolist()

    assert simulate_ranks(ranks, 4).results == [[1, 4], [2, 3], [4, 6], [2, 8]]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: all_to_all(torch.tensor(1.0)), "tensor must have an axis"),
        (lambda: all_to_all(torch.ones(3)), "rows for 2 parts of one size without send_sizes, got 3"),
        (lambda: all_to_all(torch.ones(2), send_sizes=[1, 1]), "send_sizes and receive_sizes go together"),
        (lambda: all_to_all(torch.ones(2), send_sizes=[2], receive_sizes=[1, 1]), "send_sizes must be 2 numbers"),
        (
            lambda: all_to_all(torch.ones(2), send_sizes=[1, 1], receive_sizes=[-1, 1]),
            "receive_sizes must be 2 numbers of at least 0",
        ),
        (lambda: all_to_all(torch.ones(2), send_sizes=[2, 1], receive_sizes=[1, 1]), "add up to the 2 rows"),
        (lambda: all_to_all(torch.ones(2), send_sizes=[1, 1], receive_sizes=[2, 2]), "own part, got 1 and 2"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Tensor], words: str) -> None:
    with pytest.raises(RankError, match=words) as raised:
        simulate_ranks(call, 2)

    assert isinstance(raised.value.__cause__, ValueError)


def _against_gloo() -> None:
    rank, n = dist.get_rank(), dist.get_world_size()
    table = [[(3 * a + 5 * b) % 4 for b in range(n)] for a in range(n)]
    tensor = torch.randn(sum(table[rank]), 2)
    library = torch.empty(sum(_column(table, rank)), 2)
    dist.all_to_all_single(library, tensor, _column(table, rank), table[rank])
    assert torch.equal(all_to_all(tensor, send_sizes=table[rank], receive_sizes=_column(table, rank)), library)


def test_real_processes_and_the_library_agree() -> None:
    run_ranks(_against_gloo, 3)
