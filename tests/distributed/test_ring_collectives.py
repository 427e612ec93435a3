"""Collectives on a ring: against sums in one process and gloo, and their messages against the closed forms."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillm.costs import bytes_sent_by_ring, communication_bytes, communication_seconds, ring_chunks
from minillm.distributed import (
    Message,
    Network,
    RankError,
    Simulation,
    ring_all_gather,
    ring_all_reduce,
    ring_reduce_scatter,
    run_ranks,
    simulate_ranks,
)
from minillm.distributed.tensor_collectives import all_gather_tensor, reduce_scatter_tensor

OPS = dist.ReduceOp
NETWORK = Network(latency=0.25, bandwidth=64.0)  # sums of these are exact

FOLDS = {
    OPS.SUM: lambda stacked: stacked.sum(0),
    OPS.AVG: lambda stacked: stacked.mean(0),
    OPS.PRODUCT: lambda stacked: stacked.prod(0),
    OPS.MAX: lambda stacked: stacked.amax(0),
    OPS.MIN: lambda stacked: stacked.amin(0),
}


def _fold(inputs: list[Tensor], op: dist.ReduceOp.RedOpType) -> Tensor:
    return FOLDS[op](torch.stack(inputs)).to(inputs[0].dtype)


def _all_reduce(inputs: list[Tensor], op: dist.ReduceOp.RedOpType = OPS.SUM) -> Simulation:
    def ranks() -> Tensor:
        tensor = inputs[dist.get_rank()].clone()
        ring_all_reduce(tensor, op=op)
        return tensor

    return simulate_ranks(ranks, len(inputs), network=NETWORK)


def _sent_by(messages: list[Message], rank: int) -> list[Message]:
    return [message for message in messages if message.source == rank]


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(1, 7),
    shape=st.lists(st.integers(0, 5), max_size=3),
    op=st.sampled_from(list(FOLDS)),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.int64, torch.int32, torch.uint8]),
    seed=st.integers(0, 99),
)
def test_all_reduce_of_any_size_dtype_and_operation(
    n: int, shape: list[int], op: dist.ReduceOp.RedOpType, dtype: torch.dtype, seed: int
) -> None:
    if op == OPS.AVG and not dtype.is_floating_point:
        op = OPS.SUM
    generator = torch.Generator().manual_seed(seed)
    inputs = [(4 * torch.randn(shape, generator=generator, dtype=torch.float64)).abs().to(dtype) for _ in range(n)]

    results = _all_reduce(inputs, op).results

    for result in results:
        torch.testing.assert_close(result, _fold(inputs, op))
        assert torch.equal(result, results[0])  # to the last bit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_reduce_in_16_bits_is_within_their_rounding(dtype: torch.dtype) -> None:
    inputs = [torch.randn(50).to(dtype) for _ in range(5)]
    exact = torch.stack(inputs).double().sum(0)

    for result in _all_reduce(inputs).results:
        # Four additions, each within half a unit in the last place of what stands there.
        bound = 4 * torch.finfo(dtype).eps / 2 * torch.stack(inputs).double().abs().sum(0)
        assert ((result.double() - exact).abs() <= bound).all()


def test_of_bools_the_sum_is_or_and_the_product_and() -> None:
    inputs = [torch.tensor([False, True, True]), torch.tensor([False, False, True])]

    assert _all_reduce(inputs, OPS.SUM).results[0].tolist() == [False, True, True]
    assert _all_reduce(inputs, OPS.PRODUCT).results[1].tolist() == [False, False, True]


@pytest.mark.parametrize("op", [OPS.MAX, OPS.MIN])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_nan_of_any_rank_is_in_the_maximum_and_the_minimum(op: dist.ReduceOp.RedOpType, rank: int) -> None:
    inputs = [torch.ones(4) for _ in range(3)]
    inputs[rank][2] = torch.nan

    for result in _all_reduce(inputs, op).results:
        assert result.isnan().tolist() == [False, False, True, False]


def test_strided_and_lazily_conjugated_tensors_are_reduced_in_place() -> None:
    inputs = [torch.randn(6, 5, 2, dtype=torch.complex128) for _ in range(3)]

    def ranks() -> Tensor:
        base = inputs[dist.get_rank()].clone()
        ring_all_reduce(base.conj().transpose(0, 1)[1:, ::2])
        return base

    expected = torch.stack(inputs).sum(0)
    for result, mine in zip(simulate_ranks(ranks, 3).results, inputs, strict=True):
        torch.testing.assert_close(result[::2, 1:], expected[::2, 1:])
        assert torch.equal(result[1::2], mine[1::2])
        assert torch.equal(result[:, 0], mine[:, 0])


def test_channels_last_and_scalars() -> None:
    inputs = [torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last) for _ in range(2)]

    def ranks() -> tuple[Tensor, Tensor]:
        image, scalar = inputs[dist.get_rank()].clone(), torch.tensor(dist.get_rank() + 1)
        ring_all_reduce(image)
        ring_all_reduce(scalar)
        assert image.is_contiguous(memory_format=torch.channels_last)
        return image, scalar

    for image, scalar in simulate_ranks(ranks, 2).results:
        torch.testing.assert_close(image, inputs[0] + inputs[1])
        assert scalar.item() == 3


@settings(deadline=None, max_examples=40)
@given(n=st.integers(1, 6), rows=st.integers(0, 13), columns=st.integers(0, 3), op=st.sampled_from([OPS.SUM, OPS.AVG]))
def test_reduce_scatter_leaves_the_ranks_own_chunk_and_all_gather_joins_them(
    n: int, rows: int, columns: int, op: dist.ReduceOp.RedOpType
) -> None:
    inputs = [torch.randn(columns, rows, dtype=torch.float64).t() for _ in range(n)]
    expected = _fold(inputs, op)
    kept = [tensor.clone() for tensor in inputs]

    def ranks() -> tuple[Tensor, Tensor]:
        chunk = ring_reduce_scatter(inputs[dist.get_rank()], op=op)
        return chunk, ring_all_gather(chunk, sizes=ring_chunks(rows, 1, n))

    for rank, (chunk, gathered) in enumerate(simulate_ranks(ranks, n).results):
        torch.testing.assert_close(chunk, expected.tensor_split(n)[rank])
        torch.testing.assert_close(gathered, expected)
        assert torch.equal(inputs[rank], kept[rank])


def test_chunks_of_one_size_need_no_sizes_and_any_dtype_can_be_gathered() -> None:
    def ranks() -> tuple[Tensor, Tensor]:
        rank = dist.get_rank()
        return ring_all_gather(torch.full((2, 3), rank)), ring_all_gather(torch.ones(1).to(torch.float8_e4m3fn))

    for whole, narrow in simulate_ranks(ranks, 3).results:
        assert torch.equal(whole, torch.arange(3).repeat_interleave(2)[:, None].expand(6, 3))
        assert narrow.dtype == torch.float8_e4m3fn
        assert narrow.float().tolist() == [1, 1, 1]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("n_elements", [0, 2, 8, 21])
def test_bytes_are_those_of_the_ring_and_of_the_simulators_all_reduce(n: int, n_elements: int) -> None:
    inputs = [torch.ones(n_elements) for _ in range(n)]
    ours = _all_reduce(inputs)
    library = simulate_ranks(lambda: dist.all_reduce(torch.ones(n_elements)), n)
    chunks = ring_chunks(n_elements, 4, n)

    assert ours.bytes_sent == library.bytes_sent
    for rank in range(n):
        own, next_one = chunks[rank], chunks[(rank + 1) % n]
        assert (
            ours.bytes_sent[rank] == 2 * sum(chunks) - own - next_one == bytes_sent_by_ring("all_reduce", chunks, rank)
        )
    assert sum(ours.bytes_sent) == 2 * (n - 1) * 4 * n_elements


@pytest.mark.parametrize("n", [1, 2, 3, 5, 8])
def test_steps_bytes_and_time_of_equal_chunks_are_the_closed_forms(n: int) -> None:
    n_bytes = 4 * 16 * n
    simulation = _all_reduce([torch.ones(16 * n) for _ in range(n)])

    assert [len(_sent_by(simulation.messages, rank)) for rank in range(n)] == [2 * (n - 1)] * n
    assert set(simulation.bytes_sent) == {2 * (n - 1) * n_bytes // n}
    assert simulation.bytes_sent[0] == communication_bytes("all_reduce", n_bytes, n)
    # A chunk of 64 bytes takes 0.25 + 64 / 64 seconds.
    assert simulation.makespan == 2 * (n - 1) * 1.25
    assert simulation.makespan == communication_seconds("all_reduce", n_bytes, n, latency=0.25, bandwidth=64.0)
    assert (
        simulation.makespan == simulate_ranks(lambda: dist.all_reduce(torch.ones(16 * n)), n, network=NETWORK).makespan
    )


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_each_half_takes_half_of_the_time_and_the_bytes(n: int) -> None:
    scattered = simulate_ranks(lambda: ring_reduce_scatter(torch.ones(16 * n)), n, network=NETWORK)
    gathered = simulate_ranks(lambda: ring_all_gather(torch.ones(16)), n, network=NETWORK)

    for name, simulation in (("reduce_scatter", scattered), ("all_gather", gathered)):
        assert simulation.makespan == (n - 1) * 1.25
        assert simulation.makespan == communication_seconds(name, 64 * n, n, latency=0.25, bandwidth=64.0)
        assert simulation.bytes_sent == [(n - 1) * 64] * n


def test_each_message_says_which_chunk_it_carries_and_goes_to_the_neighbour() -> None:
    messages = _all_reduce([torch.ones(8) for _ in range(4)]).messages

    assert all(message.destination == (message.source + 1) % 4 for message in messages)
    assert [m.label for m in _sent_by(messages, 0)] == [
        *(f"reduce chunk {chunk}" for chunk in (3, 2, 1)),
        *(f"gather chunk {chunk}" for chunk in (0, 3, 2)),
    ]
    assert [m.label for m in _sent_by(messages, 2)] == [
        *(f"reduce chunk {chunk}" for chunk in (1, 0, 3)),
        *(f"gather chunk {chunk}" for chunk in (2, 1, 0)),
    ]
    # Step by step: in each of the six steps four messages travel at the same time.
    starts = sorted({message.start for message in messages})
    assert [[m.start for m in messages].count(start) for start in starts] == [4] * 6


def test_a_chunk_that_is_empty_is_not_sent() -> None:
    messages = _all_reduce([torch.ones(2) for _ in range(4)]).messages

    assert {message.label.split()[-1] for message in messages} == {"0", "1"}
    assert len(messages) == 2 * 3 * 2


def test_subgroups_count_their_own_ranks() -> None:
    def ranks() -> tuple[float, list[float], list[float]]:
        rank = dist.get_rank()
        even, odd = dist.new_group([0, 2, 4]), dist.new_group([1, 3, 5])
        group = odd if rank % 2 else even
        tensor = torch.full((3,), float(rank))
        ring_all_reduce(tensor, group=group)
        chunk = ring_reduce_scatter(torch.arange(3.0) + rank, op=OPS.MAX, group=group)
        return tensor[0].item(), chunk.tolist(), ring_all_gather(torch.tensor([float(rank)]), group=group).tolist()

    results = simulate_ranks(ranks, 6).results

    for rank, (total, chunk, gathered) in enumerate(results):
        members = [1.0, 3.0, 5.0] if rank % 2 else [0.0, 2.0, 4.0]
        assert total == sum(members)
        assert chunk == [members[-1] + rank // 2]
        assert gathered == members


def test_a_rank_outside_of_the_group_is_refused() -> None:
    def ranks() -> None:
        group = dist.new_group([0, 1])
        if dist.get_rank() == 2:
            ring_all_reduce(torch.ones(2), group=group)

    with pytest.raises(RankError, match="group must be one that this rank is in, and rank 2 is not"):
        simulate_ranks(ranks, 3)


def test_autograd_records_nothing_but_knows_that_the_tensor_has_changed() -> None:
    def ranks() -> tuple[bool, bool]:
        leaf = torch.ones(4, requires_grad=True)
        ring_all_reduce(leaf)
        chunk, whole = ring_reduce_scatter(leaf * 2), ring_all_gather(leaf * 2)
        assert leaf.is_leaf
        assert leaf.requires_grad
        assert leaf.tolist() == [2, 2, 2, 2]
        x = torch.ones(4, requires_grad=True)
        y = x.exp()
        ring_all_reduce(y)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        return chunk.requires_grad, whole.requires_grad

    assert simulate_ranks(ranks, 2).results == [(False, False)] * 2


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: ring_all_reduce([1.0]), TypeError, "tensor must be a tensor, got list"),
        (lambda: ring_all_reduce(torch.eye(3).to_sparse()), TypeError, "tensor must be a dense tensor"),
        (lambda: ring_all_reduce(torch.ones(1).expand(3)), ValueError, "memory for each element"),
        (lambda: ring_all_reduce(torch.ones(3), op=OPS.BOR), ValueError, "op must be SUM, AVG, PRODUCT, MAX, MIN"),
        (lambda: ring_all_reduce(torch.ones(3), op="sum"), ValueError, "op must be SUM.*got 'sum'"),
        (lambda: ring_all_reduce(torch.arange(3), op=OPS.AVG), TypeError, "op=AVG needs.*got torch.int64"),
        (lambda: ring_all_reduce(torch.ones(3).cfloat(), op=OPS.MIN), TypeError, "MIN.*an order, got torch.complex64"),
        (lambda: ring_all_reduce(torch.ones(3).to(torch.float8_e5m2)), TypeError, "added, got torch.float8_e5m2"),
        (lambda: ring_reduce_scatter(torch.tensor(1.0)), ValueError, "tensor must have an axis"),
        (lambda: ring_all_gather(torch.tensor(1.0)), ValueError, "chunk must have an axis"),
        (lambda: ring_all_gather(torch.ones(2), sizes=[2]), ValueError, "sizes must be 2 numbers"),
        (lambda: ring_all_gather(torch.ones(2), sizes=[3, 3]), ValueError, "with 2 for rank [01], got"),
        (lambda: ring_all_gather(torch.ones(2), sizes=[2, -1]), ValueError, "at least 0"),
    ],
)
def test_bad_arguments_are_refused_before_any_message(
    call: Callable[[], object], error: type[Exception], words: str
) -> None:
    def ranks() -> None:
        with pytest.raises(error, match=words):
            call()

    assert simulate_ranks(ranks, 2).messages == []


def _against_gloo() -> None:
    """On each rank of real processes: ours and the library's, on the same numbers."""
    rank, n = dist.get_rank(), dist.get_world_size()
    ops = [OPS.SUM, OPS.AVG, OPS.MAX, OPS.MIN, OPS.PRODUCT]
    for size in (1, n - 1, 17):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool):
            for op in ops:
                if op == OPS.AVG and not dtype.is_floating_point:
                    continue
                ours = (torch.rand(size) * 3).to(dtype)
                library = ours.clone()
                dist.all_reduce(library, op=op)
                ring_all_reduce(ours, op=op)
                torch.testing.assert_close(ours, library)
    tensor = torch.randn(2 * n, 3)
    mine = torch.empty(2, 3)
    reduce_scatter_tensor(mine, tensor)
    chunk = ring_reduce_scatter(tensor)
    torch.testing.assert_close(chunk, mine)
    whole = torch.empty(2 * n, 3)
    all_gather_tensor(whole, chunk)
    assert torch.equal(ring_all_gather(chunk), whole)
    ring_all_reduce(torch.empty(0))
    numbers = torch.randn(5, dtype=torch.complex64)
    total = numbers.conj().resolve_conj()
    dist.all_reduce(total)
    ring_all_reduce(numbers.conj())  # what stands in memory are the numbers, not their conjugates
    torch.testing.assert_close(numbers.conj(), total)
    group = dist.new_group([0, n - 1])
    if rank in (0, n - 1):
        pair = torch.full((5,), rank)
        ring_all_reduce(pair, group=group)
        assert pair.tolist() == [n - 1] * 5


@pytest.mark.parametrize("n", [2, 3])
def test_real_processes_and_the_library_agree(n: int) -> None:
    run_ranks(_against_gloo, n)
