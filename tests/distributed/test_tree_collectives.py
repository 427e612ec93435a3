"""All-reduce by tree, halving and server, broadcasts: against one process and gloo; messages against closed forms."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillm.costs import communication_seconds, communication_steps
from minillm.distributed import (
    Message,
    Network,
    RankError,
    Simulation,
    broadcast,
    chain_broadcast,
    recursive_halving_all_reduce,
    ring_all_reduce,
    run_ranks,
    server_all_reduce,
    simulate_ranks,
    tree_all_reduce,
)

OPS = dist.ReduceOp
ALL_REDUCES = [tree_all_reduce, recursive_halving_all_reduce, server_all_reduce]
BROADCASTS = [broadcast, chain_broadcast]
NETWORK = Network(latency=0.25, bandwidth=64.0)  # sums of these are exact


def _all_reduce(
    all_reduce: Callable[..., None], inputs: list[Tensor], op: dist.ReduceOp.RedOpType = OPS.SUM
) -> Simulation:
    def ranks() -> Tensor:
        tensor = inputs[dist.get_rank()].clone()
        all_reduce(tensor, op=op)
        return tensor

    return simulate_ranks(ranks, len(inputs), network=NETWORK)


def _longest_chain(messages: list[Message]) -> int:
    """How many messages follow one another, each of which begins where the last one ended, at one of its ranks."""
    longest: dict[Message, int] = {}
    for message in sorted(messages, key=lambda message: message.start):
        ends = {message.source, message.destination}
        before = [
            length
            for earlier, length in longest.items()
            if earlier.end <= message.start and ends & {earlier.source, earlier.destination}
        ]
        longest[message] = 1 + max(before, default=0)
    return max(longest.values(), default=0)


@settings(deadline=None, max_examples=80)
@given(
    all_reduce=st.sampled_from(ALL_REDUCES),
    n=st.integers(1, 9),
    shape=st.lists(st.integers(0, 5), max_size=3),
    op=st.sampled_from([OPS.SUM, OPS.AVG, OPS.PRODUCT, OPS.MAX, OPS.MIN]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.int64, torch.int32, torch.uint8]),
    seed=st.integers(0, 99),
)
def test_all_reduce_of_any_size_dtype_and_operation(
    all_reduce: Callable[..., None],
    n: int,
    shape: list[int],
    op: dist.ReduceOp.RedOpType,
    dtype: torch.dtype,
    seed: int,
) -> None:
    if op == OPS.AVG and not dtype.is_floating_point:
        op = OPS.SUM
    generator = torch.Generator().manual_seed(seed)
    inputs = [(4 * torch.randn(shape, generator=generator, dtype=torch.float64)).abs().to(dtype) for _ in range(n)]
    fold = {
        OPS.SUM: torch.Tensor.sum,
        OPS.AVG: torch.Tensor.mean,
        OPS.PRODUCT: torch.Tensor.prod,
        OPS.MAX: torch.Tensor.amax,
        OPS.MIN: torch.Tensor.amin,
    }[op]

    results = _all_reduce(all_reduce, inputs, op).results

    for result in results:
        torch.testing.assert_close(result, fold(torch.stack(inputs), 0).to(dtype))
        assert torch.equal(result, results[0])  # to the last bit


@pytest.mark.parametrize("all_reduce", ALL_REDUCES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
def test_an_average_divides_by_the_number_of_ranks(all_reduce: Callable[..., None], n: int) -> None:
    inputs = [torch.randn(7, dtype=torch.float64) for _ in range(n)]

    for result in _all_reduce(all_reduce, inputs, OPS.AVG).results:
        torch.testing.assert_close(result, torch.stack(inputs).mean(0))


@pytest.mark.parametrize("all_reduce", ALL_REDUCES)
def test_strided_tensors_in_subgroups_and_no_autograd(all_reduce: Callable[..., None]) -> None:
    def ranks() -> Tensor:
        rank = dist.get_rank()
        members = (0, 3, 4) if rank in (0, 3, 4) else (1, 2, 5, 6)
        options = {"server": members[-1]} if all_reduce is server_all_reduce else {}
        low, high = dist.new_group([0, 3, 4]), dist.new_group([1, 2, 5, 6])
        base = (torch.arange(12.0).view(4, 3) * (rank + 1)).requires_grad_()
        view = base.detach().t()[1:]
        all_reduce(view, group=low if 0 in members else high, **options)
        leaf = torch.ones(3, requires_grad=True)
        all_reduce(leaf)
        assert leaf.is_leaf
        assert leaf.tolist() == [7, 7, 7]
        return base.detach()

    for rank, result in enumerate(simulate_ranks(ranks, 7).results):
        members = (0, 3, 4) if rank in (0, 3, 4) else (1, 2, 5, 6)
        plain = torch.arange(12.0).view(4, 3)
        assert torch.equal(result[:, 1:], plain[:, 1:] * sum(member + 1 for member in members))
        assert torch.equal(result[:, 0], plain[:, 0] * (rank + 1))


@pytest.mark.parametrize("n", range(1, 17))
def test_the_tree_takes_its_steps_bytes_and_time(n: int) -> None:
    n_bytes = 64
    simulation = _all_reduce(tree_all_reduce, [torch.ones(16)] * n)
    steps = 2 * math.ceil(math.log2(n))

    assert simulation.makespan == steps * 1.25  # 0.25 + 64 / 64 seconds a message
    assert simulation.makespan == communication_seconds(
        "all_reduce", n_bytes, n, latency=0.25, bandwidth=64.0, algorithm="tree"
    )
    assert _longest_chain(simulation.messages) == steps == communication_steps("all_reduce", n, algorithm="tree")
    # Up once from every rank but one, down once to every rank but one.
    assert [message.n_bytes for message in simulation.messages] == [n_bytes] * (2 * (n - 1))
    up = [message for message in simulation.messages if message.label.startswith("reduce step ")]
    down = [message for message in simulation.messages if message.label.startswith("broadcast step ")]
    assert sorted(message.source for message in up) == sorted(message.destination for message in down)
    assert sorted(message.source for message in up) == list(range(1, n))


@pytest.mark.parametrize("n", range(1, 17))
def test_recursive_halving_takes_its_steps_bytes_and_time(n: int) -> None:
    power = 2 ** int(math.log2(n))
    n_bytes = 64 * power  # pieces are exact
    simulation = _all_reduce(recursive_halving_all_reduce, [torch.ones(16 * power)] * n)
    halves = 2 * (power - 1) * n_bytes // power
    folded = 2 * (n - power)

    seconds = 2 * math.log2(power) * 0.25 + halves / 64 + (2 * (0.25 + n_bytes / 64) if folded else 0)
    assert simulation.makespan == seconds
    assert simulation.makespan == communication_seconds(
        "all_reduce", n_bytes, n, latency=0.25, bandwidth=64.0, algorithm="recursive_halving"
    )
    steps = communication_steps("all_reduce", n, algorithm="recursive_halving")
    assert _longest_chain(simulation.messages) == steps == 2 * int(math.log2(power)) + (2 if folded else 0)
    for rank, sent in enumerate(simulation.bytes_sent):
        if rank >= folded:
            assert sent == halves  # as on the ring: less than twice the buffer
        else:
            assert sent == (halves + n_bytes if rank % 2 else n_bytes)
    labels = {message.label.rsplit(" ", 1)[0] for message in simulation.messages}
    assert labels == ({"halve step", "double step"} if n > 1 else set()) | ({"fold", "unfold"} if folded else set())


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("server", [0, -1])
def test_a_server_hears_from_all_and_answers_all_one_after_another(n: int, server: int) -> None:
    server %= n
    simulation = simulate_ranks(lambda: server_all_reduce(torch.ones(16), server=server), n, network=NETWORK)

    assert simulation.makespan == 2 * (n - 1) * 1.25
    assert simulation.makespan == communication_seconds(
        "all_reduce", 64, n, latency=0.25, bandwidth=64.0, algorithm="parameter_server"
    )
    assert _longest_chain(simulation.messages) == communication_steps("all_reduce", n, algorithm="parameter_server")
    assert simulation.bytes_sent == [64 * (n - 1) if rank == server else 64 for rank in range(n)]
    labels = [message.label for message in simulation.messages]
    assert labels == ["to the server"] * (n - 1) + ["from the server"] * (n - 1)


def test_the_server_is_a_rank_of_the_default_group() -> None:
    def ranks() -> float:
        group = dist.new_group([1, 3, 4])
        tensor = torch.tensor(float(dist.get_rank()))
        if dist.get_rank() in (1, 3, 4):
            server_all_reduce(tensor, server=4, op=OPS.AVG, group=group)
        return tensor.item()

    simulation = simulate_ranks(ranks, 5)
    assert simulation.results == pytest.approx([0, 8 / 3, 2, 8 / 3, 8 / 3])
    assert {message.source for message in simulation.messages if message.label == "from the server"} == {4}
    with pytest.raises(RankError, match=r"server must be a rank .* in the group \[0, 1\], got 2"):
        simulate_ranks(lambda: server_all_reduce(torch.ones(2), server=2), 2)


def test_for_short_tensors_the_tree_is_first_and_for_long_ones_the_ring() -> None:
    network = Network(latency=1e-5, bandwidth=1e9)

    def seconds(all_reduce: Callable[..., None], n_elements: int) -> float:
        return simulate_ranks(lambda: all_reduce(torch.ones(n_elements)), 8, network=network).makespan

    assert seconds(tree_all_reduce, 8) < seconds(ring_all_reduce, 8)
    assert seconds(ring_all_reduce, 800_000) < seconds(tree_all_reduce, 800_000) / 3
    for n_elements in (8, 800_000):  # its messages go to ranks far away, which here costs nothing
        assert seconds(recursive_halving_all_reduce, n_elements) <= seconds(ring_all_reduce, n_elements)


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(1, 9),
    size=st.integers(0, 12),
    n_pieces=st.integers(1, 15),
    dtype=st.sampled_from([torch.float64, torch.bfloat16, torch.bool, torch.float8_e4m3fn]),
    data=st.data(),
)
def test_a_broadcast_gives_everybody_the_sources_tensor(
    n: int, size: int, n_pieces: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    source = data.draw(st.integers(0, n - 1))
    inputs = [(torch.randn(2, size) + 3).to(dtype) for _ in range(n)]

    def ranks() -> tuple[Tensor, Tensor]:
        down, along = inputs[dist.get_rank()].clone(), inputs[dist.get_rank()].clone()
        broadcast(down.t(), source)
        chain_broadcast(along.t(), source, n_pieces=n_pieces)
        return down, along

    for down, along in simulate_ranks(ranks, n).results:
        assert torch.equal(down.float(), inputs[source].float())
        assert torch.equal(along.float(), inputs[source].float())


@pytest.mark.parametrize("n", range(1, 12))
def test_both_broadcasts_take_their_steps_bytes_and_time(n: int) -> None:
    for source in {0, n - 1}:
        tree = simulate_ranks(lambda source=source: broadcast(torch.ones(16), source), n, network=NETWORK)
        assert tree.makespan == math.ceil(math.log2(n)) * 1.25
        assert tree.makespan == communication_seconds(
            "broadcast", 64, n, latency=0.25, bandwidth=64.0, algorithm="tree"
        )
        assert [message.n_bytes for message in tree.messages] == [64] * (n - 1)
        assert sorted(message.destination for message in tree.messages) == [r for r in range(n) if r != source]
        for pieces in (1, 4, 9):
            chain = simulate_ranks(
                lambda source=source, pieces=pieces: chain_broadcast(torch.ones(16 * pieces), source, n_pieces=pieces),
                n,
                network=NETWORK,
            )
            assert chain.makespan == ((n + pieces - 2) * 1.25 if n > 1 else 0)
            last = (source - 1) % n
            assert chain.bytes_sent == [64 * pieces * (rank != last) for rank in range(n)]


def test_the_best_number_of_pieces_is_the_one_that_is_stated() -> None:
    n, n_elements, latency, bandwidth = 6, 7200, 1e-5, 1e8
    best = math.sqrt((n - 2) * 4 * n_elements / (latency * bandwidth))
    assert best == pytest.approx(10.73, abs=0.01)

    def seconds(n_pieces: int) -> float:
        network = Network(latency=latency, bandwidth=bandwidth)
        return simulate_ranks(
            lambda: chain_broadcast(torch.ones(n_elements), 0, n_pieces=n_pieces), n, network=network
        ).makespan

    assert min(range(6, 17), key=seconds) in (10, 11)


def test_a_chain_works_on_all_its_links_at_once() -> None:
    simulation = simulate_ranks(lambda: chain_broadcast(torch.ones(48), 0, n_pieces=3), 4, network=NETWORK)

    assert [
        (message.label, message.source, message.start)
        for message in sorted(simulation.messages, key=lambda message: (message.start, message.source))
    ] == [
        ("broadcast piece 0", 0, 0.0),
        ("broadcast piece 1", 0, 1.25),
        ("broadcast piece 0", 1, 1.25),
        ("broadcast piece 2", 0, 2.5),
        ("broadcast piece 1", 1, 2.5),
        ("broadcast piece 0", 2, 2.5),
        ("broadcast piece 2", 1, 3.75),
        ("broadcast piece 1", 2, 3.75),
        ("broadcast piece 2", 2, 5.0),
    ]


@pytest.mark.parametrize("give", BROADCASTS)
def test_the_source_is_a_rank_of_the_default_group(give: Callable[..., None]) -> None:
    def ranks() -> float:
        group = dist.new_group([1, 3, 4])
        tensor = torch.tensor(float(dist.get_rank()))
        if dist.get_rank() in (1, 3, 4):
            give(tensor, 3, group=group)
        return tensor.item()

    assert simulate_ranks(ranks, 5).results == [0, 3, 2, 3, 3]


@pytest.mark.parametrize("give", BROADCASTS)
def test_a_source_that_is_not_in_the_group_is_refused(give: Callable[..., None]) -> None:
    with pytest.raises(RankError, match=r"source must be a rank .* in the group \[0, 1\], got 2"):
        simulate_ranks(lambda: give(torch.ones(2), 2), 2)


def test_a_chain_of_no_pieces_is_refused() -> None:
    with pytest.raises(RankError, match="n_pieces must be at least 1, got 0"):
        simulate_ranks(lambda: chain_broadcast(torch.ones(2), 0, n_pieces=0), 2)


@pytest.mark.parametrize("all_reduce", ALL_REDUCES)
def test_bad_arguments_are_named(all_reduce: Callable[..., None]) -> None:
    def ranks() -> None:
        with pytest.raises(TypeError, match="op=AVG needs"):
            all_reduce(torch.arange(3), op=OPS.AVG)
        with pytest.raises(ValueError, match="memory for each element"):
            all_reduce(torch.ones(1).expand(3))

    assert simulate_ranks(ranks, 2).messages == []


def _against_gloo() -> None:
    """On each rank of real processes: ours and the library's, on the same numbers."""
    n = dist.get_world_size()
    for all_reduce in ALL_REDUCES:
        for size in (0, 1, 2, 17):
            for dtype in (torch.float64, torch.bfloat16, torch.int64):
                for op in (OPS.SUM, OPS.MAX):
                    ours = (torch.rand(size) * 3).to(dtype)
                    library = ours.clone()
                    if size:
                        dist.all_reduce(library, op=op)
                    all_reduce(ours, op=op)
                    torch.testing.assert_close(ours, library)
    for give in BROADCASTS:
        for source in range(n):
            ours = torch.randn(11)
            library = ours.clone()
            dist.broadcast(library, source)
            give(ours, source)
            assert torch.equal(ours, library)


@pytest.mark.parametrize("n", [3, 4])
def test_real_processes_and_the_library_agree(n: int) -> None:
    run_ranks(_against_gloo, n)
