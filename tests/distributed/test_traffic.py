"""Bytes counted at the call: closed forms for DDP and FSDP2, and the two ways of counting against each other."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

from minillm.costs import zero_communication_bytes
from minillm.distributed import annotate, run_ranks, simulate_ranks
from minillm.distributed.tensor_collectives import all_gather_tensor, reduce_scatter_tensor
from minillm.distributed.traffic import TrafficEvent, count_traffic
from minillm.distributed.traffic_calls import _C10D, _FUNCTIONAL, calls_of_operator

# Behind the functional collectives, whose Python names differ between versions of torch.
functional = torch.ops._c10d_functional

Counts = list[list[TrafficEvent]]


def _simulated(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    return simulate_ranks(fn, world_size, *args).results


def _real(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    return run_ranks(fn, world_size, *args)


BOTH = pytest.mark.parametrize("run", [_simulated, _real])


def _every_call() -> list[TrafficEvent]:
    """Each function of torch.distributed once, sizes uneven where they may be."""
    rank, n = dist.get_rank(), dist.get_world_size()
    pair = dist.new_group([0, 1])
    odd = torch.ones(5 * n + 1, dtype=torch.bfloat16)
    even, part = torch.ones(4 * n), torch.ones(4)
    with count_traffic() as traffic:
        with annotate("uneven"):
            dist.all_reduce(odd)
        dist.all_reduce(odd, op=dist.ReduceOp.MAX, async_op=True).wait()
        dist.broadcast(odd, src=1)
        dist.reduce(odd, dst=n - 1)
        dist.all_gather([torch.empty(4) for _ in range(n)], part)
        all_gather_tensor(even, part)
        dist.reduce_scatter(part, list(torch.ones(n, 4)))
        reduce_scatter_tensor(part, even)
        dist.gather(part, [torch.empty(4) for _ in range(n)] if rank == 1 else None, dst=1)
        dist.scatter(part, list(torch.ones(n, 4)) if rank == 1 else None, src=1)
        dist.all_to_all_single(torch.empty(n, 3), torch.ones(n, 3))
        leave = [(2 * rank + other) % 4 for other in range(n)]  # rows from rank a to rank b: (2 a + b) mod 4, also none
        come = [(2 * other + rank) % 4 for other in range(n)]
        dist.all_to_all_single(torch.empty(sum(come), 2), torch.ones(sum(leave), 2), come, leave)
        dist.barrier()
        if rank < 2:
            dist.all_reduce(part, group=pair)
            with annotate("a message"):
                ops = [dist.P2POp(dist.isend, odd, 1 - rank), dist.P2POp(dist.irecv, torch.empty_like(odd), 1 - rank)]
                for work in dist.batch_isend_irecv(ops):
                    work.wait()
        if rank == 0:
            dist.send(even, 1)
        elif rank == 1:
            dist.recv(even, 0)
        dist.all_gather_object([None] * n, "x" * 100)
        group = dist.group.WORLD.group_name  # type: ignore[union-attr]
        for done in (
            functional.all_reduce(odd, "sum", group),
            *functional.all_reduce_coalesced([part, even], "sum", group),
            functional.all_gather_into_tensor(part, n, group),
            functional.reduce_scatter_tensor(even, "sum", n, group),
            functional.all_to_all_single(even, [4] * n, [4] * n, group),
            functional.broadcast(even, 1, group),
        ):
            functional.wait_tensor(done)
    return traffic.events


def test_both_ways_of_counting_agree_on_every_call() -> None:
    simulation = simulate_ranks(_every_call, 3)
    assert simulation.results == run_ranks(_every_call, 3)
    for sent, events in zip(simulation.bytes_sent, simulation.results, strict=True):
        assert sum(event.bytes_sent for event in events) == sent
    first, second = (list(events) for events in simulation.results[:2])
    assert first[0] == ("all_reduce", 2 * 2 * 16 - 2 * (6 + 5), 32, 3, "uneven", "bfloat16")  # chunks of 6, 5 and 5
    assert ("send", 32, 32, 3, "a message", "bfloat16") in first
    assert ("recv", 0, 48, 3, "", "float32") in second


@BOTH
def test_what_all_ranks_send_is_what_must_arrive(run: Callable[..., Counts]) -> None:
    arrives: dict[str, int] = {}
    for events in run(_every_call, 4):
        for event in events:
            arrives[event.operation] = arrives.get(event.operation, 0) + event.bytes_sent
    n, odd, even = 4, 2 * 21, 4 * 16
    assert arrives["broadcast"] == (n - 1) * (odd + even)
    assert arrives["reduce"] == (n - 1) * odd
    assert arrives["reduce_scatter"] == 3 * (n - 1) * even
    assert arrives["gather"] == arrives["scatter"] == (n - 1) * 16
    uneven = sum((2 * a + b) % 4 * 8 for a in range(n) for b in range(n) if a != b)
    assert arrives["all_to_all"] == n * (n - 1) * 12 + uneven + (n - 1) * even
    assert arrives["all_reduce"] == 2 * (n - 1) * (3 * odd + even + 16) + 2 * 16
    assert arrives["send"] == 2 * odd + even
    assert arrives["recv"] == arrives["barrier"] == 0


class _Layers(nn.Module):
    """Each matrix and bias divides by 4 ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


PSI = sum(parameter.numel() for parameter in _Layers().parameters())


def _train(kind: str, dtype: torch.dtype = torch.float32) -> tuple[dict[str, int], int]:
    torch.manual_seed(0)
    model: Any = _Layers().to(dtype)
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in [*model.layers[::2], model]:
            fully_shard(layer, mesh=mesh, reshard_after_forward=kind == "reshard")
    batch = torch.randn(4, 16, dtype=dtype)
    for _ in range(2):  # the first steps have more to say: DDP's ranks agree on buckets anew in the second
        model(batch).sum().backward()
    with count_traffic() as traffic:
        model(batch).sum().backward()
    return traffic.by_operation, traffic.bytes_sent


@pytest.mark.parametrize(
    ("kind", "stage", "operations"),
    [
        ("ddp", 0, {"all_reduce"}),
        ("keep", 2, {"all_gather", "reduce_scatter"}),
        ("reshard", 3, {"all_gather", "reduce_scatter"}),
    ],
)
@BOTH
def test_torchs_own_data_parallel_sends_two_two_and_three_psi(
    run: Callable[..., Any], kind: str, stage: int, operations: set[str]
) -> None:
    values = {"parameter_bytes": 4, "gradient_bytes": 4}
    for n in (2, 4):
        expected = zero_communication_bytes(PSI, stage, n, **values)
        for by_operation, sent in run(_train, n, kind):
            assert sent == expected == {0: 2, 2: 2, 3: 3}[stage] * 4 * PSI * (n - 1) / n
            assert set(by_operation) == operations


def test_16_bits_send_half() -> None:
    for kind, stage in (("ddp", 0), ("reshard", 3)):
        for _, sent in simulate_ranks(_train, 4, kind, torch.bfloat16).results:
            assert sent == zero_communication_bytes(PSI, stage, 4)


def _products_of_dtensors() -> tuple[list[TrafficEvent], float]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rows = distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)])
    columns = distribute_tensor(torch.ones(8, 8), mesh, [Shard(1)])
    with count_traffic() as traffic:
        gathered = rows.redistribute(mesh, [Replicate()])
        product = (columns @ rows).redistribute(mesh, [Replicate()])
        norm = nn.utils.get_total_norm([rows]).full_tensor()
    assert torch.equal(gathered.to_local(), torch.ones(8, 8))
    assert torch.equal(product.to_local(), torch.full((8, 8), 8.0))
    return traffic.events, norm.item()


def test_dtensors_are_counted_once() -> None:
    simulated, real = simulate_ranks(_products_of_dtensors, 2).results, run_ranks(_products_of_dtensors, 2)
    assert simulated == real
    for events, norm in real:
        assert norm == pytest.approx(8)
        assert [(event.operation, event.n_bytes) for event in events[:2]] == [("all_gather", 256), ("all_reduce", 256)]
        assert sum(event.bytes_sent for event in events[:2]) == 128 + 256


def _nested() -> None:
    ones = torch.ones(4)
    with count_traffic() as outer:
        dist.all_reduce(ones)
        with count_traffic() as inner, annotate("again"):
            dist.all_reduce(ones)
        dist.barrier()
    dist.all_reduce(ones)
    assert inner.calls == {"all_reduce": 1}
    assert outer.calls == {"all_reduce": 2, "barrier": 1}
    assert (inner.bytes_sent, outer.bytes_sent) == (16, 32)
    assert outer.by_label == {"": 16, "again": 16}
    assert outer.by_group_size == {2: 32}
    assert repr(inner) == "Traffic(1 calls, 16 bytes sent)"


@BOTH
def test_counts_may_be_nested_and_end(run: Callable[..., Any]) -> None:
    run(_nested, 2)


def _two_labels() -> str:
    with count_traffic() as traffic:
        for block in (1, 0):
            with annotate(f"gradients of block {block}"):
                dist.all_reduce(torch.ones(1000))
                dist.all_reduce(torch.ones(1000))
        dist.send(torch.ones(3), 1) if dist.get_rank() == 0 else dist.recv(torch.ones(3), 0)
    return traffic.table()


def test_the_table_says_what_was_sent_for_what() -> None:
    table, _ = simulate_ranks(_two_labels, 2).results
    rows = [re.split(r"\s{2,}", line) for line in table.splitlines()]
    assert rows == [
        ["operation", "what for", "ranks", "dtype", "calls", "bytes sent"],
        ["all_reduce", "gradients of block 1", "2", "float32", "2", "8,000"],
        ["all_reduce", "gradients of block 0", "2", "float32", "2", "8,000"],
        ["send", "2", "float32", "1", "12"],
        ["all", "5", "16,012"],
    ]


def test_every_operator_of_the_installed_torch_is_known() -> None:
    """A torch that brings a new collective is found here, not by a count that is too small."""
    names = [
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith(("c10d::", "_c10d_functional::"))
    ]
    with_group = {
        schema.name
        for name in names
        for schema in torch._C._jit_get_schemas_for_operator(name.split(".")[0])
        if any(argument.name in ("process_group", "group_name") for argument in schema.arguments)
    }
    known = {f"c10d::{name}" for name in _C10D} | {f"_c10d_functional::{name}" for name in _FUNCTIONAL}
    assert "c10d::allreduce_" in with_group
    assert with_group <= known


def test_refuses_to_count_what_it_does_not_know() -> None:
    library = torch.library.Library("_c10d_functional", "FRAGMENT")
    library.define("whisper(Tensor input, str group_name) -> Tensor")
    with pytest.raises(NotImplementedError, match="not known here what _c10d_functional::whisper sends"):
        calls_of_operator(torch.ops._c10d_functional.whisper.default, (torch.ones(2), "0"))
    assert calls_of_operator(torch.ops.aten.add.Tensor, (torch.ones(2), torch.ones(2))) == []
