"""The parameter server: against one process in float64, delays replayed by hand; bytes and time in closed form."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minillm.costs import communication_seconds
from minillm.distributed import (
    Network,
    ParameterServer,
    RankError,
    Simulation,
    compute,
    now,
    ring_all_reduce,
    run_ranks,
    server_all_reduce,
    simulate_ranks,
)
from minillm.distributed.parameter_server import Update
from minillm.distributed.parts import share_out

STEPS = 20
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1),
}
NETWORK = Network(latency=0.25, bandwidth=64.0)  # sums of these are exact


def _model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()


def _loss(model: nn.Module, worker: int, step: int) -> Tensor:
    """Each worker has a batch of its own in each step."""
    generator = torch.Generator().manual_seed(1000 * worker + step)
    x, y = torch.randn(6, 4, generator=generator), torch.randn(6, 2, generator=generator)
    return ((model(x.double()) - y) ** 2).mean()


def _values(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def _train(
    optimizer: str = "SGD",
    steps: int | Sequence[int] = STEPS,
    seconds: Sequence[float] = (0.0,) * 8,
    servers: Sequence[int] = (0,),
    **options: Any,
) -> tuple[list[Tensor], list[Update]]:
    """What each rank runs: (its parameters at the end, a server's updates). `seconds`: of each worker's computing."""
    model = _model()
    if dist.get_rank() != servers[0]:
        for parameter in model.parameters():
            nn.init.zeros_(parameter)  # whatever stands here: the first server's is taken
    server = ParameterServer(model, OPTIMIZERS[optimizer](model), servers=servers, **options)
    if server.is_server:
        updates = server.serve(steps)
        return _values(model), updates
    worker = server.workers.index(dist.get_rank())
    for step in range(steps if isinstance(steps, int) else steps[worker]):
        model.zero_grad()
        _loss(model, worker, step).backward()
        compute(seconds[worker])
        server.push()
        server.pull()
    return _values(model), []


def _in_one_process(optimizer: str, n_workers: int) -> list[Tensor]:
    model = _model()
    stepper = OPTIMIZERS[optimizer](model)
    for step in range(STEPS):
        stepper.zero_grad()
        for worker in range(n_workers):
            (_loss(model, worker, step) / n_workers).backward()
        stepper.step()
    return _values(model)


def _replayed(optimizer: str, updates: Sequence[Update], workers: Sequence[int]) -> list[Tensor]:
    """One process that takes each gradient where, and of the parameters of which, the updates say it was taken."""
    model = _model()
    stepper = OPTIMIZERS[optimizer](model)
    versions, steps = [_values(model)], dict.fromkeys(workers, 0)
    for update in updates:
        (rank,) = update.workers
        old = _model()
        for parameter, value in zip(old.parameters(), versions[update.version - 1 - update.staleness], strict=True):
            parameter.data = value
        _loss(old, workers.index(rank), steps[rank]).backward()
        steps[rank] += 1
        for parameter, other in zip(model.parameters(), old.parameters(), strict=True):
            parameter.grad = other.grad
        stepper.step()
        versions.append(_values(model))
    return versions[-1]


def _close(result: list[Tensor], expected: list[Tensor]) -> None:
    for values, others in zip(result, expected, strict=True):
        torch.testing.assert_close(values, others, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("servers", [[0], [2], [3, 0], [0, 1, 2, 4]])
def test_synchronous_training_is_that_of_one_process_on_all_batches(optimizer: str, servers: list[int]) -> None:
    n = 3 + len(servers)

    results = simulate_ranks(lambda: _train(optimizer, servers=servers), n).results

    expected = _in_one_process(optimizer, 3)
    workers = tuple(rank for rank in range(n) if rank not in servers)
    for rank in workers:
        _close(results[rank][0], expected)
    for rank in servers:
        values, updates = results[rank]
        assert [(u.version, u.workers, u.staleness) for u in updates] == [(v, workers, 0) for v in range(1, STEPS + 1)]
        if len(servers) == 1:
            _close(values, expected)
    # Of several servers each has trained its part, and no part has two.
    trained = [sum(torch.equal(results[rank][0][i], results[workers[0]][0][i]) for rank in servers) for i in range(4)]
    assert trained == [1] * 4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("max_staleness", [None, 1])
@pytest.mark.parametrize("steps", [STEPS, (30, 5, 12)])
def test_asynchronous_training_is_its_updates_replayed_in_one_process(
    optimizer: str, max_staleness: int | None, steps: int | Sequence[int]
) -> None:
    simulation = simulate_ranks(
        lambda: _train(
            optimizer, steps, (0.9e-3, 2e-3, 3.1e-3), servers=[1], synchronous=False, max_staleness=max_staleness
        ),
        4,
    )
    values, updates = simulation.results[1]

    assert [update.version for update in updates] == list(range(1, len(updates) + 1))
    counts = [sum(update.workers == (rank,) for update in updates) for rank in (0, 2, 3)]
    assert counts == ([steps] * 3 if isinstance(steps, int) else list(steps))
    assert max(update.staleness for update in updates) > 1
    _close(values, _replayed(optimizer, updates, (0, 2, 3)))


def test_gradients_are_taken_in_the_order_in_which_they_arrive() -> None:
    free = Network(latency=0.0, bandwidth=1e30)  # a message adds nothing to a float of seconds
    updates = simulate_ranks(
        lambda: _train(steps=(6, 3, 2), seconds=(1.0, 2.125, 3.25), synchronous=False), 4, network=free
    ).results[0][1]

    # By hand: worker 1 pushes at 1, 2, 3, ..., worker 2 at 2.125, ..., worker 3 at 3.25, ...
    assert [(update.time, update.workers[0], update.staleness) for update in updates] == [
        (1.0, 1, 0),
        (2.0, 1, 0),
        (2.125, 2, 2),
        (3.0, 1, 1),
        (3.25, 3, 4),
        (4.0, 1, 1),
        (4.25, 2, 3),
        (5.0, 1, 1),
        (6.0, 1, 0),
        (6.375, 2, 2),
        (6.5, 3, 5),
    ]


def test_the_same_run_twice_is_the_same() -> None:
    def run() -> Simulation:
        return simulate_ranks(lambda: _train(seconds=(1.0, 1.7, 2.9), synchronous=False, max_staleness=3), 4)

    first, second = run(), run()

    assert first.messages == second.messages
    assert first.results[0][1] == second.results[0][1]
    for one, other in zip(first.results, second.results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.01, 5.0), min_size=1, max_size=4), st.integers(0, 3))
def test_the_bound_holds_the_fast_workers_back(seconds: list[float], bound: int) -> None:
    n = len(seconds)
    updates = simulate_ranks(
        lambda: _train(steps=8, seconds=seconds, synchronous=False, max_staleness=bound), n + 1
    ).results[0][1]

    assert all(update.staleness <= (n - 1) * (2 * bound + 1) for update in updates)
    pushes = dict.fromkeys(range(1, n + 1), 0)
    for update in updates:
        pushes[update.workers[0]] += 1
        assert max(pushes.values()) - min(pushes.values()) <= bound + 1


def test_without_a_bound_a_slow_workers_gradient_is_as_old_as_the_others_are_fast() -> None:
    updates = simulate_ranks(lambda: _train(steps=(40, 40, 2), seconds=(1.0, 1.0, 30.0), synchronous=False), 4).results[
        0
    ][1]

    assert max(update.staleness for update in updates if update.workers == (3,)) >= 58
    assert max(update.staleness for update in updates if update.workers != (3,)) <= 2


@pytest.mark.parametrize("n_workers", [1, 2, 5])
@pytest.mark.parametrize("synchronous", [True, False])
def test_two_copies_of_the_model_a_worker_and_step_go_through_the_servers_link(
    n_workers: int, synchronous: bool
) -> None:
    simulation = simulate_ranks(lambda: _train(steps=3, synchronous=synchronous), n_workers + 1)
    model_bytes = 8 * (4 * 8 + 8 + 8 * 2 + 2)

    pushes = [message for message in simulation.messages if message.label.startswith("push ")]
    pulls = [message for message in simulation.messages if message.label.startswith("pull ")]
    assert {message.n_bytes for message in pushes + pulls} == {model_bytes}
    assert len(pushes) == len(pulls) == 3 * n_workers
    assert {message.destination for message in pushes} == {0} == {message.source for message in pulls}
    for worker in range(1, n_workers + 1):
        assert [message.label for message in pushes if message.source == worker] == ["push 1", "push 2", "push 3"]
    versions = [int(message.label.split()[1]) for message in pulls]
    assert versions == sorted(versions)
    assert max(versions) == (3 if synchronous else 3 * n_workers)


def _timed(n_elements: int, steps: int, **options: Any) -> float:
    """Seconds of training on n_elements float32 from the moment at which all ranks have begun; 0.5 s of computing."""
    model = nn.Linear(n_elements, 1, bias=False)
    server = ParameterServer(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)
    dist.barrier()
    begin = now()
    if server.is_server:
        server.serve(steps)
    else:
        for _ in range(steps):
            model(torch.ones(n_elements)).sum().backward()
            compute(0.5)
            server.push()
            server.pull()
    return now() - begin


@pytest.mark.parametrize("n_workers", [1, 2, 3, 8, 15])
def test_a_synchronous_step_takes_one_message_after_another_through_the_servers_port(n_workers: int) -> None:
    results = simulate_ranks(lambda: _timed(16, 4), n_workers + 1, network=NETWORK).results

    exchange = 2 * n_workers * 1.25  # a message of 64 bytes takes 0.25 + 64 / 64 seconds
    # Who has its answer computes while the others get theirs: only one worker, alone, keeps the server waiting.
    assert max(results) == results[0] == 4 * exchange + 0.5 * (4 if n_workers == 1 else 1)
    assert exchange == communication_seconds(
        "all_reduce", 64, n_workers + 1, latency=0.25, bandwidth=64.0, algorithm="parameter_server"
    )


@pytest.mark.parametrize("n_workers", [3, 8])
def test_asynchronously_the_port_takes_in_and_gives_out_at_the_same_time(n_workers: int) -> None:
    results = simulate_ranks(lambda: _timed(16, 4, synchronous=False), n_workers + 1, network=NETWORK).results

    # The port never stands still: half of the synchronous time, as soon as it is the bottleneck.
    assert max(results) == 0.5 + (4 * n_workers + 1) * 1.25


def test_with_more_ranks_a_server_takes_longer_and_longer_and_the_ring_tends_to_a_limit() -> None:
    n_elements = 4800
    n_bytes, network = 4 * n_elements, Network(latency=1e-6, bandwidth=1e6)
    ring, server = {}, {}
    for n in (2, 3, 4, 6, 8, 12, 16):
        ring[n] = simulate_ranks(lambda: ring_all_reduce(torch.ones(n_elements)), n, network=network).makespan
        results = simulate_ranks(lambda: _timed(n_elements, 1), n + 1, network=network).results
        server[n] = max(results) - 0.5
        one_of_them = simulate_ranks(lambda: server_all_reduce(torch.ones(n_elements)), n, network=network).makespan
        assert one_of_them == pytest.approx(server[n] * (n - 1) / n)  # its own gradient needs no message
        assert ring[n] == pytest.approx(2 * (n - 1) * (1e-6 + n_bytes / n / 1e6), rel=1e-12)
        assert server[n] == pytest.approx(2 * n * (1e-6 + n_bytes / 1e6), rel=1e-9)

    limit = 2 * n_bytes / 1e6
    assert all(ring[n] < 1.01 * limit for n in ring)
    assert ring[16] - ring[2] < limit / 2
    assert server[16] / server[2] == pytest.approx(8)
    assert server[16] > 16 * ring[16]


def test_two_servers_share_the_bytes_and_the_time() -> None:
    def ranks(servers: list[int]) -> float:
        model = nn.ModuleList(nn.Linear(8, 1, bias=False) for _ in range(2))
        server = ParameterServer(model, torch.optim.SGD(model.parameters(), lr=0.1), servers=servers)
        dist.barrier()
        begin = now()
        if server.is_server:
            server.serve(3)
        else:
            for _ in range(3):
                sum(part(torch.ones(8)) for part in model).backward()
                server.push()
                server.pull()
        return now() - begin

    one = simulate_ranks(ranks, 5, [0], network=NETWORK)
    two = simulate_ranks(ranks, 6, [0, 5], network=NETWORK)

    assert max(one.results) == 3 * 8 * 1.25
    # 32 bytes a message: the latency is not shared. Once, both want to answer the same worker, and one must wait.
    assert max(two.results) == (3 * 8 + 1) * 0.75
    pulls = [message for message in two.messages if message.label.startswith("pull ")]
    assert sorted(message.source for message in pulls) == [0] * 12 + [5] * 12
    assert {message.n_bytes for message in pulls} == {32}


class _Mixed(nn.Module):
    """Every kind of tensor at once: tied, frozen, unused, in three dtypes, 0-dimensional, buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3).double()
        self.tied = nn.Linear(3, 3).double()
        self.tied.weight = self.first.weight
        self.narrow = nn.Parameter(torch.randn(5).bfloat16())
        self.scale = nn.Parameter(torch.randn(()))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(2))
        self.register_buffer("mask", torch.rand(3) > 0.5)
        self.register_buffer("count", torch.tensor(torch.randint(100, ()).item()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.tied(torch.tanh(self.first(x))) + self.frozen
        return (x * x).sum() * self.scale + self.narrow.float().pow(2).sum()


@pytest.mark.parametrize("servers", [[0], [0, 2]])
def test_tied_frozen_unused_and_mixed_tensors_and_buffers(servers: list[int]) -> None:
    def ranks() -> tuple[list[Tensor], list[Tensor]]:
        model = _Mixed()  # each rank draws its own
        start = [tensor.clone() for tensor in model.state_dict().values()]
        server = ParameterServer(model, torch.optim.SGD(model.parameters(), lr=0.01), servers=servers)
        if server.is_server:
            server.serve(3)
        else:
            for step in range(3):
                model.zero_grad()
                model(torch.full((3,), 1.0 + step + dist.get_rank()).double()).backward()
                server.push()
                server.pull()
        return start, list(model.state_dict().values())

    results = simulate_ranks(ranks, 4).results
    model = _Mixed()
    model.load_state_dict(dict(zip(model.state_dict(), results[0][0], strict=True)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    workers = [rank for rank in range(4) if rank not in servers]
    for step in range(3):
        gradients = []
        for rank in workers:
            optimizer.zero_grad()
            model(torch.full((3,), 1.0 + step + rank).double()).backward()
            gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
        for parameter, *grads in zip(model.parameters(), *gradients, strict=True):
            parameter.grad = None if grads[0] is None else torch.stack(grads).mean(0)
        optimizer.step()

    for rank in workers:
        for value, expected in zip(results[rank][1], model.state_dict().values(), strict=True):
            torch.testing.assert_close(value, expected)


def test_gradients_that_stand_in_a_servers_model_are_not_used() -> None:
    def ranks() -> list[float]:
        model = nn.ModuleList([nn.Linear(4, 1, bias=False), nn.Linear(2, 1, bias=False)])
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        server = ParameterServer(model, torch.optim.SGD(model.parameters(), lr=0.5), servers=[0, 1])
        if server.is_server:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 9.0)
            server.serve(1)
            assert all(parameter.grad is None for parameter in model.parameters())
        else:
            sum(part.weight.sum() for part in model).backward()
            server.push()
            server.pull()
        return [parameter.mean().item() for parameter in model.parameters()]

    # The larger part stands on the first server.
    assert simulate_ranks(ranks, 3).results == [[-0.5, 0.0], [0.0, -0.5], [-0.5, -0.5]]


def test_servers_keep_about_the_same_number_of_bytes() -> None:
    tensors = [torch.zeros(n) for n in (10, 1, 60, 30, 5, 25, 20, 40)]
    parts = share_out(tensors, 3)

    # The largest first, each to the lightest: 60 | 40 | 30, then 25 to 30, 20 to 40, 10 to 55, and so on.
    assert [[tensor.numel() for tensor in part.tensors] for part in parts] == [[60, 5], [40, 20, 1], [30, 25, 10]]
    assert sorted(part.n_bytes for part in parts) == [244, 260, 260]
    with pytest.raises(ValueError, match="n_parts must be at most the 8 tensors that there are, got 9"):
        share_out(tensors, 9)


def test_a_schedule_steps_on_the_server() -> None:
    def ranks() -> float:
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        optimizer.register_step_post_hook(lambda *_: schedule.step())
        server = ParameterServer(model, optimizer)
        if server.is_server:
            server.serve(3)
        else:
            for _ in range(3):
                model.zero_grad()
                model(torch.ones(1)).backward()
                server.push()
                server.pull()
        return model.weight.item()

    assert simulate_ranks(ranks, 2).results == [-1.75, -1.75]


def test_server_and_workers_in_a_group() -> None:
    def ranks() -> tuple[list[Tensor], list[Update]] | None:
        group = dist.new_group([1, 2, 3, 5])
        return _train(servers=[3], group=group) if dist.get_rank() in (1, 2, 3, 5) else None

    results = simulate_ranks(ranks, 6).results

    expected = _in_one_process("SGD", 3)
    for rank in (1, 2, 3, 5):
        _close(results[rank][0], expected)
    assert results[3][1][0].workers == (1, 2, 5)


def _server(**options: Any) -> ParameterServer:
    model = nn.Linear(2, 1)
    return ParameterServer(model, torch.optim.SGD(model.parameters(), lr=0.1), **options)


def _serve(n_steps: int | Sequence[int], **options: Any) -> None:
    server = _server(**options)
    if server.is_server:
        server.serve(n_steps)


def _optimizer_of_others() -> ParameterServer:
    return ParameterServer(nn.Linear(2, 1), torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1))


def _nothing_to_train() -> ParameterServer:
    model = nn.Linear(2, 1).requires_grad_(False)
    return ParameterServer(model, torch.optim.SGD(model.parameters(), lr=0.1))


def _another_model_on_rank_1() -> ParameterServer:
    model = nn.Linear(2 + dist.get_rank(), 1)
    return ParameterServer(model, torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: _server(servers=[]), ValueError, r"servers must be different ranks of \[0, 1\], not all .* got \[\]"),
        (lambda: _server(servers=[0, 0]), ValueError, "servers must be different"),
        (lambda: _server(servers=[0, 1]), ValueError, "not all of them"),
        (lambda: _server(servers=[7]), ValueError, r"got \[7\]"),
        (lambda: _server(max_staleness=1), ValueError, "max_staleness must be at least 0, and None in the synchronous"),
        (lambda: _server(max_staleness=-1, synchronous=False), ValueError, "max_staleness must be at least 0.*got -1"),
        (lambda: ParameterServer(nn.Linear(2, 1), "SGD"), TypeError, "optimizer must be a torch.optim.Optimizer"),
        (_optimizer_of_others, ValueError, "one for the model's parameters"),
        (_nothing_to_train, ValueError, "parameters that require a gradient, got none"),
        (_another_model_on_rank_1, ValueError, r"the same on every rank, got models of \[12, 16\] bytes"),
        (lambda: _server(servers=[1]).serve(1), RuntimeError, r"serve\(\) is for servers, ranks \[1\], not for rank 0"),
        (lambda: _serve([1, 2]), ValueError, "n_steps must be one number, at least 0"),
        (lambda: _serve(-1), ValueError, "n_steps must be .* got -1"),
        (lambda: _serve([1, 2], synchronous=False), ValueError, "or one for each of 1 workers"),
        (lambda: _server().push(), RuntimeError, r"push\(\) is for workers"),
        (lambda: _server(servers=[1]).pull(), RuntimeError, r"pull\(\) is for workers, each after push"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(RankError, match=words) as raised:
        simulate_ranks(call, 2)

    assert isinstance(raised.value.__cause__, error)


def test_more_servers_than_parameters_and_ranks_outside_of_the_group_are_refused() -> None:
    with pytest.raises(RankError, match="servers must be no more than the 2 parameters, got 3"):
        simulate_ranks(lambda: _server(servers=[0, 1, 2]), 4)
    with pytest.raises(RankError, match=r"this rank is in, got ranks \[0, 1\] on rank 2"):
        simulate_ranks(lambda: _server(group=dist.new_group([0, 1])) and None, 3)


def test_a_worker_pushes_once_and_then_pulls() -> None:
    def ranks() -> None:
        server = _server()
        if server.is_server:
            server.serve(1)
        else:
            server.push()
            with pytest.raises(RuntimeError, match="each followed by pull"):
                server.push()
            server.pull()

    simulate_ranks(ranks, 2)


@pytest.mark.parametrize("servers", [[1], [0, 3]])
def test_real_processes_train_synchronously_as_one_process(servers: list[int]) -> None:
    n = 2 + len(servers)
    results = run_ranks(_train, n, "AdamW", STEPS, (0.0, 0.0), servers)

    for rank in set(range(n)) - set(servers):
        _close(results[rank][0], _in_one_process("AdamW", 2))


def _train_asynchronously() -> tuple[list[Tensor], list[Update]]:
    return _train("SGD", (8, 14, 11), synchronous=False, max_staleness=2)


def test_real_processes_train_asynchronously_as_their_updates_say() -> None:
    values, updates = run_ranks(_train_asynchronously, 4)[0]

    assert len(updates) == 8 + 14 + 11
    _close(values, _replayed("SGD", updates, (1, 2, 3)))
