"""MiCS: PyTorch's HSDP, one process, and the traffic inside and across groups."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from minillm.costs.mics import mics_bytes_per_rank, mics_communication_bytes
from minillm.distributed import RankError, Zero, count_traffic, mics_groups, run_ranks, simulate_ranks
from minillm.distributed.memory import measure_memory


class Net(nn.Module):
    """Psi = 1,296: each block divides by 2, 3 and 4."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(nn.Linear(18, 18, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return x


N_PARAMETERS = 4 * 18 * 18


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    draw = torch.Generator().manual_seed(50 * step + rank)
    x = torch.randn(2, 18, generator=draw, dtype=next(model.parameters()).dtype)
    out: Tensor = model(x)
    return out.square().mean()


def hsdp_and_mics() -> float:
    """Accumulation over two micro-batches, twice: the largest difference of gradients and parameters."""
    theirs, ours = Net(), Net()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for module in [*theirs.blocks, theirs]:
        fully_shard(module, mesh=mesh)
    their_optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    group, replicate_group = mics_groups(2)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    zero = Zero(ours, optimizer, stage=3, group=group, replicate_group=replicate_group)
    worst = 0.0
    for step in range(2):
        for micro in range(2):
            theirs.set_requires_all_reduce(micro == 1)
            loss_of(theirs, dist.get_rank(), 2 * step + micro).backward()
            with nullcontext() if micro == 1 else zero.no_sync():
                loss_of(ours, dist.get_rank(), 2 * step + micro).backward()
        found = zero.gradients()
        for name, parameter in theirs.named_parameters():
            worst = max(worst, float((parameter.grad.full_tensor() - found[name]).abs().max()))
        their_optimizer.step()
        their_optimizer.zero_grad()
        zero.step()
        zero.zero_grad()
    whole = zero.state_dict(everywhere=True)["model"]
    for name, parameter in theirs.named_parameters():
        worst = max(worst, float((parameter.detach().full_tensor() - whole[name]).abs().max()))
    return worst


def test_two_hops_are_pytorchs_hybrid_sharding() -> None:
    assert max(simulate_ranks(hsdp_and_mics, 4).results) < 1e-6
    assert max(run_ranks(hsdp_and_mics, 4)) < 1e-6


def mics_ranks(partition_size: int, stage: int, micro_syncs: tuple[bool, ...]) -> tuple[dict[str, Tensor], list[float]]:
    torch.manual_seed(dist.get_rank())
    model = Net().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(dist.get_rank())
    group, replicate_group = mics_groups(partition_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    zero = Zero(model, optimizer, stage=stage, group=group, replicate_group=replicate_group, bucket_bytes=18 * 18 * 8)
    norms = []
    for step in range(3):
        for micro, sync in enumerate(micro_syncs):
            with nullcontext() if sync else zero.no_sync():
                loss_of(model, dist.get_rank(), 10 * step + micro).backward()
        norms.append(float(zero.clip_grad_norm_(0.3)))
        zero.step()
        zero.zero_grad()
    with zero.gathered():
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, norms


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("partition_size", [1, 2, 3, 6])
def test_six_ranks_in_groups_of_any_size_are_one_process(stage: int, partition_size: int) -> None:
    model = Net().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    norms = []
    for step in range(3):
        for micro in range(3):
            for rank in range(6):
                (loss_of(model, rank, 10 * step + micro) / 6).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.3)))
        optimizer.step()
        optimizer.zero_grad()
    # Whoever forgets no_sync, or ends with it, has more traffic and the same gradients.
    for syncs in ((False, False, True), (True, False, False)):
        for found, found_norms in simulate_ranks(mics_ranks, 6, partition_size, stage, syncs).results:
            torch.testing.assert_close(found, model.state_dict(), rtol=1e-10, atol=1e-13)
            assert found_norms == pytest.approx(norms)


@pytest.mark.parametrize(("n_ranks", "partition_size"), [(4, 2), (6, 3), (6, 2)])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_traffic_inside_and_across_groups_is_the_papers(n_ranks: int, partition_size: int, micro_batches: int) -> None:
    def ranks() -> dict[str, int]:
        model = Net().bfloat16()
        group, replicate_group = mics_groups(partition_size)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        zero = Zero(model, optimizer, stage=3, group=group, replicate_group=replicate_group)
        with count_traffic() as traffic:
            for micro in range(micro_batches):
                with zero.no_sync() if micro < micro_batches - 1 else nullcontext():
                    loss_of(model, dist.get_rank(), micro).backward()
            zero.step()
        return dict(traffic.by_operation)

    expected = mics_communication_bytes(N_PARAMETERS, n_ranks, partition_size, micro_batches=micro_batches)
    simulation = simulate_ranks(ranks, n_ranks)
    for sent in simulation.results:
        assert sent["all_gather"] + sent["reduce_scatter"] == expected.inside
        assert sent["all_reduce"] == pytest.approx(expected.across)
    for message in simulation.messages:
        same_group = message.source // partition_size == message.destination // partition_size
        assert same_group or message.operation in ("all_reduce", "broadcast")


def test_bytes_of_a_rank_follow_the_partition_group() -> None:
    def ranks() -> dict[str, int]:
        model = Net()
        group, replicate_group = mics_groups(3)
        zero = Zero(
            model,
            torch.optim.Adam(model.parameters()),
            stage=3,
            group=group,
            replicate_group=replicate_group,
            parameter_dtype=torch.bfloat16,
        )
        with measure_memory(model, zero) as memory:
            for step in range(2):
                zero.zero_grad()
                loss_of(model, dist.get_rank(), step).float().backward()
                memory.mark("after backward")
                zero.step()
        return memory.marks["after backward"]

    for found in simulate_ranks(ranks, 6).results:
        kept = found["parameters"] + found["gradients"] + found["optimizer state"]
        nan_and_step_counts = 4 * (2 + 4)
        assert kept == mics_bytes_per_rank(N_PARAMETERS, 3) + nan_and_step_counts


def test_groups_are_neighbours_and_their_counterparts() -> None:
    def ranks() -> tuple[list[int], list[int]]:
        group, replicate_group = mics_groups(2)
        return dist.get_process_group_ranks(group), dist.get_process_group_ranks(replicate_group)

    assert simulate_ranks(ranks, 6).results == [
        ([0, 1], [0, 2, 4]),
        ([0, 1], [1, 3, 5]),
        ([2, 3], [0, 2, 4]),
        ([2, 3], [1, 3, 5]),
        ([4, 5], [0, 2, 4]),
        ([4, 5], [1, 3, 5]),
    ]


def swapped() -> Any:
    model = Net()
    group, _ = mics_groups(2)
    return Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=3, group=group, replicate_group=group)


def outside() -> Any:
    model = Net()
    other = dist.new_group([0, 1])
    return Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=3, group=other)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mics_groups(3), "partition_size must be a divisor of the 4 ranks, got 3"),
        (lambda: mics_groups(0), "partition_size must be a divisor of the 4 ranks, got 0"),
        (lambda: mics_groups(2.0), "partition_size must be an int, got 2.0"),  # type: ignore[arg-type]
        (swapped, r"must have this rank alone in common, got the ranks \[0, 1\]"),
        (outside, "rank 2 failed: ValueError: group must be one that this rank belongs to"),
    ],
)
def test_groups_that_do_not_fit_are_refused_in_words(make: Any, words: str) -> None:
    with pytest.raises(RankError, match=words):
        simulate_ranks(make, 4)
