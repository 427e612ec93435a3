"""Pipelines beside each other, gradients of several steps, and the norm of the whole model's gradient."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.distributed import count_traffic, init_mesh, run_ranks, simulate_ranks
from minillm.distributed.pipeline import Pipeline, make_schedule

WIDTH, OUT = 5, 4
each_schedule = pytest.mark.parametrize(
    ("name", "p", "m", "v"),
    [
        pytest.param("gpipe", 2, 3, 1, id="gpipe"),
        pytest.param("1f1b", 4, 3, 1, id="1f1b"),
        pytest.param("interleaved", 2, 4, 2, id="interleaved"),
        pytest.param("zb-v", 2, 4, 2, id="zb-v"),
        pytest.param("chimera", 2, 4, 1, id="chimera"),
        pytest.param("dualpipe", 2, 4, 1, id="dualpipe"),
    ],
)


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


def make_pieces(n_pieces: int) -> list[nn.Module]:
    """The first and the last piece have one weight in common; one bias is frozen."""
    torch.manual_seed(2)
    pieces: list[nn.Module] = [First() for _ in range(n_pieces)]
    last = nn.Sequential(First(), nn.Linear(WIDTH, OUT))
    last[0].inner.weight = pieces[0].inner.weight  # type: ignore[union-attr]
    last[0].inner.bias.requires_grad_(False)  # type: ignore[union-attr]
    pieces[-1] = last
    return [piece.double() for piece in pieces]


def batch_of(replica: int, step: int, n_micro_batches: int) -> tuple[list[Tensor], list[Tensor]]:
    draw = torch.Generator().manual_seed(100 * replica + step)
    rows = [1 + (i + step) % 3 for i in range(n_micro_batches)]
    inputs = [torch.randn(n, WIDTH, generator=draw, dtype=torch.float64) for n in rows]
    return inputs, [torch.randn(n, OUT, generator=draw, dtype=torch.float64) for n in rows]


def mean_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def sum_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().sum() / 7


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mean": mean_loss, "sum": sum_loss}


def held(pipeline: Pipeline) -> list[tuple[int, nn.Module]]:
    """This rank's pieces with their numbers."""
    return list(zip(pipeline.schedule.pieces[pipeline.stage], pipeline.modules, strict=True))


def own_gradients(pipeline: Pipeline) -> dict[str, Tensor | None]:
    return {
        f"{piece}.{name}": None if parameter.grad is None else parameter.grad.clone()
        for piece, module in held(pipeline)
        for name, parameter in module.named_parameters()
    }


def one_process(
    n_pieces: int, n_replicas: int, steps: Sequence[int], m: int, reduction: str, max_norm: float | None = None
) -> tuple[list[Tensor], Tensor, dict[str, Tensor | None]]:
    """Each step's loss over all replicas, and what the gradients add up to."""
    pieces = make_pieces(n_pieces)
    model, losses = nn.Sequential(*pieces), []
    for step in steps:
        parts = []
        for replica in range(n_replicas):
            inputs, targets = batch_of(replica, step, m)
            parts.append(LOSSES[reduction](model(torch.cat(inputs)), torch.cat(targets)))
        losses.append(torch.stack(parts).sum() / (n_replicas if reduction == "mean" else 1))
        losses[-1].backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), math.inf if max_norm is None else max_norm)
    found = {f"{i}.{name}": p.grad for i, piece in enumerate(pieces) for name, p in piece.named_parameters()}
    return [loss.detach() for loss in losses], norm, found


def assert_one_process(ranks: Sequence[tuple[list[Tensor], Tensor, dict[str, Any]]], expected: Any) -> None:
    seen = set()
    for losses, norm, found in ranks:
        torch.testing.assert_close(losses, expected[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(norm, expected[1], rtol=1e-12, atol=0)
        torch.testing.assert_close(found, {key: expected[2][key] for key in found}, rtol=1e-11, atol=1e-14)
        seen |= found.keys()
    assert seen == expected[2].keys()


def pipelines(
    name: str, p: int, m: int, v: int, dp: int, reduction: str, syncs: Sequence[bool], max_norm: float | None
) -> tuple[list[Tensor], Tensor, dict[str, Tensor | None]]:
    schedule, mesh = make_schedule(name, p, m, v), init_mesh(pp=p, dp=dp)
    pieces = make_pieces(schedule.n_pieces)
    with torch.no_grad():  # what the ranks begin with may differ: the first of those that share it gives its own
        for parameter in nn.Sequential(*pieces).parameters():
            parameter.add_(mesh.coordinate["dp"])
    pipeline = Pipeline(
        pieces,
        schedule,
        LOSSES[reduction],
        group=mesh.group("pp"),
        data_group=mesh.group("dp") if dp > 1 else None,
        reduction=reduction,  # type: ignore[arg-type]
    )
    losses = []
    for step, sync in enumerate(syncs):
        with nullcontext() if sync else pipeline.no_sync():
            losses.append(pipeline.step(*batch_of(mesh.coordinate["dp"], step, m)))
    norm = pipeline.clip_grad_norm_(math.inf if max_norm is None else max_norm)
    return losses, norm, own_gradients(pipeline)


@each_schedule
@pytest.mark.parametrize(("reduction", "dp"), [("mean", 1), ("mean", 2), ("sum", 2)])
def test_data_parallel_pipelines_are_one_process(name: str, p: int, m: int, v: int, dp: int, reduction: str) -> None:
    ranks = simulate_ranks(pipelines, p * dp, name, p, m, v, dp, reduction, (True,), None).results

    n_pieces = make_schedule(name, p, m, v).n_pieces
    assert_one_process(ranks, one_process(n_pieces, dp, [0], m, reduction))


@pytest.mark.parametrize(
    ("name", "p", "m", "v"), [("1f1b", 3, 3, 1), ("interleaved", 2, 4, 2), ("chimera", 2, 4, 1), ("dualpipe", 2, 4, 1)]
)
@pytest.mark.parametrize(
    ("reduction", "syncs"),
    [
        ("mean", (False, False, True)),
        ("mean", (True, False, True)),
        ("sum", (True, True)),
        ("sum", (True, False, True)),
    ],
)
def test_gradients_of_several_steps_add_up(
    name: str, p: int, m: int, v: int, reduction: str, syncs: tuple[bool, ...]
) -> None:
    """Whoever leaves `no_sync` away has more traffic, and the same gradients."""
    ranks = simulate_ranks(pipelines, 2 * p, name, p, m, v, 2, reduction, syncs, None).results

    n_pieces = make_schedule(name, p, m, v).n_pieces
    assert_one_process(ranks, one_process(n_pieces, 2, range(len(syncs)), m, reduction))


@each_schedule
@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_clipping_is_pytorchs_of_the_whole_model(name: str, p: int, m: int, v: int, max_norm: float) -> None:
    ranks = simulate_ranks(pipelines, 2 * p, name, p, m, v, 2, "mean", (True,), max_norm).results

    n_pieces = make_schedule(name, p, m, v).n_pieces
    assert_one_process(ranks, one_process(n_pieces, 2, [0], m, "mean", max_norm))


def test_replicas_begin_with_the_buffers_of_the_first() -> None:
    def ranks() -> Tensor:
        mesh = init_mesh(pp=2, dp=2)
        pieces = [nn.BatchNorm1d(WIDTH), nn.BatchNorm1d(WIDTH)]
        for piece in pieces:
            piece.running_mean.fill_(1 + mesh.coordinate["dp"])  # type: ignore[union-attr]
        schedule = make_schedule("1f1b", 2, 2)
        Pipeline(pieces, schedule, mean_loss, group=mesh.group("pp"), data_group=mesh.group("dp"))
        return [piece.running_mean for piece in pieces][mesh.coordinate["pp"]]  # type: ignore[return-value]

    for found in simulate_ranks(ranks, 4).results:
        torch.testing.assert_close(found, torch.ones(WIDTH))


@pytest.mark.parametrize("max_norm", [1e-3, 1e3])
def test_a_weight_of_three_stages_counts_once(max_norm: float) -> None:
    """In the norm, and in the sum of steps that were summed over the stages before."""

    def make() -> list[nn.Module]:
        pieces = make_pieces(3)
        pieces[1].inner.weight = pieces[0].inner.weight  # type: ignore[union-attr]
        return pieces

    def ranks() -> tuple[Tensor, dict[str, Tensor | None]]:
        pipeline = Pipeline(make(), make_schedule("1f1b", 3, 3), mean_loss)
        for step in range(2):
            pipeline.step(*batch_of(0, step, 3))
        return pipeline.clip_grad_norm_(max_norm), own_gradients(pipeline)

    pieces = make()
    for step in range(2):
        inputs, targets = batch_of(0, step, 3)
        mean_loss(nn.Sequential(*pieces)(torch.cat(inputs)), torch.cat(targets)).backward()
    norm = nn.utils.clip_grad_norm_(nn.Sequential(*pieces).parameters(), max_norm)
    expected = {f"{i}.{name}": p.grad for i, piece in enumerate(pieces) for name, p in piece.named_parameters()}
    for found_norm, found in simulate_ranks(ranks, 3).results:
        torch.testing.assert_close(found_norm, norm, rtol=1e-12, atol=0)
        torch.testing.assert_close(found, {key: expected[key] for key in found}, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_gradients_that_are_not_finite_are_seen_on_every_rank(bad: float) -> None:
    def ranks() -> tuple[Tensor, list[Tensor | None]]:
        pipeline = Pipeline(make_pieces(3), make_schedule("1f1b", 3, 3), mean_loss)
        pipeline.step(*batch_of(0, 0, 3))
        if dist.get_rank() == 1:
            next(pipeline.parameters()).grad[0] = bad  # type: ignore[index]
        norm = pipeline.clip_grad_norm_(1.0)
        return norm, [parameter.grad for parameter in pipeline.parameters()]

    pieces = make_pieces(3)
    model = nn.Sequential(*pieces)
    mean_loss(model(torch.cat(batch_of(0, 0, 3)[0])), torch.cat(batch_of(0, 0, 3)[1])).backward()
    next(pieces[1].parameters()).grad[0] = bad  # type: ignore[index]
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    results = simulate_ranks(ranks, 3).results
    for rank, (found, grads) in enumerate(results):
        torch.testing.assert_close(found, norm, equal_nan=True)
        torch.testing.assert_close(grads, [p.grad for p in pieces[rank].parameters()], equal_nan=True)


def test_a_stage_of_nothing_but_frozen_parameters_takes_part_in_the_norm() -> None:
    def ranks() -> Tensor:
        pieces = make_pieces(3)
        pieces[1].requires_grad_(False)
        pipeline = Pipeline(pieces, make_schedule("gpipe", 3, 2), mean_loss)
        pipeline.step(*batch_of(0, 0, 2))
        return pipeline.clip_grad_norm_(1.0)

    pieces = make_pieces(3)
    pieces[1].requires_grad_(False)
    inputs, targets = batch_of(0, 0, 2)
    mean_loss(nn.Sequential(*pieces)(torch.cat(inputs)), torch.cat(targets)).backward()
    norm = nn.utils.clip_grad_norm_(nn.Sequential(*pieces).parameters(), 1.0)
    for found in simulate_ranks(ranks, 3).results:
        torch.testing.assert_close(found, norm, rtol=1e-12, atol=0)


def test_two_by_four_over_twenty_steps_of_adamw() -> None:
    """Eight ranks train as one process does; replicas stay equal, and so do both ends of the tied weight."""

    def ranks() -> tuple[list[Tensor], dict[str, Tensor]]:
        mesh = init_mesh(pp=4, dp=2)
        pieces = make_pieces(4)
        pipeline = Pipeline(
            pieces,
            make_schedule("1f1b", 4, 4),
            mean_loss,
            group=mesh.group("pp"),
            data_group=mesh.group("dp"),
        )
        optimizer = torch.optim.AdamW(pipeline.parameters(), lr=0.02)
        losses = []
        for step in range(20):
            losses.append(pipeline.step(*batch_of(mesh.coordinate["dp"], step, 4)))
            pipeline.clip_grad_norm_(0.5)
            optimizer.step()
            optimizer.zero_grad()
        own = held(pipeline)
        return losses, {f"{i}.{key}": value for i, piece in own for key, value in piece.state_dict().items()}

    pieces = make_pieces(4)
    model = nn.Sequential(*pieces)
    optimizer, expected_losses = torch.optim.AdamW(model.parameters(), lr=0.02), []
    for step in range(20):
        parts = []
        for replica in range(2):
            inputs, targets = batch_of(replica, step, 4)
            parts.append(mean_loss(model(torch.cat(inputs)), torch.cat(targets)))
        loss = torch.stack(parts).mean()
        loss.backward()
        expected_losses.append(loss.detach())
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    expected = {f"{i}.{key}": value for i, piece in enumerate(pieces) for key, value in piece.state_dict().items()}
    for losses, state in simulate_ranks(ranks, 8).results:
        torch.testing.assert_close(losses, expected_losses, rtol=1e-9, atol=0)
        torch.testing.assert_close(state, {key: expected[key] for key in state}, rtol=1e-8, atol=1e-10)


def test_two_by_two_on_real_processes() -> None:
    def ranks() -> tuple[list[Tensor], Tensor, dict[str, Tensor | None]]:
        return pipelines("interleaved", 2, 4, 2, 2, "mean", (False, True), 0.1)

    assert_one_process(run_ranks(ranks, 4), one_process(4, 2, [0, 1], 4, "mean", 0.1))


@pytest.mark.parametrize("synchronise", [True, False])
def test_what_is_sent_for_copies_and_between_replicas(synchronise: bool) -> None:
    """The tied weight goes to the other holder, once each way; each replica's gradients once through an all-reduce."""

    def ranks() -> tuple[dict[str, int], dict[str, int]]:
        mesh = init_mesh(pp=3, dp=2)
        pieces = make_pieces(3)
        pipeline = Pipeline(
            pieces,
            make_schedule("1f1b", 3, 3),
            mean_loss,
            group=mesh.group("pp"),
            data_group=mesh.group("dp"),
        )
        pipeline.step(*batch_of(0, 0, 3))  # shapes are told in the first
        with count_traffic() as traffic, nullcontext() if synchronise else pipeline.no_sync():
            pipeline.step(*batch_of(0, 0, 3))
        sizes = {
            "tied": WIDTH * WIDTH * 8 if dist.get_rank() // 2 != 1 else 0,
            "trained": sum(p.nbytes for p in pipeline.parameters() if p.requires_grad),
        }
        reduced = sum(e.bytes_sent for e in traffic.events if e.operation == "all_reduce" and e.n_bytes > 100)
        return {"copies": traffic.by_label.get("gradients of copies", 0), "reduced": reduced}, sizes

    for sent, sizes in simulate_ranks(ranks, 6).results:
        assert sent["copies"] == (sizes["tied"] if synchronise else 0)
        assert sent["reduced"] == (sizes["trained"] if synchronise else 0)  # 2 (n - 1) / n of it, n = 2


def test_parameters_that_a_caller_calls_shared_are_beside_those_that_are_found() -> None:
    """Two copies of one matrix, which a list of modules cannot tell, and one object in two pieces, which it can."""

    def made() -> list[nn.Linear]:
        torch.manual_seed(3)
        pieces = [nn.Linear(3, 3).double() for _ in range(4)]
        pieces[3].bias = pieces[1].bias
        with torch.no_grad():
            pieces[2].weight.copy_(pieces[0].weight)
        return pieces

    def ranks() -> list[Tensor | None]:
        pieces = made()
        tied = [((0, "weight"), (2, "weight"))]
        pipeline = Pipeline(pieces, make_schedule("1f1b", 4, 2), nn.functional.mse_loss, shared=tied)
        pipeline.step(torch.ones(4, 3).double(), torch.zeros(4, 3).double())
        return [p.grad for p in pipeline.modules[0].parameters()]

    alone = made()
    alone[2].weight = alone[0].weight
    nn.functional.mse_loss(nn.Sequential(*alone)(torch.ones(4, 3).double()), torch.zeros(4, 3).double()).backward()
    for found, piece in zip(simulate_ranks(ranks, 4).results, alone, strict=True):
        torch.testing.assert_close(found, [p.grad for p in piece.parameters()], rtol=1e-12, atol=1e-14)
