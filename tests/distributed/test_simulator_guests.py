"""PyTorch's own parallel training as a guest of the simulated cluster: gradients equal those of one process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from minillm.distributed import simulate_ranks

BATCH = 8


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)]
    return nn.Sequential(*layers).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(BATCH, 8, generator=generator, dtype=torch.float64),
        torch.randn(BATCH, 4, generator=generator, dtype=torch.float64),
    )


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def one_process() -> list[Tensor]:
    model, (x, y) = make_model(), data()
    loss_of(model(x), y).backward()
    return gradients(model)


def gradients(model: nn.Module) -> list[Tensor]:
    found = []
    for parameter in model.parameters():
        assert parameter.grad is not None
        found.append(parameter.grad.full_tensor() if hasattr(parameter.grad, "full_tensor") else parameter.grad)
    return found


def own_rows_backward(model: nn.Module) -> list[Tensor]:
    (x, y), rank, n = data(), dist.get_rank(), dist.get_world_size()
    loss_of(model(x.chunk(n)[rank]), y.chunk(n)[rank]).backward()
    return gradients(model)


def ddp() -> list[Tensor]:
    return own_rows_backward(DistributedDataParallel(make_model()))


def fsdp(shape: tuple[int, ...], reshard: bool) -> list[Tensor]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    model = make_model()
    for layer in (*model[::2], model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    return own_rows_backward(model)


def tensor_parallel() -> list[Tensor]:
    model, (x, y) = make_model(), data()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    loss_of(model(x), y).backward()
    return gradients(model)


def assert_equal(results: list[list[Tensor]]) -> None:
    for result in results:
        for actual, expected in zip(result, one_process(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
def test_ddp(n: int) -> None:
    simulation = simulate_ranks(ddp, n)

    assert_equal(simulation.results)
    if n > 1:
        assert {message.operation for message in simulation.messages} == {"all_reduce", "broadcast", "all_gather"}


@pytest.mark.parametrize(
    ("n", "shape", "reshard"), [(2, (2,), True), (4, (4,), True), (4, (4,), False), (8, (8,), True), (4, (2, 2), True)]
)
def test_fsdp2_and_hybrid_sharding(n: int, shape: tuple[int, ...], reshard: bool) -> None:
    assert_equal(simulate_ranks(fsdp, n, shape, reshard).results)


@pytest.mark.parametrize("n", [2, 4])
def test_tensor_parallel(n: int) -> None:
    assert_equal(simulate_ranks(tensor_parallel, n).results)


def pipeline(kind: str, stage_of: list[list[int]]) -> dict[int, list[Tensor]]:
    """Stage i is a piece of the model; gradients of this rank's pieces, by piece."""
    rank, model, (x, y) = dist.get_rank(), make_model(), data()
    pieces = [model[:1], model[1:3], model[3:4], model[4:]]
    mine = stage_of[rank]
    stages = [PipelineStage(copy.deepcopy(pieces[i]), i, len(pieces), torch.device("cpu")) for i in mine]
    schedule_type = getattr(schedules, kind)
    single = issubclass(schedule_type, schedules.PipelineScheduleSingle)
    schedule = schedule_type(stages[0] if single else stages, 4, loss_fn=loss_of)
    schedule.step(*([x] if 0 in mine else []), **({"target": y} if len(pieces) - 1 in mine else {}))
    return {i: gradients(stage.submod) for i, stage in zip(mine, stages, strict=True)}


LOOP = [[0, 2], [1, 3]]
V_SHAPE = [[0, 3], [1, 2]]


@pytest.mark.parametrize(
    ("kind", "stage_of"),
    [
        ("ScheduleGPipe", [[0], [1], [2], [3]]),
        ("Schedule1F1B", [[0], [1], [2], [3]]),
        ("ScheduleInterleaved1F1B", LOOP),
        ("ScheduleLoopedBFS", LOOP),
        ("ScheduleInterleavedZeroBubble", LOOP),
        ("ScheduleZBVZeroBubble", V_SHAPE),
        ("ScheduleDualPipeV", V_SHAPE),
    ],
)
def test_pipelines_split_backward_included(kind: str, stage_of: list[list[int]]) -> None:
    results = simulate_ranks(pipeline, len(stage_of), kind, stage_of).results

    pieces = {i: found for result in results for i, found in result.items()}
    assert_equal([[gradient for i in range(4) for gradient in pieces[i]]])
