"""Bytes of tensors by kind: equal to PyTorch's profiler and to closed forms; simulated ranks as real ones."""

import gc
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import init_device_mesh
from torch.utils.checkpoint import checkpoint

from minillm.costs import zero_bytes_by_kind
from minillm.distributed import measure_memory, run_ranks, simulate_ranks
from minillm.distributed.memory import KINDS

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit, which other optimizers of this package use
    from torch.distributed.optim import ZeroRedundancyOptimizer

WIDTH, LAYERS = 32, 4


def _simulated(fn: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    return simulate_ranks(fn, world_size, *args).results


class _Net(nn.Module):
    """Each parameter's size divides by 4 and by 2 ranks."""

    def __init__(self, width: int = WIDTH, recompute: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(LAYERS))
        self.recompute = recompute
        self.register_buffer("scale", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            run = lambda x, layer=layer: nn.functional.gelu(layer(x) * self.scale)  # noqa: E731
            x = checkpoint(run, x, use_reentrant=False, preserve_rng_state=False) if self.recompute else run(x)
        return x


PSI = LAYERS * (WIDTH * WIDTH + WIDTH)
BUFFER = 4 * WIDTH


@pytest.fixture
def quiet_garbage() -> Iterator[None]:
    """No circle of an earlier test is given back while this one counts."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Tensor, n: int = 2) -> None:
    for _ in range(n):
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.usefixtures("quiet_garbage")
@pytest.mark.parametrize(("make", "recompute"), [(torch.optim.AdamW, False), (torch.optim.SGD, True)])
def test_live_and_peak_are_those_of_the_profiler(make: type[torch.optim.Optimizer], recompute: bool) -> None:
    model = _Net(128, recompute)
    batch, optimizer = torch.randn(64, 128), make(model.parameters())
    before = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    with measure_memory(model, optimizer) as memory:
        _steps(model, optimizer, batch)
    model = _Net(128, recompute)
    optimizer = make(model.parameters())
    with torch.profiler.profile(profile_memory=True) as profiler:
        _steps(model, optimizer, batch)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert memory.live_bytes - before == held
    assert memory.peak_bytes - before == pytest.approx(peak, abs=32)  # kernels wrap some scalars for themselves
    assert sum(memory.peak.values()) == memory.peak_bytes


def test_kinds_of_one_training_step() -> None:
    model, batch = _Net(), torch.randn(8, WIDTH)
    optimizer = torch.optim.AdamW(model.parameters())
    expected = {"parameters": 4 * PSI, "buffers": BUFFER}
    with measure_memory(model, optimizer) as memory:
        assert memory.live == dict.fromkeys(KINDS, 0) | expected
        output = model(batch)
        # A layer keeps what GELU is given and what it gives; the first one's input was there before.
        kept = LAYERS * 2 * batch.nbytes
        assert memory.mark("forward")["activations"] == kept
        loss = output.square().mean()
        loss.backward()
        del output, loss
        assert memory.live == dict.fromkeys(KINDS, 0) | expected | {"gradients": 4 * PSI}
        optimizer.step()
        counts = 4 * 2 * LAYERS  # AdamW counts its steps in a float32 for each parameter
        after = memory.mark("step")
        assert after == dict.fromkeys(KINDS, 0) | expected | {"gradients": 4 * PSI, "optimizer state": 8 * PSI + counts}
        optimizer.zero_grad()
        assert memory.live["gradients"] == 0
    assert list(memory.marks) == ["forward", "step"]
    assert memory.live["optimizer state"] == 8 * PSI + counts  # readable when it is over
    assert repr(memory) == f"Memory({memory.live_bytes:,} bytes live, {memory.peak_bytes:,} at the peak)"


def test_recomputing_keeps_the_inputs_of_layers_alone() -> None:
    peaks = {}
    for recompute in (False, True):
        model, batch = _Net(64, recompute), torch.randn(256, 64)
        with measure_memory(model) as memory:
            output = model(batch)
            assert memory.live["activations"] == (LAYERS if recompute else 2 * LAYERS) * batch.nbytes
            output.sum().backward()
        peaks[recompute] = memory.peak_bytes
    assert peaks[True] < peaks[False]


def test_views_and_tied_weights_count_once() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(10, 4), "head": nn.Linear(4, 10, bias=False)})
    model["head"].weight = model["embedding"].weight
    with measure_memory(model) as memory:
        whole = torch.zeros(100)
        views = [whole[:50], whole.view(10, 10).T, whole.detach()]
        whole.add_(1)
        assert memory.live["parameters"] == 160
        assert memory.live["other"] == 400
        del whole
        assert memory.live["other"] == 400  # the views hold it
        views.clear()
        assert memory.live["other"] == 0
        made = [torch.tensor([1.0, 2.0]), torch.ones(3, dtype=torch.bfloat16), torch.ones(5, dtype=torch.float64)]
        assert memory.live["other"] == 8 + 6 + 40
        del made


def test_what_is_freed_by_resizing_is_gone_and_comes_back() -> None:
    with measure_memory() as memory:
        gathered = torch.zeros(1000)
        gathered.untyped_storage().resize_(0)
        other = torch.zeros(500)
        assert (memory.peak_bytes, memory.live_bytes) == (4000, 2000)
        gathered.untyped_storage().resize_(4000)
        gathered.fill_(1)
        assert (memory.peak_bytes, memory.live_bytes) == (6000, 6000)
        gathered.untyped_storage().resize_(0)
        assert memory.live_bytes == 2000
        memory.reset_peak()
        assert memory.peak_bytes == 2000
        other.untyped_storage().resize_(8000)
        assert memory.live_bytes == 8000
    assert other.untyped_storage().nbytes() == 8000


class _Sharded:
    """An optimizer that keeps tensors where nobody would look."""

    def __init__(self) -> None:
        self.part, self.sum = torch.zeros(16), None

    def tensors_by_kind(self) -> Mapping[str, Iterable[Tensor | None]]:
        return {"parameters": [self.part], "gradients": [self.sum]}


def test_an_optimizer_may_say_what_its_tensors_are() -> None:
    optimizer = _Sharded()
    with measure_memory(None, optimizer) as memory:
        optimizer.sum = torch.zeros(8)  # type: ignore[assignment]
        assert memory.live == dict.fromkeys(KINDS, 0) | {"parameters": 64, "gradients": 32}


class _Masters(torch.optim.AdamW):
    """Mixed precision by hand: 16-bit model, float32 masters and state."""

    def __init__(self, model: nn.Module) -> None:
        self.model = list(model.parameters())
        super().__init__([nn.Parameter(parameter.detach().float()) for parameter in self.model])

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for master, parameter in zip(self.param_groups[0]["params"], self.model, strict=True):
            master.grad = parameter.grad.float()  # type: ignore[union-attr]
        super().step()
        for master, parameter in zip(self.param_groups[0]["params"], self.model, strict=True):
            parameter.copy_(master)
            master.grad = None


def test_mixed_precision_keeps_16_bytes_a_parameter() -> None:
    model = _Net().bfloat16()
    optimizer = _Masters(model)
    with measure_memory(model, optimizer) as memory:
        model(torch.randn(4, WIDTH).bfloat16()).sum().backward()
        optimizer.step()
        live = memory.live
    closed = zero_bytes_by_kind(PSI, 1, 0)
    assert live["parameters"] == closed["parameters"] == 2 * PSI
    assert live["gradients"] == closed["gradients"] == 2 * PSI
    assert live["optimizer state"] - 4 * 2 * LAYERS == closed["optimizer state"] == 12 * PSI  # without counts of steps
    assert memory.peak["gradients"] == 6 * PSI  # the masters' too, while they are updated


def _states(kind: str) -> dict[str, int]:
    """One rank's bytes after two steps of Adam in float32, which has 4 + 4 + 8 a parameter in one process."""
    torch.manual_seed(0)
    model: Any = _Net()
    if kind.startswith("fsdp"):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if "16" in kind else None)
        for layer in [*model.layers, model]:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
    if kind == "zero 1":
        optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam)
    else:
        optimizer = torch.optim.Adam(model.parameters())
    batch = torch.randn(4, WIDTH)
    with measure_memory(model, optimizer.optim if kind == "zero 1" else optimizer) as memory:
        if not kind.startswith("fsdp"):
            model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=kind == "ddp, views")
        for _ in range(2):  # in the second step DDP has rebuilt its buckets
            optimizer.zero_grad()
            model(batch).sum().backward()
            optimizer.step()
        dist.barrier()
        return memory.live


# Bytes a parameter on n ranks: parameters, gradients, optimizer state, other. DDP's other 4 are the buckets in which
# gradients travel, unless the gradients are views of them.
PER_PARAMETER: dict[str, Callable[[int], tuple[float, float, float, float]]] = {
    "ddp": lambda n: (4, 4, 8, 4),
    "ddp, views": lambda n: (4, 4, 8, 0),
    "zero 1": lambda n: (4, 4, 8 / n, 4),
    "fsdp": lambda n: (4 / n, 4 / n, 8 / n, 0),
    "fsdp in 16 bits": lambda n: (4 / n, 4 / n, 8 / n, 0),  # gathered parameters alone have 16
}


@pytest.mark.parametrize("kind", PER_PARAMETER)
@pytest.mark.parametrize(("run", "n"), [(_simulated, 4), (run_ranks, 2)])
def test_torchs_own_data_parallel_keeps_20_16_and_16_over_n(run: Callable[..., Any], n: int, kind: str) -> None:
    for live in run(_states, n, kind):
        parameters, gradients, state, other = PER_PARAMETER[kind](n)
        assert (live["parameters"], live["gradients"]) == (parameters * PSI, gradients * PSI)
        counts = 4 * 2 * LAYERS // (n if kind == "zero 1" else 1)
        assert live["optimizer state"] == state * PSI + counts
        assert (live["other"], live["buffers"], live["activations"]) == (other * PSI, BUFFER, 0)


def _one_ranks_own(world_size: int) -> tuple[int, int, int]:
    rank = dist.get_rank()
    with measure_memory() as memory:
        kept = torch.zeros(1000 * (rank + 1))
        dist.all_reduce(torch.ones(10))
        dist.all_reduce(torch.ones(10), op=dist.ReduceOp.MAX)
        everyone = [torch.empty(7) for _ in range(world_size)]
        dist.all_gather(everyone, torch.ones(7))
        if rank == 0:
            dist.send(kept[:100], 1)
        elif rank == 1:
            dist.recv(torch.empty(100), 0)
        dist.barrier()
        del everyone
        return memory.live_bytes, memory.peak_bytes, kept.nbytes


def test_a_rank_counts_its_own_tensors_alone() -> None:
    """Also where it is the one that moves the others' numbers in a simulation."""
    for results in (simulate_ranks(_one_ranks_own, 3, 3).results, run_ranks(_one_ranks_own, 3, 3)):
        for expected, (live, peak, kept) in zip((4000, 8000, 12000), results, strict=True):
            assert live == kept == expected
            assert kept + 4 * 7 * 4 <= peak < kept + 1000  # gloo's threads let go of a tensor when they get to it


def test_counts_only_on_one_device() -> None:
    with measure_memory(device="meta") as nothing, measure_memory(device="cpu") as memory:
        kept = [torch.zeros(10), torch.zeros(10, device="meta")]
    assert (nothing.live_bytes, memory.live_bytes, len(kept)) == (0, 40, 2)


def test_counts_end_with_an_error_and_nest() -> None:
    kept, seen = [], []

    def fails() -> None:
        with measure_memory() as outer:
            seen.append(outer)
            kept.append(torch.zeros(4))
            with measure_memory() as inner:
                seen.append(inner)
                kept.append(torch.zeros(2))
            raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"):
        fails()
    kept.append(torch.zeros(8))
    assert [memory.live_bytes for memory in seen] == [24, 8]


def test_refuses_what_is_no_module() -> None:
    model: Any = []
    with pytest.raises(TypeError, match=r"model must be an nn\.Module or None, got list"), measure_memory(model):
        pass
