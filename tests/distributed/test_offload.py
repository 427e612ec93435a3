"""ZeRO-Offload against one process with PyTorch alone, hand-delayed where updates are; bytes, times by closed form."""

import copy
import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minillm.costs.offload import offload_device_bytes, offload_host_bytes, offload_link_bytes
from minillm.costs.zero import zero_communication_bytes
from minillm.distributed import Simulation, compute, count_traffic, measure_memory, run_ranks, simulate_ranks
from minillm.distributed.offload import Offload
from minillm.optim import AdamW, CPUAdam

STEPS, MICRO_BATCHES, MAX_NORM = 20, 2, 0.5
Gradients = list[Tensor | None]


class Net(nn.Module):
    """Tied, frozen and never used parameters, some used now and then, a single number; sizes that 3 parts cut."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(11, 6)
        self.up, self.down, self.detour = nn.Linear(6, 7), nn.Linear(7, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.frozen = nn.Linear(6, 6).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.to(dtype)

    def forward(self, tokens: Tensor, detour: bool) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.down(torch.tanh(self.up(x)))
        return self.head(self.frozen(self.detour(x) if detour else x) * self.scale)


def loss_of(model: nn.Module, step: int, micro: int, rank: int) -> Tensor:
    draw = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    tokens, targets = torch.randint(11, (2, 5), generator=draw)
    return nn.functional.cross_entropy(model(tokens, (step + rank + micro) % 4 == 0).double(), targets) / MICRO_BATCHES


def optimizer_for(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0, "lr": 0.03},
    ]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    if kind == "cpu adam":
        return CPUAdam(groups, lr=0.01, tile=8)
    return AdamW(groups, lr=0.01) if kind == "adamw" else torch.optim.AdamW(groups, lr=0.01)


def learning_rates(optimizer: Any, step: int) -> None:
    for group, lr in zip(optimizer.param_groups, (0.1, 0.03), strict=True):
        group["lr"] = lr * (1 - step / 30)


def one_process(
    kind: str, n_ranks: int, delay_after: int | None, steps: int = STEPS
) -> tuple[dict[str, Tensor], list[float]]:
    """The parameters after all steps, updates delayed by hand, and the norms of the gradients."""
    model = Net()
    optimizer = optimizer_for(kind if kind != "cpu adam" else "torch adamw", model)
    waiting: tuple[Gradients, int] | None = None
    norms = []

    def update(gradients: Gradients, step: int) -> None:
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        learning_rates(optimizer, step)
        optimizer.step()

    for step in range(steps):
        optimizer.zero_grad()
        for micro in range(MICRO_BATCHES):
            for rank in range(n_ranks):
                (loss_of(model, step, micro, rank) / n_ranks).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        now = [parameter.grad for parameter in model.parameters()], step
        if delay_after is None or step < delay_after:
            update(*now)
        else:
            if waiting is not None:
                update(*waiting)
            waiting = now
    if waiting is not None:
        update(*waiting)
    return model.state_dict(), norms


def offloaded(
    kind: str, delay_after: int | None, accumulate_on: str = "host", steps: int = STEPS
) -> tuple[dict[str, Tensor], list[float]]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    model = Net(seed=1 + rank)  # ranks that were seeded differently: the first one counts
    offload = Offload(model, optimizer_for(kind, model), bucket_bytes=300, delay_after=delay_after)
    norms = []
    for step in range(steps):
        for micro in range(MICRO_BATCHES):
            keep = accumulate_on == "device" and micro + 1 < MICRO_BATCHES
            with offload.no_sync() if keep else nullcontext():
                loss_of(model, step, micro, rank).backward()
        norms.append(float(offload.clip_grad_norm_(MAX_NORM)))
        learning_rates(offload, step)
        offload.step()
        offload.zero_grad()
    offload.flush()
    assert all(parameter.grad is None for parameter in model.parameters())
    return {name: value.clone() for name, value in model.state_dict().items()}, norms


def check_equal(
    ours: tuple[dict[str, Tensor], list[float]], theirs: tuple[dict[str, Tensor], list[float]], atol: float = 1e-12
) -> None:
    for name, value in theirs[0].items():
        torch.testing.assert_close(ours[0][name], value, rtol=0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
    assert ours[1] == pytest.approx(theirs[1], rel=1e-10)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "torch adamw", "cpu adam"])
@pytest.mark.parametrize("delay_after", [None, 0, 3])
def test_trains_as_one_process(kind: str, delay_after: int | None) -> None:
    check_equal(offloaded(kind, delay_after), one_process(kind, 1, delay_after))


@pytest.mark.parametrize(
    ("kind", "n_ranks", "delay_after", "accumulate_on"),
    [
        ("sgd", 2, None, "device"),
        ("sgd", 3, 3, "host"),
        ("cpu adam", 1, None, "device"),
        ("cpu adam", 2, 3, "device"),
        ("cpu adam", 2, None, "host"),
        ("torch adamw", 3, None, "host"),
    ],
)
def test_ranks_train_as_one_process(kind: str, n_ranks: int, delay_after: int | None, accumulate_on: str) -> None:
    expected = one_process(kind, n_ranks, delay_after)
    for result in simulate_ranks(offloaded, n_ranks, kind, delay_after, accumulate_on).results:
        check_equal(result, expected)


@pytest.mark.parametrize("delay_after", [None, 1])
def test_real_processes_agree_with_simulated_ones(delay_after: int | None) -> None:
    real = run_ranks(offloaded, 2, "cpu adam", delay_after, "host", 6)
    simulated = simulate_ranks(offloaded, 2, "cpu adam", delay_after, "host", 6).results
    expected = one_process("cpu adam", 2, delay_after, steps=6)
    for mine, other in zip(real, simulated, strict=True):
        check_equal(mine, other, atol=0)
        check_equal(mine, expected)


def test_gradients_are_summed_if_asked_to() -> None:
    def train() -> Tensor:
        model = nn.Linear(3, 1, bias=False).double()
        nn.init.zeros_(model.weight)
        offload = Offload(model, torch.optim.SGD(model.parameters(), lr=1.0), reduction="sum")
        model(torch.full((1, 3), dist.get_rank() + 1.0, dtype=torch.float64)).sum().backward()
        offload.step()
        return model.weight.detach().clone()

    assert all((weight == -3).all() for weight in simulate_ranks(train, 2).results)


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    bucket_bytes=st.sampled_from([1, 64, 200, 10**6]),
    n_ranks=st.integers(1, 4),
    used=st.lists(st.booleans(), min_size=5, max_size=5),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_any_sizes_buckets_and_ranks(
    sizes: list[int], bucket_bytes: int, n_ranks: int, used: list[bool], dtype: torch.dtype
) -> None:
    """One step of SGD from ones with whole-numbered gradients, exact in every dtype."""

    def train() -> list[Tensor]:
        model = nn.ParameterList(torch.ones(size, dtype=dtype) for size in sizes)
        model[0].data = torch.ones(2, sizes[0], dtype=dtype).t()  # strides of its own
        offload = Offload(
            model, torch.optim.SGD(model.parameters(), lr=0.5), bucket_bytes=bucket_bytes, reduction="sum"
        )
        order = list(model)[:: 1 if dist.get_rank() % 2 else -1]  # ranks need not fill buckets in one order
        total = sum(p.sum() * (dist.get_rank() + 1) for p, u in zip(order, used, strict=False) if u)
        if isinstance(total, Tensor):
            total.backward()
        elif n_ranks > 1:
            (model[0].sum() * 0).backward()  # a rank must not stay away from the others' collectives
        offload.step()
        return [p.detach().clone() for p in model]

    expected = [1.0] * len(sizes)
    for rank in range(n_ranks):
        order = range(len(sizes))[:: 1 if rank % 2 else -1]
        for index, u in zip(order, used, strict=False):
            expected[index] -= 0.5 * (rank + 1) * u
    for result in simulate_ranks(train, n_ranks).results:
        for parameter, value in zip(result, expected, strict=True):
            assert (parameter == value).all()


# 16-bit parameters and 32-bit masters


class Tower(nn.Module):
    """Layers of one size, a multiple of 8: no padding in buckets of 16-bit numbers, for up to 4 ranks."""

    def __init__(self, n_layers: int = 4, width: int = 32, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(n_layers))
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())


LAYER_BYTES = 32 * 32 * 2


def random_input(step: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(8, 32, generator=torch.Generator().manual_seed(step)).to(dtype)


@pytest.mark.parametrize("kind", [AdamW, CPUAdam, torch.optim.AdamW])
@pytest.mark.parametrize("cast", [False, True])
def test_bfloat16_parameters_follow_float32_masters(kind: type[torch.optim.Optimizer], cast: bool) -> None:
    start_dtype = torch.float32 if cast else torch.bfloat16
    theirs = Tower(dtype=start_dtype)
    masters = [p.detach().float() for p in theirs.parameters()]
    theirs.bfloat16()
    oracle = torch.optim.AdamW(masters, lr=1e-3, fused=True)
    ours = Tower(dtype=start_dtype)
    offload = Offload(
        ours,
        kind(ours.parameters(), lr=1e-3, weight_decay=0.01),
        bucket_bytes=LAYER_BYTES,
        parameter_dtype=torch.bfloat16 if cast else None,
    )
    for step in range(20):
        theirs(random_input(step)).square().sum().backward()
        with torch.no_grad():
            for parameter, master in zip(theirs.parameters(), masters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
            oracle.step()
            for parameter, master in zip(theirs.parameters(), masters, strict=True):
                parameter.copy_(master)
        ours(random_input(step, start_dtype)).square().sum().backward()
        offload.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.dtype == torch.bfloat16
        # A master may be rounded to the other side; nothing of what bfloat16 loses in 20 steps may be lost.
        torch.testing.assert_close(mine, other, rtol=2**-7, atol=0)
    for mine, master in zip(offload.state_dict()["model"].values(), masters, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, master, rtol=1e-4, atol=1e-6)


# The numbers of the paper


def train_tower(n_layers: int, steps: int, delay_after: int | None, micro_batches: int = 1, **kwargs: Any) -> Any:
    model = Tower(n_layers)
    offload = Offload(model, CPUAdam(model.parameters()), bucket_bytes=LAYER_BYTES, delay_after=delay_after, **kwargs)
    with count_traffic() if dist.is_initialized() else nullcontext() as traffic:
        for step in range(steps):
            for micro in range(micro_batches):
                model(random_input(step + 100 * micro)).sum().backward()
            offload.step()
        offload.flush()
    return model, offload, traffic


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("delay_after", [None, 0])
def test_bytes_are_those_of_the_paper(n_ranks: int, micro_batches: int, delay_after: int | None) -> None:
    def train() -> tuple[int, int, dict[str, int], dict[str, int]]:
        _, offload, traffic = train_tower(4, 5, delay_after, micro_batches)
        return offload.device_bytes, offload.host_bytes, offload.link_bytes, dict(traffic.by_operation)

    psi, bandwidth = Tower().n_parameters, 16e9
    simulation = simulate_ranks(train, n_ranks)
    for rank, (on_device, on_host, link, sent) in enumerate(simulation.results):
        assert on_device == offload_device_bytes(psi) == 2 * psi
        second_buffer = 0 if delay_after is None else 2 * psi / n_ranks
        assert on_host == offload_host_bytes(psi, n_ranks) + second_buffer
        assert sum(link.values()) == 5 * offload_link_bytes(psi, n_ranks, micro_batches=micro_batches)
        assert link["to device"] == 5 * 2 * psi / n_ranks
        for lane, n_bytes in link.items():
            seconds = sum(s.end - s.start for s in simulation.timeline if (s.rank, s.lane) == (rank, lane))
            assert seconds == pytest.approx(n_bytes / bandwidth)
        if n_ranks > 1:
            used = sent.pop("all_reduce")  # a byte a parameter tensor, which no closed form counts
            assert used == 5 * 4 * 2 * (n_ranks - 1) / n_ranks
        assert sum(sent.values()) == 5 * zero_communication_bytes(psi, 2, n_ranks, micro_batches=micro_batches)


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("delay_after", [None, 0])
def test_measured_bytes_are_those_of_the_paper(n_ranks: int, delay_after: int | None) -> None:
    """By kind; on a CPU what the device has and what the host has comes out of one memory."""

    def train() -> tuple[dict[str, int], dict[str, int]]:
        model = Tower(8)
        offload = Offload(model, CPUAdam(model.parameters()), bucket_bytes=LAYER_BYTES, delay_after=delay_after)
        with measure_memory(model, offload) as memory:
            for step in range(3):
                model(random_input(step)).sum().backward()
                offload.step()
            offload.flush()
        return memory.live, memory.peak

    psi = Tower(8).n_parameters
    for live, peak in simulate_ranks(train, n_ranks).results:
        assert live["parameters"] == peak["parameters"] == 2 * psi
        assert live["optimizer state"] == 12 * psi / n_ranks
        on_host = (2 if delay_after is None else 4) * psi / n_ranks
        assert live["gradients"] == on_host
        # One bucket fills and one travels; over ranks one more is reduced, and each has been cut into a part.
        in_flight = 2 * LAYER_BYTES if n_ranks == 1 else 4 * LAYER_BYTES
        assert peak["gradients"] <= on_host + in_flight + LAYER_BYTES  # and the gradient that comes
        assert live["other"] < 2000  # counts of steps


# The virtual clock


class TimedLayer(torch.autograd.Function):
    """x + 0 * weight, which takes `forward` seconds, and `backward` seconds back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, forward: float, backward: float) -> Tensor:
        compute(forward, name="forward")
        ctx.backward_seconds, ctx.like = backward, weight
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        compute(ctx.backward_seconds, name="backward")
        return gradient, torch.ones_like(ctx.like), None, None


def train_chain(n_layers: int, steps: int, f: float, b: float, c: float, u: float, delay_after: int | None) -> None:
    """Layers of 1024 numbers: f and b seconds of computing, c on the link, u to update."""
    model = nn.ParameterList(torch.zeros(1024, dtype=torch.bfloat16) for _ in range(n_layers))
    offload = Offload(
        model,
        CPUAdam(model.parameters()),
        bucket_bytes=2048,
        link_bandwidth=2048 / c,
        host_speed=1024 / u,
        delay_after=delay_after,
    )
    for _ in range(steps):
        x = torch.zeros(1, requires_grad=True)
        for weight in model:
            x = TimedLayer.apply(x, weight, f, b)
        x.sum().backward()
        offload.step()


def makespan(*args: Any) -> Simulation:
    return simulate_ranks(train_chain, 1, *args)


@settings(max_examples=20, deadline=None)
@given(
    n_layers=st.integers(2, 6),
    times=st.lists(st.integers(1, 8), min_size=4, max_size=4),
)
def test_copies_hide_behind_backward_and_behind_updates(n_layers: int, times: list[int]) -> None:
    f, b, c, u = map(float, times)
    # Gradients: each layer's copy beside the next layer's backward. Parameters: each copy beside the next update.
    last_gradient = n_layers * f + b + (n_layers - 1) * max(b, c) + c
    computed = n_layers * (f + b) if c <= b else n_layers * f + b + (n_layers - 2) * c + max(b, c)
    ends = []  # of each layer's update
    arrived = [n_layers * f + b + layer * max(b, c) + c for layer in range(n_layers)]
    for layer in range(n_layers):
        ends.append(max(ends[-1] if ends else computed, arrived[layer]) + u)
    up = 0.0
    for end in ends:
        up = max(up, end) + c
    result = makespan(n_layers, 1, f, b, c, u, None)
    assert last_gradient == arrived[-1]
    assert result.makespan == pytest.approx(up)
    if c <= b and c <= u * (n_layers - 1):
        assert result.makespan == pytest.approx(n_layers * (f + b) + u + (n_layers - 1) * max(u, c) + c)


def test_one_delayed_step_hides_the_update() -> None:
    n_layers, f, b, c, u, steps = 5, 2.0, 4.0, 1.0, 5.0, 10
    plain = makespan(n_layers, steps, f, b, c, u, None).makespan
    delayed = makespan(n_layers, steps, f, b, c, u, 0)
    assert plain == pytest.approx(steps * (n_layers * (f + b + u) + c))
    # The first step sends no parameters, and the last gradient's copy ends behind its backward; the parameters' copies
    # cannot hide, since forward and backward use what they would overwrite.
    assert delayed.makespan == pytest.approx(steps * n_layers * (f + b) + c + (steps - 1) * n_layers * c)
    updates = [span for span in delayed.timeline if span.lane == "host compute"]
    assert len(updates) == steps * n_layers
    hidden = [s for s in updates if s.end <= delayed.makespan]
    assert len(hidden) >= (steps - 1) * n_layers


def test_a_host_that_is_slower_than_the_device_sets_the_pace() -> None:
    n_layers, f, b, c, u, steps = 4, 1.0, 1.0, 0.5, 10.0, 6
    result = makespan(n_layers, steps, f, b, c, u, 0)
    # From the first gradients on the host updates without a pause, until the last step fetches the update before.
    first = n_layers * (f + b)
    assert result.makespan == pytest.approx(first + (steps - 1) * n_layers * u + n_layers * c, abs=n_layers * c + c)


# State


def train_on(model: nn.Module, offload: Offload, steps: range, micro_batches: int = MICRO_BATCHES) -> dict[str, Tensor]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in steps:
        for micro in range(micro_batches):
            loss_of(model, step, micro, rank).backward()
        offload.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("delay_after", [None, 2])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (3, 2)])
def test_training_goes_on_from_a_state_in_other_ranks(before: int, after: int, delay_after: int | None) -> None:
    """Every rank has the same batches, so that the number of ranks changes nothing."""

    def make() -> tuple[nn.Module, Offload]:
        model = Net()
        return model, Offload(model, optimizer_for("cpu adam", model), bucket_bytes=300, delay_after=delay_after)

    def same_batches(model: nn.Module, offload: Offload, steps: range) -> dict[str, Tensor]:
        for step in steps:
            loss_of(model, step, 0, 0).backward()
            offload.step()
        return {name: value.clone() for name, value in model.state_dict().items()}

    def first() -> tuple[dict[str, Any], dict[str, Tensor]]:
        model, offload = make()
        same_batches(model, offload, range(5))
        state = offload.state_dict()
        return copy.deepcopy(state), same_batches(model, offload, range(5, 9))

    def second(state: dict[str, Any]) -> dict[str, Tensor]:
        model, offload = make()
        same_batches(model, offload, range(20, 22))  # must leave no trace
        offload.load_state_dict(state)
        return same_batches(model, offload, range(5, 9))

    for state, expected in simulate_ranks(first, before).results:
        assert (state["offload"]["shown"] is None) == (delay_after is None)
        for result in simulate_ranks(second, after, state).results:
            for name, value in expected.items():
                torch.testing.assert_close(result[name], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_the_state_is_one_process_state(n_ranks: int) -> None:
    def train() -> tuple[dict[str, Any], dict[str, Tensor]]:
        model = Net()
        offload = Offload(model, optimizer_for("cpu adam", model), bucket_bytes=300)
        train_on(model, offload, range(4))
        return copy.deepcopy(offload.state_dict()), train_on(model, offload, range(4, 5))

    state, expected = simulate_ranks(train, n_ranks).results[0]
    model = Net(seed=9)
    optimizer = optimizer_for("torch adamw", model)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for micro in range(MICRO_BATCHES):
        for rank in range(n_ranks):
            (loss_of(model, 4, micro, rank) / n_ranks).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12)

    # and back: an optimizer that has learnt, and a state of one process
    model_b, taken = Net(), Net()
    optimizer_b = optimizer_for("torch adamw", taken)
    offload = Offload(model_b, optimizer_for("cpu adam", model_b))
    offload.load_state_dict({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    taken.load_state_dict(model.state_dict())
    optimizer_b.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    offload_taken = Offload(taken, optimizer_b)
    model.zero_grad()
    loss_of(model, 5, 0, 0).backward()
    optimizer.step()
    for other, offload_other in ((model_b, offload), (taken, offload_taken)):
        loss_of(other, 5, 0, 0).backward()
        offload_other.step()
        for name, value in model.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=1e-12)


def test_a_state_that_does_not_fit_is_refused() -> None:
    model = Net()
    offload = Offload(model, optimizer_for("adamw", model))
    state = offload.state_dict()
    with pytest.raises(ValueError, match=r"(?s)state does not fit the model.*up\.weight"):
        offload.load_state_dict({**state, "model": {k: v for k, v in state["model"].items() if k != "up.weight"}})
    with pytest.raises(ValueError, match="optimizer groups of"):
        offload.load_state_dict({**state, "optimizer": {"state": {}, "param_groups": []}})


# Behaviour around backward and step


def small() -> tuple[nn.Linear, Offload]:
    model = nn.Linear(4, 3).double()
    return model, Offload(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_zero_grad_forgets_what_the_host_has() -> None:
    model, offload = small()
    before = model.weight.detach().clone()
    model(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    offload.zero_grad()
    offload.step()
    assert torch.equal(model.weight, before)


def test_a_step_uses_its_gradients_up() -> None:
    model, offload = small()
    model(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    offload.step()
    after = model.weight.detach().clone()
    offload.step()
    assert torch.equal(model.weight, after)


def test_gradients_kept_on_the_device_alone_are_sent_by_the_step() -> None:
    model, offload = small()
    before = model.bias.detach().clone()
    for _ in range(2):
        with offload.no_sync():
            model(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    assert offload.link_bytes["to host"] == 0
    offload.step()
    assert offload.link_bytes["to host"] == offload.link_bytes["to device"] > 0
    torch.testing.assert_close(model.bias.detach(), before - 0.2)


def test_a_graph_from_before_the_step_is_refused() -> None:
    model, offload = small()
    x = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    loss = model(x).sum()
    loss.backward(retain_graph=True)
    offload.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_backward_that_was_broken_off_is_noticed() -> None:
    model, offload = small()

    def fail(_: Tensor) -> None:
        raise KeyError("boom")

    x = torch.ones(1, 4, dtype=torch.float64, requires_grad=True)
    hidden = x * 1
    hidden.register_hook(fail)
    with pytest.raises(KeyError, match="boom"):
        (model(hidden).sum() + 0 * hidden.sum()).backward()
    with pytest.raises(RuntimeError, match="did not come to its end"):
        offload.step()
    offload.zero_grad()
    before = model.bias.detach().clone()
    model(x).sum().backward()
    offload.step()
    torch.testing.assert_close(model.bias.detach(), before - 0.1)


def test_second_derivatives_and_sparse_gradients_are_refused() -> None:
    model, offload = small()
    with pytest.raises(RuntimeError, match="create_graph"):
        model(torch.ones(1, 4, dtype=torch.float64)).sum().backward(create_graph=True)
    offload.zero_grad()  # and the circle of parameter and gradient that it has made
    embedding = nn.Embedding(5, 3, sparse=True)
    offload = Offload(embedding, torch.optim.SGD(embedding.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="weight has a sparse gradient"):
        embedding(torch.tensor([1])).sum().backward()
    offload.zero_grad()


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_changes_nothing(reentrant: bool) -> None:
    results = []
    for recompute in (False, True):
        model = Tower(3, dtype=torch.float64)
        offload = Offload(model, torch.optim.SGD(model.parameters(), lr=0.1), bucket_bytes=LAYER_BYTES)
        for step in range(3):
            x = random_input(step, torch.float64).requires_grad_()
            for layer in model.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant) if recompute else layer(x)
            x.square().sum().backward()
            offload.clip_grad_norm_(1.0)
            offload.step()
        results.append([p.detach().clone() for p in model.parameters()])
    for plain, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-14)


class Scaled(torch.optim.SGD):
    """An optimizer that keeps a setting of its own beside its groups."""

    def __init__(self, parameters: Any, scale: float) -> None:
        super().__init__(parameters, lr=1.0)
        self.scale = scale

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.scale)
        return super().step(closure)


def test_an_optimizer_with_settings_of_its_own() -> None:
    model = nn.Linear(4, 3).double()
    offload = Offload(model, Scaled(model.parameters(), 0.25))
    before = model.bias.detach().clone()
    model(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    offload.step()
    torch.testing.assert_close(model.bias.detach(), before - 0.25)


def test_a_model_that_is_offloaded_no_longer_is_an_ordinary_one() -> None:
    model, offload = small()
    del offload
    model(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
    assert (model.bias.grad == 1).all()


def test_a_schedule_on_the_users_optimizer_is_followed() -> None:
    model = nn.Linear(4, 3).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    offload = Offload(model, optimizer)
    before = model.bias.detach().clone()
    for _ in range(3):
        model(torch.ones(1, 4, dtype=torch.float64)).sum().backward()
        offload.step()
        schedule.step()
    torch.testing.assert_close(model.bias.detach(), before - 1.11)


def test_a_delayed_update_raises_at_the_next_step_and_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(4, 3).double()
    offload = Offload(model, torch.optim.SGD(model.parameters(), lr=0.1), delay_after=0)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OverflowError("no room")

    def backward() -> None:
        model(torch.ones(1, 4, dtype=torch.float64)).sum().backward()

    with monkeypatch.context() as patch:
        patch.setattr(offload.buckets[0], "update", fail)
        backward()
        offload.step()
        backward()
        with pytest.raises(OverflowError, match="no room"):
            offload.step()
    backward()
    offload.step()
    offload.flush()
    for thread in threading.enumerate():
        if thread.name.startswith("delayed update"):
            thread.join(timeout=10)
            assert not thread.is_alive()


BAD_ARGUMENTS: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "bucket_bytes must be at least 1, got 0", {"bucket_bytes": 0}),
    (TypeError, "bucket_bytes must be an int", {"bucket_bytes": 1.5}),
    (ValueError, "delay_after must be at least 0, got -1", {"delay_after": -1}),
    (TypeError, "delay_after must be an int, got True", {"delay_after": True}),
    (ValueError, 'reduction must be "mean" or "sum"', {"reduction": "max"}),
    (ValueError, "parameter_dtype must be None or a floating dtype", {"parameter_dtype": torch.int8}),
    (ValueError, "link_bandwidth must be above 0", {"link_bandwidth": 0}),
    (ValueError, "host_speed must be above 0", {"host_speed": float("nan")}),
]


@pytest.mark.parametrize(("error", "words", "settings_"), BAD_ARGUMENTS)
def test_bad_arguments_are_named(error: type[Exception], words: str, settings_: dict[str, Any]) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(error, match=words):
        Offload(model, torch.optim.SGD(model.parameters(), lr=0.1), **settings_)


def test_models_and_optimizers_that_do_not_go_together_are_refused() -> None:
    model, other = nn.Linear(8, 8), nn.Linear(2, 3)
    with pytest.raises(ValueError, match=r"also has some of the shapes \[\(3, 2\), \(3,\)\]"):
        Offload(model, torch.optim.SGD([*model.parameters(), *other.parameters()]))
    with pytest.raises(ValueError, match="freeze or add bias"):
        Offload(model, torch.optim.SGD([model.weight]))
    with pytest.raises(ValueError, match="must be elementwise, but Adafactor"):
        Offload(model, torch.optim.Adafactor(model.parameters()))
    with pytest.raises(TypeError, match="model must be"):
        Offload("model", torch.optim.SGD(model.parameters()))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be"):
        Offload(model, "adam")  # type: ignore[arg-type]
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameters on one device, got none"):
        Offload(frozen, torch.optim.SGD(frozen.parameters()))
    with pytest.raises(ValueError, match="max_norm must be above 0"):
        small()[1].clip_grad_norm_(0.0)


# A real device


@pytest.mark.gpu
@pytest.mark.parametrize("delay_after", [None, 2])
def test_on_a_gpu(delay_after: int | None) -> None:
    """Streams and pinned memory give what the CPU gives; the device's allocator holds 2 Psi and two buckets at most."""
    width, n_layers, dtype = 1024, 16, torch.bfloat16

    def make(device: str) -> tuple[nn.Module, Offload]:
        model = Tower(n_layers, width, dtype).to(device)
        optimizer = CPUAdam(model.parameters(), lr=1e-3)
        return model, Offload(model, optimizer, bucket_bytes=2 * width**2, delay_after=delay_after)

    def batch(step: int) -> Tensor:
        return torch.randn(16, width, generator=torch.Generator().manual_seed(step)).to(dtype)

    start = torch.cuda.memory_allocated()
    model, offload = make("cuda")
    psi = n_layers * width**2
    assert torch.cuda.memory_allocated() - start == 2 * psi
    reference, on_cpu = make("cpu")

    def loss_with_given_gradients(module: nn.Module, step: int) -> Tensor:
        """The same numbers as gradients on every device."""
        draw = torch.Generator().manual_seed(step)
        return torch.stack(
            [(p * torch.randn(p.shape, generator=draw).to(p)).float().sum() for p in module.parameters()]
        ).sum()

    for step in range(8):
        for module, each in ((model, offload), (reference, on_cpu)):
            loss_with_given_gradients(module, step).backward()
            each.clip_grad_norm_(10.0)
            each.step()
    offload.flush()
    on_cpu.flush()
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.cpu(), other, rtol=2**-7, atol=1e-6)
    assert offload.link_bytes == on_cpu.link_bytes

    bucket = 2 * width**2
    for step in range(4):  # an ordinary forward and backward
        if step == 1:  # the libraries' workspaces are there by now
            torch.cuda.synchronize()
            idle = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        model(batch(step).cuda()).float().square().mean().backward()
        offload.step()
    torch.cuda.synchronize()
    # One that fills, one or two that travel, and the gradient that comes; all of them would be 16. And activations.
    assert torch.cuda.max_memory_allocated() - idle <= 4 * bucket + 2 * 2**20
    assert torch.cuda.memory_allocated() <= idle
    offload.flush()
    assert offload.device_bytes == 2 * psi
