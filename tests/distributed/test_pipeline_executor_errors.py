"""What a pipeline refuses, and that nothing hangs when a rank fails."""

import dataclasses
import gc
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.distributed import RankError, run_ranks, simulate_ranks
from minillm.distributed.pipeline import Pipeline, gpipe, interleaved, make_schedule, one_f_one_b, pipedream

X, Y = torch.randn(8, 3), torch.randn(8, 3)


def make_pieces(n_pieces: int = 2) -> list[nn.Module]:
    return [nn.Linear(3, 3) for _ in range(n_pieces)]


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def one(pieces: Any, schedule: Any, **options: Any) -> Callable[[], Any]:
    return lambda: Pipeline(pieces, schedule, loss_of, **options)


def stepping(x: Any, y: Any, n_micro_batches: int = 4, loss_fn: Any = loss_of) -> Callable[[], Any]:
    return lambda: Pipeline(make_pieces(), gpipe(2, n_micro_batches), loss_fn).step(x, y)


def evaluating(x: Any, y: Any) -> Callable[[], Any]:
    return lambda: Pipeline(make_pieces(), gpipe(2, 4), loss_of).evaluate(x, y)


def different_schedules() -> Any:
    return Pipeline(make_pieces(), [gpipe, one_f_one_b][dist.get_rank()](2, 4), loss_of)


def different_numbers() -> Any:
    return Pipeline(make_pieces(), gpipe(2, 4 + dist.get_rank()), loss_of)


def different_orders() -> Any:
    """Of the same name and size."""
    schedule = gpipe(2, 2)
    if dist.get_rank():
        schedule = dataclasses.replace(one_f_one_b(2, 2), name=schedule.name)
    return Pipeline(make_pieces(), schedule, loss_of)


def different_reductions() -> Any:
    return Pipeline(make_pieces(), gpipe(2, 4), loss_of, reduction=("mean", "sum")[dist.get_rank()])


def swapped_pieces() -> Any:
    return Pipeline({1 - dist.get_rank(): nn.Linear(3, 3)}, gpipe(2, 4), loss_of)


def too_few_on_one_stage() -> Any:
    return Pipeline({dist.get_rank(): nn.Linear(3, 3)}, interleaved(2, 4, 2), loss_of)


def too_many_on_one_stage() -> Any:
    return Pipeline(dict(enumerate(make_pieces())), gpipe(2, 4), loss_of)


def asynchronous(n_pieces: int = 2, tied: bool = False, with_optimizer: bool = True) -> Callable[[], Any]:
    def ranks() -> Any:
        pieces: list[Any] = make_pieces(n_pieces)
        if tied:
            pieces[1].weight = pieces[0].weight
        own = pieces[dist.get_rank()].parameters()
        optimizer = torch.optim.SGD(own, lr=0.1) if with_optimizer else None
        return Pipeline(pieces, pipedream(2, 4), loss_of, optimizer=optimizer)

    return ranks


def optimizer_for_nothing() -> Any:
    pieces = make_pieces()
    own = pieces[dist.get_rank()].parameters()
    return Pipeline(pieces, gpipe(2, 4), loss_of, optimizer=torch.optim.SGD(own, lr=0.1))


def vector_loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean(0)


def integer_loss(output: Tensor, target: Tensor) -> Tensor:
    return output.argmax()


def constant_loss(output: Tensor, target: Tensor) -> Tensor:
    return loss_of(output.detach(), target)


def number_loss(output: Tensor, target: Tensor) -> float:
    return 1.0


BATCH_OF_12 = r"a batch of 12 rows"
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "other schedule": (different_schedules, "must be given the same schedule: stage 0 has .*, stage 1 has"),
    "other micro-batches": (different_numbers, r"must be given the same schedule: .*4 micro-batches.*5 micro-batches"),
    "other order": (different_orders, "must be given the same schedule"),
    "other reduction": (different_reductions, "must be given the same"),
    "reduction": (one(make_pieces(), gpipe(2, 4), reduction="max"), "reduction must be 'mean' or 'sum', got 'max'"),
    "swapped pieces": (swapped_pieces, "stage [01] holds pieces? [01] .* got pieces? [01]"),
    "too few pieces on a stage": (too_few_on_one_stage, "stage 0 holds pieces 0 and 2 .* got pieces? 0"),
    "too many pieces on a stage": (too_many_on_one_stage, "stage [01] holds pieces [01] in GPipe, got pieces 0 and 1"),
    "too few pieces": (one(make_pieces(1), gpipe(2, 4)), r"split\(model, 2\)"),
    "too many pieces": (one(make_pieces(3), gpipe(2, 4)), r"3 pieces.*split\(model, 2\)"),
    "no modules": (one(["a", "b"], gpipe(2, 4)), "TypeError: pieces must be"),
    "a model that is not cut": (one(nn.Linear(3, 3), gpipe(2, 4)), r"TypeError: pieces must be .*split"),
    "no schedule": (one(make_pieces(), "1f1b"), r"TypeError: schedule must be"),
    "more stages than ranks": (one(make_pieces(4), gpipe(4, 4)), "4 stages.*2 ranks"),
    "fewer stages than ranks": (one(make_pieces(1), gpipe(1, 4)), "1 stages?.*2 ranks"),
    "rows that do not divide": (stepping(torch.randn(10, 3), torch.randn(10, 3)), BATCH_OF_12),
    "rows that do not divide: other schedule": (stepping(X, Y, 3), "9 rows.*[24] micro-batches"),
    "fewer rows than micro-batches": (stepping(X[:2], Y[:2]), "4 rows.*2 micro-batches"),
    "no rows": (stepping(X[:0], Y[:0]), "0 rows"),
    "a batch without rows": (stepping(X[0, 0], Y), "inputs"),
    "not as many micro-batches": (stepping(list(X.split(4)), Y), "inputs hold 2 micro-batches.* 4"),
    "targets not as many": (stepping(X, list(Y.split(1))), "targets hold 8 micro-batches.* 4"),
    "targets that do not divide": (stepping(X, Y[:7]), "targets of 7 rows.*a batch of 8 rows"),
    "no inputs": (stepping(None, Y), "rank 0 failed: ValueError: inputs are needed on the rank"),
    "no targets": (stepping(X, None), "rank 1 failed: ValueError: targets are needed on the rank"),
    "inputs of another type": (stepping(3, Y), "TypeError: inputs must be a tensor"),
    "micro-batches of another type": (stepping([1, 2, 3, 4], Y), "TypeError: .*inputs .*tensor"),
    "no inputs to evaluate": (evaluating(None, Y), "rank 0 failed: ValueError: inputs are needed"),
    "no targets to evaluate": (evaluating(X, None), "rank 1 failed: ValueError: targets are needed"),
    "vector for a loss": (stepping(X, Y, loss_fn=vector_loss), r"loss_fn must .*scalar.*\(3,\)"),
    "integer for a loss": (stepping(X, Y, loss_fn=integer_loss), "loss_fn must .*int64"),
    "loss without a graph": (stepping(X, Y, loss_fn=constant_loss), "loss_fn must give a loss that depends on"),
    "number for a loss": (stepping(X, Y, loss_fn=number_loss), "loss_fn must .*float"),
    "no optimizer": (asynchronous(with_optimizer=False), "ValueError: PipeDream.*optimizer="),
    "optimizer for nothing": (optimizer_for_nothing, "makes no updates: leave optimizer=None"),
    "tied, asynchronous": (asynchronous(tied=True), "weight of piece 0 = weight of piece 1.*untie them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_at_the_door(case: str) -> None:
    make, words = REFUSED[case]
    with pytest.raises(RankError, match=f"(?s){words}"):
        simulate_ranks(make, 2)


def test_outside_of_ranks() -> None:
    with pytest.raises(RuntimeError, match="simulate_ranks or run_ranks"):
        Pipeline(make_pieces(), gpipe(2, 4), loss_of)


def test_a_group_that_this_rank_is_not_in() -> None:
    def ranks() -> Any:
        group = dist.new_group([0, 1])
        return Pipeline(make_pieces(), gpipe(2, 4), loss_of, group=group)

    with pytest.raises(RankError, match="rank 2 failed: ValueError: group must be one that this rank"):
        simulate_ranks(ranks, 3)


class Fails(nn.Module):
    """Raises at the n-th forward or backward pass."""

    def __init__(self, at: int, backward: bool) -> None:
        super().__init__()
        self.at, self.backward, self.count = at, backward, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.backward:
            x.register_hook(lambda grad: self._count())  # type: ignore[no-untyped-call]
        else:
            self._count()
        return x

    def _count(self) -> None:
        self.count += 1
        if self.count == self.at:
            raise ArithmeticError("no such number")


def failing(stage: int, n_stages: int, at: int, backward: bool) -> Any:
    pieces = make_pieces(n_stages)
    pieces[stage] = nn.Sequential(nn.Linear(3, 3), Fails(at, backward))
    return Pipeline(pieces, one_f_one_b(n_stages, 4), loss_of).step(X, Y)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_piece_that_raises_is_named(stage: int, at: int, backward: bool) -> None:
    kind = "B" if backward else "F"
    words = (
        f"rank {stage} failed: ArithmeticError: no such number\nin {kind}{at - 1} of stage {stage}, piece {stage} of"
    )
    with pytest.raises(RankError, match=words):
        simulate_ranks(failing, 3, stage, 3, at, backward)


@pytest.mark.parametrize("backward", [False, True])
def test_a_piece_that_raises_ends_real_processes(backward: bool) -> None:
    with pytest.raises(RankError, match=r"rank 1 failed: ArithmeticError: no such number\nin .* piece 1 of the model"):
        run_ranks(failing, 3, 1, 3, 2, backward, timeout=60)


class Gives(nn.Module):
    def __init__(self, what: Any) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Any:
        return self.what(x)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda x: [x], "gave list"),
        (lambda x: {"x": x}, "gave dict"),
        (lambda x: None, "gave NoneType"),
        (lambda x: (x, 1), "gave"),
        (lambda x: (), "gave"),
    ],
)
def test_a_piece_gives_tensors(what: Any, words: str) -> None:
    def ranks() -> Any:
        pieces: Sequence[nn.Module] = [nn.Sequential(nn.Linear(3, 3), Gives(what)), nn.Linear(3, 3)]
        return Pipeline(pieces, gpipe(2, 4), loss_of).step(X, Y)

    with pytest.raises(RankError, match=f"rank 0 failed: TypeError: a piece gives a tensor or a tuple of .*{words}"):
        simulate_ranks(ranks, 2)


def test_a_step_that_failed_leaves_nothing_behind() -> None:
    """All ranks catch the error of a batch that cannot be cut; the next step is a first one."""

    def ranks() -> tuple[Tensor, list[Tensor | None]]:
        torch.manual_seed(1)
        pieces = make_pieces()
        pipeline = Pipeline(pieces, gpipe(2, 4), loss_of)
        with pytest.raises(ValueError, match="7 rows"):
            pipeline.step(X[:7], Y[:7])
        loss = pipeline.step(X, Y)
        return loss, [p.grad for p in pipeline.parameters()]

    torch.manual_seed(1)
    model = nn.Sequential(*make_pieces())
    expected = loss_of(model(X), Y)
    expected.backward()
    results = simulate_ranks(ranks, 2).results
    for loss, _ in results:
        torch.testing.assert_close(loss, expected.detach().double())
    torch.testing.assert_close([g for _, grads in results for g in grads], [p.grad for p in model.parameters()])


def test_no_loss_and_infinite_losses_pass_through() -> None:
    """A loss that is not a number is the caller's to see: on every rank."""

    def ranks() -> Tensor:
        return Pipeline(make_pieces(), make_schedule("1f1b", 2, 4), lambda out, target: out.sum() * math.nan).step(X, Y)

    assert all(loss.isnan() for loss in simulate_ranks(ranks, 2).results)


class RowsAboveZero(nn.Module):
    """What a piece must not do: give a shape that depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x[: int((x > 0).any(dim=1).sum()) or 1]


def test_shapes_that_depend_on_values_are_refused_when_they_change() -> None:
    def ranks() -> None:
        pipeline = Pipeline([RowsAboveZero(), nn.Linear(3, 3)], gpipe(2, 4), lambda out, target: out.sum())
        pipeline.step(torch.ones(8, 3), Y)
        pipeline.step(-torch.ones(8, 3), Y)

    with pytest.raises(RankError, match=r"SF0 must bring .*\(2, 3\).* and got .*\(1, 3\).*shapes of the inputs alone"):
        simulate_ranks(ranks, 2)


def test_an_operation_in_place_on_what_comes_in_is_explained() -> None:
    def ranks() -> None:
        pieces = [nn.Linear(3, 3), nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 3))]
        Pipeline(pieces, gpipe(2, 4), loss_of).step(X, Y)

    with pytest.raises(RankError) as raised:
        simulate_ranks(ranks, 2)
    notes = raised.value.__cause__.__notes__  # type: ignore[union-attr]
    assert notes[0] == "in F0 of stage 1, piece 1 of the model"
    assert "cut elsewhere, or take inplace=False" in notes[1]


def test_an_optimizer_over_other_parameters_is_refused() -> None:
    def ranks() -> None:
        pieces = make_pieces()
        Pipeline(pieces, pipedream(2, 4), loss_of, optimizer=torch.optim.SGD(pieces[0].parameters(), lr=0.1))

    with pytest.raises(RankError, match=r"optimizer does not have .*weight of piece 1, which would never be updated"):
        simulate_ranks(ranks, 2)


class ToUnsigned(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.zeros(2, dtype=torch.uint16)


def test_a_dtype_that_cannot_be_sent_is_named() -> None:
    def ranks() -> None:
        Pipeline([ToUnsigned(), nn.Linear(3, 3)], gpipe(2, 4), loss_of).step(X, Y)

    with pytest.raises(RankError, match=r"TypeError: SF0 cannot send torch\.uint16: .* one of torch\.float32"):
        simulate_ranks(ranks, 2)


def test_a_rank_does_not_go_on_after_a_step_that_broke_off_beside_others() -> None:
    def ranks() -> str:
        def fails(output: Tensor, target: Tensor) -> Tensor:
            raise ArithmeticError("no such number")

        pipeline = Pipeline(make_pieces(), gpipe(2, 4), fails)
        if dist.get_rank() == 1:
            with pytest.raises(ArithmeticError):
                pipeline.step(X, Y)
            with pytest.raises(RuntimeError, match="an earlier step broke off on this rank"):
                pipeline.step(X, Y)
            raise KeyError("as it should")
        pipeline.step(X, Y)
        return ""

    with pytest.raises(RankError, match="rank 1 failed: KeyError: 'as it should'"):
        simulate_ranks(ranks, 2)


def test_the_batch_is_not_held_after_the_step() -> None:
    def ranks() -> int:
        held = [torch.randn(2, 3) for _ in range(4)]
        seen = [weakref.ref(part) for part in held]
        pipeline = Pipeline(make_pieces(), gpipe(2, 4), loss_of)
        pipeline.step(held, list(Y.chunk(4)))
        held.clear()
        gc.collect()
        return sum(reference() is not None for reference in seen)

    assert simulate_ranks(ranks, 2).results == [0, 0]
