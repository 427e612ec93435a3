"""PipeDream on ranks equals a replay in one process that keeps all past weights, update for update."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from minillm.distributed import init_mesh, run_ranks, simulate_ranks
from minillm.distributed.pipeline import Kind, Pipeline, Schedule, one_f_one_b, pipedream, pipedream_2bw, split

WIDTH, ROWS = 5, 3
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.2),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
}
Outcome = tuple[Tensor, list[Tensor], int, int]


def make_model(n_pieces: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(n_pieces)]).double()


def stream(m: int, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, m * rows, WIDTH, generator=generator, dtype=torch.float64)
    return x, y


def on_ranks(schedule: Schedule, optimizer: str, recompute: bool = False) -> Outcome:
    stage = dist.get_rank()
    parts = split(make_model(schedule.n_pieces), schedule.n_pieces, balance=[1.0] * schedule.n_pieces)
    own = parts.pieces[stage]
    pipeline = Pipeline(
        parts, schedule, mse_loss, optimizer=OPTIMIZERS[optimizer](own.parameters()), recompute=recompute
    )
    pipeline.step(*stream(schedule.n_micro_batches))
    versions = pipeline._walk._chunks[0].versions
    assert versions is not None
    weights = [p.detach().clone() for p in own.parameters()]
    return pipeline.losses, weights, versions.most_versions, versions.n_bytes


def replay(
    p: int, m: int, optimizer: str, version: Callable[[int, int], int], accumulate: int = 1, rows: int = ROWS
) -> Any:
    """Losses and last weights by stage: micro-batch b has the weights of stage s after version(s, b) updates."""
    model, (x, y) = make_model(p), stream(m, rows)
    past = [[[w.detach().clone() for w in piece.parameters()]] for piece in model]
    optimizers = [OPTIMIZERS[optimizer](piece.parameters()) for piece in model]
    losses = []
    for b in range(m):
        hidden, leaves = x[b * rows : (b + 1) * rows], []
        for stage, piece in enumerate(model):
            names = [name for name, _ in piece.named_parameters()]
            values = past[stage][version(stage, b)]
            leaves.append({n: v.clone().requires_grad_() for n, v in zip(names, values, strict=True)})
            hidden = functional_call(piece, leaves[stage], (hidden,))
        loss = mse_loss(hidden, y[b * rows : (b + 1) * rows]) / accumulate
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        for stage, piece in enumerate(model):
            for name, parameter in piece.named_parameters():
                grad = leaves[stage][name].grad
                assert grad is not None
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
            if (b + 1) % accumulate == 0:
                optimizers[stage].step()
                optimizers[stage].zero_grad()
                past[stage].append([w.detach().clone() for w in piece.parameters()])
    return torch.stack(losses), [[w.detach() for w in piece.parameters()] for piece in model]


def assert_replayed(results: list[Outcome], expected: Any) -> None:
    losses, weights = expected
    for stage, (ours, own, _, _) in enumerate(results):
        torch.testing.assert_close(ours, losses, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(own, weights[stage], rtol=1e-12, atol=1e-14)


def piece_bytes() -> int:
    return sum(w.numel() * w.element_size() for w in make_model(1).parameters())


@pytest.mark.parametrize(
    ("p", "optimizer"), [(1, "sgd"), (2, "momentum"), (3, "sgd"), (3, "momentum"), (3, "adamw"), (5, "adamw")]
)
def test_stashing(p: int, optimizer: str) -> None:
    """w(t+1) = w(t) - lr grad f(w_1(t - n + 1), ..., w_n(t)), over 24 updates."""
    results = simulate_ranks(on_ranks, p, pipedream(p, 24), optimizer).results

    assert_replayed(results, replay(p, 24, optimizer, lambda stage, b: max(0, b - (p - 1 - stage))))
    assert [most for _, _, most, _ in results] == [p - stage for stage in range(p)]
    assert [held for *_, held in results] == [piece_bytes()] * p  # old versions are gone when the stream has ended


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("p", [2, 4])
def test_vertical_sync(p: int, optimizer: str) -> None:
    """w(t+1) = w(t) - lr grad f(w_1(t - n + 1), ..., w_n(t - n + 1))."""
    results = simulate_ranks(on_ranks, p, pipedream(p, 24, vertical_sync=True), optimizer).results

    assert_replayed(results, replay(p, 24, optimizer, lambda _, b: max(0, b - (p - 1))))
    assert [most for _, _, most, _ in results] == [p] * p


@pytest.mark.parametrize("accumulate", [3, 5])
def test_2bw(accumulate: int) -> None:
    """w(t+1) = w(t) - lr grad f(w(t - 1)), over 20 updates."""
    p, m = 3, 20 * accumulate
    results = simulate_ranks(on_ranks, p, pipedream_2bw(p, m, accumulate=accumulate), "momentum").results

    assert_replayed(results, replay(p, m, "momentum", lambda _, b: max(0, b // accumulate - 1), accumulate))
    assert max(most for _, _, most, _ in results) == 2


def test_recomputed_forward_passes_have_the_stashed_weights() -> None:
    results = simulate_ranks(on_ranks, 3, pipedream(3, 24), "adamw", True).results
    assert_replayed(results, replay(3, 24, "adamw", lambda stage, b: max(0, b - (2 - stage))))


def test_on_real_processes() -> None:
    results = run_ranks(on_ranks, 3, pipedream(3, 24), "momentum")
    assert_replayed(results, replay(3, 24, "momentum", lambda stage, b: max(0, b - (2 - stage))))


def test_without_stashing_the_result_is_another() -> None:
    """Even the first update of the first stage differs from that of any weights that ever were: its backward pass went
    through weights of two times."""
    p = 3
    naive = simulate_ranks(on_ranks, p, pipedream(p, 24, stashing=False), "sgd").results
    expected = replay(p, 24, "sgd", lambda stage, b: max(0, b - (p - 1 - stage)))
    apart = [
        max(float((a - b).abs().max()) for a, b in zip(own, weights, strict=True))
        for (_, own, _, _), weights in zip(naive, expected[1], strict=True)
    ]
    assert min(apart) > 1e-6
    assert [most for _, _, most, _ in naive] == [1] * p


def scalar_stages(schedule: Schedule, rate: float, x: Tensor) -> tuple[Tensor, list[float]]:
    """Each stage multiplies by two numbers."""
    stage = dist.get_rank()
    pieces = [nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double() for _ in range(3)]
    with torch.no_grad():
        for i, piece in enumerate(pieces):
            for parameter, value in zip(piece.parameters(), (0.9 + 0.1 * i, 1.1 - 0.05 * i), strict=True):
                parameter.fill_(value)
    own = pieces[stage]
    pipeline = Pipeline(pieces, schedule, mse_loss, optimizer=torch.optim.SGD(own.parameters(), lr=rate))
    pipeline.step(x, torch.ones_like(x))
    return pipeline.losses, [p.item() for p in own.parameters()]


def test_without_stashing_each_update_is_the_wrong_one_that_arithmetic_gives() -> None:
    """In plain numbers: a stage sees b forward after b - (p - 1 - s) updates, and backward after b of them."""
    p, m, rate = 3, 22, 0.02
    values = [0.5 + i / 21 for i in range(m)]
    past = [[(0.9 + 0.1 * i, 1.1 - 0.05 * i)] for i in range(p)]
    losses = []
    for b, hidden in enumerate(values):
        met = []
        for stage in range(p):
            first, second = past[stage][max(0, b - (p - 1 - stage))]
            met.append((hidden, first * hidden))
            hidden = second * first * hidden
        losses.append((hidden - 1) ** 2)
        grad = 2 * (hidden - 1)
        for stage in reversed(range(p)):
            first, second = past[stage][b]
            came, between = met[stage]
            past[stage].append((first - rate * grad * second * came, second - rate * grad * between))
            grad *= second * first
    x = torch.tensor(values, dtype=torch.float64)[:, None]
    for stage, (ours, own) in enumerate(
        simulate_ranks(scalar_stages, p, pipedream(p, m, stashing=False), rate, x).results
    ):
        torch.testing.assert_close(ours, torch.tensor(losses, dtype=torch.float64), rtol=1e-12, atol=1e-14)
        assert own == pytest.approx(list(past[stage][-1]), rel=1e-12)


def watched(schedule: Schedule) -> list[int]:
    """Bytes of weights after each update, in two streams one after the other."""
    stage = dist.get_rank()
    model = make_model(3)
    for piece in model:
        piece.add_module("again", piece.get_submodule("0"))  # a layer that stands twice in its piece
    own = model[stage]
    optimizer = torch.optim.SGD(own.parameters(), lr=0.01)
    pipeline = Pipeline(list(model), schedule, mse_loss, optimizer=optimizer)
    versions, held = pipeline._walk._chunks[0].versions, []
    assert versions is not None
    plain_step = optimizer.step

    def step() -> None:
        plain_step()
        held.append(versions.n_bytes)

    optimizer.step = step  # type: ignore[method-assign, assignment]
    for _ in range(2):
        pipeline.step(*stream(schedule.n_micro_batches))
    return held


@pytest.mark.parametrize("vertical_sync", [False, True])
def test_bytes_held_while_it_runs(vertical_sync: bool) -> None:
    """After an update: the newest version, and those of micro-batches that are under way or will use them yet."""
    p, m = 3, 9
    schedule = pipedream(p, m, vertical_sync=vertical_sync)
    for stage, held in enumerate(simulate_ranks(watched, p, schedule).results):
        alive, actions = [], schedule.computes(stage)
        for i, action in enumerate(actions):
            if action.kind is Kind.UPDATE:
                later = {
                    a.version for a in actions[i + 1 :] if a.kind is not Kind.UPDATE and a.version < action.version
                }
                alive.append(len(later) + 1)
        assert held == [n * piece_bytes() for n in 2 * alive]
        assert max(alive) == (p if vertical_sync else p - stage)


def delayed_beside(schedule: Schedule) -> Outcome:
    mesh = init_mesh(pp=2, dp=2)
    x, y = stream(schedule.n_micro_batches, 2 * ROWS)
    # Each pipeline has half of the rows of every micro-batch.
    rows = torch.arange(len(x)).view(schedule.n_micro_batches, 2, ROWS)[:, mesh.coordinate["dp"]].flatten()
    parts = split(make_model(2), 2, balance=[1.0, 1.0])
    own = parts.pieces[mesh.coordinate["pp"]]
    optimizer = torch.optim.SGD(own.parameters(), lr=0.2)
    pipeline = Pipeline(
        parts, schedule, mse_loss, group=mesh.group("pp"), data_group=mesh.group("dp"), optimizer=optimizer
    )
    pipeline.step(x[rows], y[rows])
    return pipeline.losses, [w.detach().clone() for w in own.parameters()], mesh.coordinate["pp"], 0


def test_pipelines_beside_each_other_update_together() -> None:
    results = simulate_ranks(delayed_beside, 4, pipedream(2, 10)).results
    losses, weights = replay(2, 10, "sgd", lambda stage, b: max(0, b - (1 - stage)), rows=2 * ROWS)
    assert sorted(stage for _, _, stage, _ in results) == [0, 0, 1, 1]
    for ours, own, stage, _ in results:
        torch.testing.assert_close(ours, losses, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(own, weights[stage], rtol=1e-12, atol=1e-14)


def wrong_calls(schedule: Schedule) -> list[str]:
    model = make_model(2)
    optimizer = torch.optim.SGD(model[dist.get_rank()].parameters(), lr=0.1)
    pipeline = Pipeline(list(model), schedule, mse_loss, optimizer=optimizer)
    said = []
    for call in (lambda: pipeline.clip_grad_norm_(1.0), lambda: pipeline.no_sync().__enter__()):
        with pytest.raises(RuntimeError) as raised:
            call()
        said.append(str(raised.value))
    return said


def test_what_comes_too_late_for_updates_inside_of_the_step_is_refused() -> None:
    for clip, no_sync in simulate_ranks(wrong_calls, 2, pipedream(2, 4)).results:
        assert "clip_grad_norm_ comes too late: PipeDream makes its updates inside of step()" in clip
        assert (
            "no_sync is for steps that only add up gradients: PipeDream makes its updates inside of step()" in no_sync
        )


def refused(schedule: Schedule, with_optimizer: bool, tied: bool) -> None:
    model = make_model(2)
    if tied:
        model[1][0].weight = model[0][0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if with_optimizer else None
    Pipeline(list(model), schedule, mse_loss, optimizer=optimizer)


@pytest.mark.parametrize(
    ("schedule", "with_optimizer", "tied", "message"),
    [
        (pipedream(2, 4), False, False, "PipeDream updates the weights between its passes: give optimizer="),
        (pipedream(2, 4), True, True, "0.weight of piece 1, must stay equal|must stay equal: untie them"),
        (one_f_one_b(2, 4), True, False, "1F1B makes no updates: leave optimizer=None"),
    ],
)
def test_what_an_asynchronous_pipeline_refuses(
    schedule: Schedule, with_optimizer: bool, tied: bool, message: str
) -> None:
    with pytest.raises(Exception, match=message):
        simulate_ranks(refused, 2, schedule, with_optimizer, tied)
