"""The executor of pipelines: whatever the schedule, the loss and the gradients are those of one process."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.distributed import run_ranks, simulate_ranks
from minillm.distributed.pipeline import Pipeline, Schedule, make_schedule, split
from minillm.models import Transformer, TransformerConfig

WIDTH, VOCABULARY, LENGTH = 6, 11, 3
Batch = tuple[list[Tensor], list[Tensor]]
"""Inputs and targets by micro-batch."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner, self.outer = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.outer(torch.tanh(self.inner(self.norm(x))))
        return out


def make_pieces(n_pieces: int, *, tied: bool = False) -> list[nn.Module]:
    """Tokens to logits; embedding and head may be one parameter."""
    torch.manual_seed(7)
    layers: list[list[nn.Module]] = [[Block()] for _ in range(n_pieces)]
    embedding, head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
    if tied:
        head.weight = embedding.weight
    layers[0].insert(0, embedding)
    layers[-1].append(head)
    return [nn.Sequential(*some).double() for some in layers]


def make_batch(rows: Sequence[int], *, length: int = LENGTH, seed: int = 0) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(VOCABULARY, (n, length + 1), generator=draw) for n in rows]
    return [x[:, :-1] for x in tokens], [x[:, 1:] for x in tokens]


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def sum_loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum")


LOSSES = {"mean": mean_loss, "sum": sum_loss}


def gradients(pieces: dict[int, nn.Module]) -> dict[str, Tensor | None]:
    return {
        f"{i}.{name}": None if parameter.grad is None else parameter.grad.detach().clone()
        for i, piece in pieces.items()
        for name, parameter in piece.named_parameters()
    }


def one_process(pieces: list[nn.Module], batch: Batch, reduction: str = "mean") -> tuple[Tensor, dict[str, Any]]:
    """Loss and gradients of the whole batch at once, which knows nothing of micro-batches."""
    loss = LOSSES[reduction](nn.Sequential(*pieces)(torch.cat(batch[0])), torch.cat(batch[1]))
    loss.backward()
    return loss.detach(), gradients(dict(enumerate(pieces)))


Found = tuple[Tensor, Tensor, dict[str, Any]]
"""The loss, the micro-batches' shares, the gradients of a rank's pieces."""


def on_rank(
    schedule: Schedule, make: Callable[[], list[nn.Module]], batch: Batch, reduction: str = "mean", **options: Any
) -> Found:
    pieces = make()
    own = {i: pieces[i] for i in schedule.pieces[dist.get_rank()]}
    pipeline = Pipeline(pieces, schedule, LOSSES[reduction], reduction=reduction, **options)
    loss = pipeline.step(batch[0] if 0 in own else None, batch[1] if schedule.n_pieces - 1 in own else None)
    return loss, pipeline.losses, gradients(own)


def assert_one_process(
    ranks: Sequence[Found],
    expected: tuple[Tensor, dict[str, Any]],
    *,
    rtol: float = 1e-12,
    atol: float = 1e-14,
) -> None:
    seen = set()
    for loss, losses, found in ranks:
        torch.testing.assert_close(loss, expected[0].double(), rtol=rtol, atol=atol)
        torch.testing.assert_close(losses.sum(), loss, rtol=rtol, atol=atol)
        torch.testing.assert_close(found, {name: expected[1][name] for name in found}, rtol=rtol, atol=atol)
        seen |= found.keys()
    assert seen == expected[1].keys()


def cases() -> Iterator[tuple[str, int, int, int]]:
    """(name, stages, micro-batches, chunks): every synchronous schedule."""
    for p in (1, 2, 3, 4):
        for name in ("naive", "gpipe", "1f1b", "zb-h1", "zb-h2"):
            yield name, p, 1, 1
            yield name, p, p + 2, 1
        for v in (1, 2, 3):
            for name in ("interleaved", "breadth-first"):
                yield name, p, 2 * p if v == 2 else p, v
        yield "zb-v", p, 2 * p + 1, 2
        if p % 2 == 0:
            yield "chimera", p, p, 1
            yield "chimera", p, 2 * p, 1
            yield "dualpipe", p, 2 * p, 1
    for name in ("1f1b", "zb-h2", "chimera"):
        yield name, 8, 8, 1
    yield "interleaved", 8, 8, 2


CASES = [pytest.param(*case, id="-".join(map(str, case))) for case in cases()]
SMALL = [  # each schedule once
    ("naive", 3, 4, 1),
    ("gpipe", 3, 4, 1),
    ("1f1b", 3, 4, 1),
    ("interleaved", 2, 4, 2),
    ("breadth-first", 2, 4, 2),
    ("zb-h1", 3, 4, 1),
    ("zb-h2", 3, 4, 1),
    ("zb-v", 2, 4, 2),
    ("chimera", 4, 4, 1),
    ("dualpipe", 4, 8, 1),
]
each_schedule = pytest.mark.parametrize(("name", "p", "m", "v"), SMALL, ids=[case[0] for case in SMALL])


@pytest.mark.parametrize(("name", "p", "m", "v"), CASES)
def test_gradients_of_one_process(name: str, p: int, m: int, v: int) -> None:
    schedule, batch = make_schedule(name, p, m, v), make_batch([2] * m)

    ranks = simulate_ranks(on_rank, p, schedule, lambda: make_pieces(schedule.n_pieces), batch).results

    assert_one_process(ranks, one_process(make_pieces(schedule.n_pieces), batch))
    for _, losses, _ in ranks:
        torch.testing.assert_close(losses, ranks[0][1], rtol=0, atol=0)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_schedule_any_sizes(data: st.DataObject) -> None:
    name, p, m, v = data.draw(st.sampled_from(sorted(set(cases()))).filter(lambda case: case[1] <= 4))
    schedule = make_schedule(name, p, m, v)
    rows = data.draw(st.lists(st.integers(1, 4), min_size=m, max_size=m))
    length, reduction = data.draw(st.integers(1, 4)), data.draw(st.sampled_from(["mean", "sum"]))
    tied, recompute = data.draw(st.booleans()), data.draw(st.booleans())
    batch = make_batch(rows, length=length, seed=data.draw(st.integers(0, 99)))

    def make() -> list[nn.Module]:
        return make_pieces(schedule.n_pieces, tied=tied)

    def ranks() -> Found:
        return on_rank(schedule, make, batch, reduction, recompute=recompute)

    assert_one_process(simulate_ranks(ranks, p).results, one_process(make(), batch, reduction))


@each_schedule
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_uneven_micro_batches_are_weighted_right(name: str, p: int, m: int, v: int, reduction: str) -> None:
    schedule, rows = make_schedule(name, p, m, v), [1 + (3 * i) % 5 for i in range(m)]
    batch = make_batch(rows)

    ranks = simulate_ranks(on_rank, p, schedule, lambda: make_pieces(schedule.n_pieces), batch, reduction).results

    model = nn.Sequential(*make_pieces(schedule.n_pieces))
    shares = []
    for x, y in zip(*batch, strict=True):
        loss = LOSSES[reduction](model(x), y).detach()
        shares.append(loss * len(x) / sum(rows) if reduction == "mean" else loss)
    for _, losses, _ in ranks:
        torch.testing.assert_close(losses, torch.stack(shares), rtol=1e-12, atol=0)
    assert_one_process(ranks, one_process(make_pieces(schedule.n_pieces), batch, reduction))


@each_schedule
def test_recompute_changes_nothing(name: str, p: int, m: int, v: int) -> None:
    schedule, batch = make_schedule(name, p, m, v), make_batch([2] * m)

    def ranks() -> Found:
        return on_rank(schedule, lambda: make_pieces(schedule.n_pieces, tied=True), batch, recompute=True)

    assert_one_process(simulate_ranks(ranks, p).results, one_process(make_pieces(schedule.n_pieces, tied=True), batch))


def test_each_stage_says_whether_it_recomputes() -> None:
    schedule, batch = make_schedule("1f1b", 3, 6), make_batch([2] * 6)

    def ranks() -> Found:
        return on_rank(schedule, lambda: make_pieces(3), batch, recompute=dist.get_rank() == 0)

    assert_one_process(simulate_ranks(ranks, 3).results, one_process(make_pieces(3), batch))


@each_schedule
def test_tied_embeddings(name: str, p: int, m: int, v: int) -> None:
    schedule, batch = make_schedule(name, p, m, v), make_batch([2] * m)

    def make() -> list[nn.Module]:
        return make_pieces(schedule.n_pieces, tied=True)

    ranks = simulate_ranks(on_rank, p, schedule, make, batch).results

    expected = one_process(make(), batch)
    assert_one_process(ranks, expected)
    last = schedule.n_pieces - 1
    torch.testing.assert_close(expected[1]["0.0.weight"], expected[1][f"{last}.1.weight"], rtol=0, atol=0)
    copies = [found[key] for _, _, found in ranks for key in ("0.0.weight", f"{last}.1.weight") if key in found]
    for copy in copies:  # of one process, each would drift away from the others
        torch.testing.assert_close(copy, copies[0], rtol=0, atol=0)


@each_schedule
def test_a_parameter_of_three_pieces(name: str, p: int, m: int, v: int) -> None:
    schedule, batch = make_schedule(name, p, m, v), make_batch([2] * m)

    def make() -> list[nn.Module]:
        pieces = make_pieces(schedule.n_pieces)
        blocks = [next(layer for layer in piece.children() if isinstance(layer, Block)) for piece in pieces]
        for block in (blocks[1], blocks[-1]):
            block.inner.weight = blocks[0].inner.weight
            block.norm.bias = blocks[0].norm.bias
        return pieces

    assert_one_process(simulate_ranks(on_rank, p, schedule, make, batch).results, one_process(make(), batch))


def frozen_pieces(n_pieces: int, frozen: str) -> list[nn.Module]:
    pieces = make_pieces(n_pieces)
    if frozen == "the first pieces":
        some: list[nn.Module] = pieces[: n_pieces // 2]
    elif frozen == "a piece within":
        some = [pieces[1]]
    elif frozen == "some parameters":
        some = [module for piece in pieces for module in piece.modules() if isinstance(module, nn.LayerNorm)]
        some.append(pieces[0][0])  # type: ignore[index]
    else:
        some = pieces[1:]
    for module in some:
        module.requires_grad_(False)
    return pieces


@each_schedule
def test_frozen_parameters(name: str, p: int, m: int, v: int) -> None:
    schedule, batch = make_schedule(name, p, m, v), make_batch([2] * m)
    for frozen in ("the first pieces", "a piece within", "some parameters", "all but the first piece"):

        def make(frozen: str = frozen) -> list[nn.Module]:
            return frozen_pieces(schedule.n_pieces, frozen)

        assert_one_process(simulate_ranks(on_rank, p, schedule, make, batch).results, one_process(make(), batch))


@each_schedule
def test_pieces_without_parameters(name: str, p: int, m: int, v: int) -> None:
    schedule, batch = make_schedule(name, p, m, v), make_batch([2] * m)

    def make() -> list[nn.Module]:
        pieces = make_pieces(schedule.n_pieces)
        pieces[1] = nn.GELU()
        if schedule.n_pieces > 3:
            pieces[2] = nn.Identity()
        return pieces

    assert_one_process(simulate_ranks(on_rank, p, schedule, make, batch).results, one_process(make(), batch))


class Widen(nn.Module):
    """Tokens to what later pieces need besides the activations: integers, booleans, no gradient, no dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.scale = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.rand(()))

    def forward(self, tokens: Tensor) -> tuple[Tensor, ...]:
        x = self.embedding(tokens)
        return x, tokens, tokens % 2 == 0, x.detach().mean(-1), self.scale * 2


class Through(nn.Module):
    """Uses some of what comes and hands the rest on; the last of it has no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.positions = nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor, mean: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        x = self.block(x) + self.positions(tokens) * mask[..., None] + mean[..., None]
        return x, tokens, ~mask, mean * 0.5, scale.exp()


class Close(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor, tokens: Tensor, mask: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = self.head(x * mean[..., None])
        return out


class Chain(nn.Module):
    def __init__(self, pieces: Sequence[nn.Module]) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)

    def forward(self, x: Any) -> Any:
        for piece in self.pieces:
            x = piece(*x) if isinstance(x, tuple) else piece(x)
        return x


@each_schedule
@pytest.mark.parametrize("recompute", [False, True])
def test_several_tensors_between_pieces(name: str, p: int, m: int, v: int, recompute: bool) -> None:
    schedule, batch = make_schedule(name, p, m, v), make_batch([2] * m)

    def make() -> list[nn.Module]:
        torch.manual_seed(3)
        return [piece.double() for piece in (Widen(), *(Through() for _ in range(schedule.n_pieces - 2)), Close())]

    def ranks() -> Found:
        return on_rank(schedule, make, batch, recompute=recompute)

    pieces = make()
    loss = mean_loss(Chain(pieces)(torch.cat(batch[0])), torch.cat(batch[1]))
    loss.backward()
    expected = gradients(dict(enumerate(pieces)))
    found = simulate_ranks(ranks, p).results
    # Where nothing comes back one process has None; a stage that is sent zeros has zeros.
    assert expected.pop("0.scale") is None
    for _, _, gradient in found:
        scale = gradient.pop("0.scale", None)
        assert scale is None or not scale.any()
    assert_one_process(found, (loss.detach(), expected))


@each_schedule
def test_shapes_change_from_step_to_step(name: str, p: int, m: int, v: int) -> None:
    schedule = make_schedule(name, p, m, v)
    lengths = (3, 5, 3, 1, 5)

    def ranks() -> list[Found]:
        pieces = make_pieces(schedule.n_pieces)
        pipeline = Pipeline(pieces, schedule, mean_loss)
        found = []
        for seed, length in enumerate(lengths):
            loss = pipeline.step(*make_batch([1 + seed % 2] * m, length=length, seed=seed))
            own = {i: pieces[i] for i in schedule.pieces[dist.get_rank()]}
            found.append((loss, pipeline.losses, gradients(own)))
            for piece in pieces:
                piece.zero_grad()
        return found

    results = simulate_ranks(ranks, p).results
    for seed, length in enumerate(lengths):
        batch = make_batch([1 + seed % 2] * m, length=length, seed=seed)
        assert_one_process([found[seed] for found in results], one_process(make_pieces(schedule.n_pieces), batch))


class RecordedDropout(nn.Module):
    """Remembers each mask that it draws, so that one process can use the same."""

    def __init__(self, masks: list[Tensor] | None = None) -> None:
        super().__init__()
        self.drawn: list[Tensor] = []
        self.given = masks

    def forward(self, x: Tensor) -> Tensor:
        if self.given is not None:
            return x * self.given.pop(0)
        mask = F.dropout(torch.ones_like(x), 0.4)
        self.drawn.append(mask)
        return x * mask


@each_schedule
def test_dropout_with_recompute_draws_the_same_again(name: str, p: int, m: int, v: int) -> None:
    schedule, batch = make_schedule(name, p, m, v), make_batch([2] * m)

    def make(masks: dict[int, list[Tensor]] | None = None) -> list[nn.Module]:
        return [
            nn.Sequential(RecordedDropout(None if masks is None else masks[i]), piece) if i else piece
            for i, piece in enumerate(make_pieces(schedule.n_pieces))
        ]

    def ranks(recompute: bool) -> tuple[Found, dict[int, list[Tensor]]]:
        pieces: list[nn.Module] = []
        torch.manual_seed(dist.get_rank())
        state = torch.get_rng_state()

        def kept() -> list[nn.Module]:
            pieces.extend(make())
            torch.set_rng_state(state)
            return pieces

        found = on_rank(schedule, kept, batch, recompute=recompute)
        return found, {i: pieces[i][0].drawn for i in schedule.pieces[dist.get_rank()] if i}  # type: ignore[index]

    plain, again = (simulate_ranks(ranks, p, recompute).results for recompute in (False, True))
    for (one, masks), (other, more_masks) in zip(plain, again, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-14)
        for piece, drawn in masks.items():
            assert len(more_masks[piece]) == 2 * len(drawn)
            assert len({str(mask) for mask in more_masks[piece]}) <= len(drawn)
    if len(schedule.routes) == 1:  # each piece then meets the micro-batches on one stage
        masks = {piece: list(drawn) for _, own in plain for piece, drawn in own.items()}
        order = [a.micro_batch for a in schedule.computes(schedule.place(0, 1)[0]) if str(a.kind) == "F"]
        assert sorted(set(order)) == order[:m] or len(schedule.pieces[0]) > 1
        pieces = make(masks)
        losses = []
        for x, y in zip(*batch, strict=True):
            losses.append(mean_loss(nn.Sequential(*pieces)(x), y) / m)
        torch.stack(losses).sum().backward()
        expected = torch.stack(losses).sum().detach(), gradients(dict(enumerate(pieces)))
        assert_one_process([found for found, _ in plain], expected)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.02),
}


@pytest.mark.parametrize(
    ("name", "p", "m", "v", "optimizer"),
    [
        ("gpipe", 3, 4, 1, "AdamW"),
        ("1f1b", 3, 4, 1, "SGD"),
        ("interleaved", 2, 4, 2, "AdamW"),
        ("zb-v", 2, 4, 2, "AdamW"),
        ("chimera", 2, 4, 1, "AdamW"),
        ("dualpipe", 2, 4, 1, "SGD"),
    ],
)
def test_twenty_steps_are_those_of_one_process(name: str, p: int, m: int, v: int, optimizer: str) -> None:
    schedule, make_optimizer = make_schedule(name, p, m, v), OPTIMIZERS[optimizer]

    def ranks() -> tuple[list[Tensor], dict[str, Tensor]]:
        pieces = make_pieces(schedule.n_pieces, tied=True)
        pipeline = Pipeline(pieces, schedule, mean_loss)
        stepper = make_optimizer(pipeline.parameters())
        losses = []
        for step in range(20):
            losses.append(pipeline.step(*make_batch([1] * m, seed=step)))
            stepper.step()
            stepper.zero_grad()
        own = {i: pieces[i] for i in schedule.pieces[dist.get_rank()]}
        return losses, {f"{i}.{key}": value for i, piece in own.items() for key, value in piece.state_dict().items()}

    pieces = make_pieces(schedule.n_pieces, tied=True)
    model = nn.Sequential(*pieces)
    stepper = make_optimizer(model.parameters())
    expected_losses = []
    for step in range(20):
        batch = make_batch([1] * m, seed=step)
        loss = mean_loss(model(torch.cat(batch[0])), torch.cat(batch[1]))
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        expected_losses.append(loss.detach())
    expected = {f"{i}.{key}": value for i, piece in enumerate(pieces) for key, value in piece.state_dict().items()}
    for losses, state in simulate_ranks(ranks, p).results:
        torch.testing.assert_close(losses, expected_losses, rtol=1e-9, atol=0)
        torch.testing.assert_close(state, {name: expected[name] for name in state}, rtol=1e-8, atol=1e-10)


@each_schedule
def test_evaluate_gives_the_loss_and_leaves_no_gradient(name: str, p: int, m: int, v: int) -> None:
    schedule = make_schedule(name, p, m, v)
    batch, other = make_batch([2] * m), make_batch([3] * m, length=2, seed=5)

    def ranks() -> tuple[Tensor, Tensor, Tensor, bool]:
        pieces = make_pieces(schedule.n_pieces)
        pipeline = Pipeline(pieces, schedule, mean_loss)
        before = pipeline.evaluate(*other)
        clean = all(parameter.grad is None for piece in pieces for parameter in piece.parameters())
        loss = pipeline.step(*batch)
        return before, loss, pipeline.evaluate(*batch), clean and not before.requires_grad

    expected = one_process(make_pieces(schedule.n_pieces), batch)[0]
    expected_other = one_process(make_pieces(schedule.n_pieces), other)[0]
    for before, loss, after, clean in simulate_ranks(ranks, p).results:
        torch.testing.assert_close(before, expected_other, rtol=1e-12, atol=0)
        torch.testing.assert_close((loss, after), (expected, expected), rtol=1e-12, atol=0)
        assert clean


@each_schedule
def test_float32_and_autocast(name: str, p: int, m: int, v: int) -> None:
    schedule, batch = make_schedule(name, p, m, v), make_batch([2] * m)

    def make() -> list[nn.Module]:
        return [piece.float() for piece in make_pieces(schedule.n_pieces)]

    ranks = simulate_ranks(on_rank, p, schedule, make, batch).results
    assert_one_process(ranks, one_process(make(), batch), rtol=1e-5, atol=1e-6)

    def autocast() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    def in_bfloat16() -> Found:
        return on_rank(schedule, make, batch, context=autocast)

    pieces = make()
    losses = []
    for x, y in zip(*batch, strict=True):
        with autocast():
            losses.append(mean_loss(nn.Sequential(*pieces)(x), y) / m)
        losses[-1].backward()
    expected = torch.stack(losses).sum().detach(), gradients(dict(enumerate(pieces)))
    found = simulate_ranks(in_bfloat16, p).results
    # The order in which micro-batches' gradients are added up in float32 is all that differs.
    assert_one_process(found, expected, rtol=1e-4, atol=1e-6)
    assert all(gradient.dtype == torch.float32 for _, _, some in found for gradient in some.values())


@each_schedule
def test_bfloat16_models(name: str, p: int, m: int, v: int) -> None:
    schedule, batch = make_schedule(name, p, m, v), make_batch([2] * m)

    def make(dtype: torch.dtype = torch.bfloat16) -> list[nn.Module]:
        return [piece.to(dtype) for piece in make_pieces(schedule.n_pieces)]

    expected = one_process(make(torch.float64), batch)
    for loss, _, found in simulate_ranks(on_rank, p, schedule, make, batch).results:
        torch.testing.assert_close(loss, expected[0], rtol=0.02, atol=0)
        for key, gradient in found.items():
            assert gradient.dtype == torch.bfloat16
            error = (gradient.double() - expected[1][key]).norm() / expected[1][key].norm()
            assert error < 0.05, key


def test_a_tensor_is_cut_into_equal_micro_batches() -> None:
    schedule, batch = make_schedule("1f1b", 2, 4), make_batch([3] * 4)

    def ranks() -> Found:
        pieces = make_pieces(2)
        pipeline = Pipeline(pieces, schedule, mean_loss)
        loss = pipeline.step(torch.cat(batch[0]), torch.cat(batch[1]))
        rank = dist.get_rank()
        return loss, pipeline.losses, gradients({rank: pieces[rank]})

    assert_one_process(simulate_ranks(ranks, 2).results, one_process(make_pieces(2), batch))


def test_a_rank_may_hold_its_own_pieces_only() -> None:
    schedule, batch = make_schedule("interleaved", 2, 4, 2), make_batch([2] * 4)

    def ranks() -> Found:
        own = {i: make_pieces(4)[i] for i in schedule.pieces[dist.get_rank()]}
        pipeline = Pipeline(own, schedule, mean_loss)
        assert (pipeline.stage, pipeline.n_stages) == (dist.get_rank(), 2)
        loss = pipeline.step(*batch)
        wanted = {id(parameter) for piece in own.values() for parameter in piece.parameters()}
        assert {id(parameter) for parameter in pipeline.parameters()} == wanted
        return loss, pipeline.losses, gradients(own)

    assert_one_process(simulate_ranks(ranks, 2).results, one_process(make_pieces(4), batch))


class Turned(nn.Module):
    """A complex layer between real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Linear(WIDTH, WIDTH, dtype=torch.complex128)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.turn(x.to(torch.complex128))
        return out


class Real(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.real + x.imag.square()


@pytest.mark.parametrize("name", ["1f1b", "zb-h1"])
def test_complex_activations(name: str) -> None:
    schedule, batch = make_schedule(name, 4, 4), make_batch([2] * 4)

    def make() -> list[nn.Module]:
        first, second, third, last = make_pieces(4)
        return [first, nn.Sequential(second, Turned()), nn.Sequential(Turned(), Real(), third), last]

    assert_one_process(simulate_ranks(on_rank, 4, schedule, make, batch).results, one_process(make(), batch))


def transformer(tied: bool) -> Transformer:
    torch.manual_seed(5)
    config = TransformerConfig(
        vocab_size=VOCABULARY, context_length=8, d_model=8, n_layers=5, n_heads=2, tied_embeddings=tied
    )
    return Transformer(config).double()


@each_schedule
def test_a_split_transformer_with_tied_embeddings(name: str, p: int, m: int, v: int) -> None:
    schedule, batch = make_schedule(name, p, m, v), make_batch([2] * m)

    def ranks() -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
        model = transformer(tied=True)
        pipeline = Pipeline(split(model, schedule.n_pieces), schedule, mean_loss)
        loss = pipeline.step(*batch)
        norm = pipeline.clip_grad_norm_(1e-3)
        own = {id(parameter) for parameter in pipeline.parameters()}
        return loss, norm, {key: p.grad for key, p in model.named_parameters() if id(p) in own}

    model = transformer(tied=True)
    expected = mean_loss(model(torch.cat(batch[0])), torch.cat(batch[1]))
    expected.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    wanted = {key: parameter.grad for key, parameter in model.named_parameters()}
    seen = set()
    for loss, found_norm, found in simulate_ranks(ranks, p).results:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        torch.testing.assert_close(found_norm, norm, rtol=1e-12, atol=0)
        torch.testing.assert_close(found, {key: wanted[key] for key in found}, rtol=1e-11, atol=1e-16)
        seen |= found.keys()
    assert seen == wanted.keys()


class Added(nn.Module):
    """A first piece of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(VOCABULARY, WIDTH)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x: Tensor = self.tokens(tokens) + self.positions(positions)
        return x


class Twice(nn.Module):
    """A last piece of two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.value = nn.Linear(WIDTH, VOCABULARY), nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.head(x), self.value(x)


def test_several_inputs_outputs_and_targets_of_a_micro_batch() -> None:
    tokens, targets = make_batch([2, 1, 3])
    inputs = [(x, x.flip(-1)) for x in tokens]
    labels = [(y, torch.rand(y.shape, dtype=torch.float64)) for y in targets]

    def loss_of(outputs: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> Tensor:
        return mean_loss(outputs[0], wanted[0]) + (outputs[1].squeeze(-1) - wanted[1]).square().mean()

    def make() -> list[nn.Module]:
        torch.manual_seed(2)
        return [piece.double() for piece in (Added(), Block(), Twice())]

    def ranks() -> Found:
        pieces = make()
        pipeline = Pipeline(pieces, make_schedule("1f1b", 3, 3), loss_of)
        loss, rank = pipeline.step(inputs, labels), dist.get_rank()
        return loss, pipeline.losses, gradients({rank: pieces[rank]})

    pieces = make()
    whole = [tuple(torch.cat(parts) for parts in zip(*some, strict=True)) for some in (inputs, labels)]
    loss = loss_of(pieces[2](pieces[1](pieces[0](*whole[0]))), (whole[1][0], whole[1][1]))
    loss.backward()
    assert_one_process(simulate_ranks(ranks, 3).results, (loss.detach(), gradients(dict(enumerate(pieces)))))


class Turn(nn.Module):
    """Gives a view whose elements do not follow each other."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(-1, -2)


def test_views_between_pieces() -> None:
    schedule, batch = make_schedule("1f1b", 3, 4), make_batch([2] * 4)

    def make() -> list[nn.Module]:
        pieces = make_pieces(3)
        turned = nn.Sequential(nn.Linear(LENGTH, LENGTH).double(), Turn())
        return [nn.Sequential(pieces[0], Turn()), turned, nn.Sequential(Turn(), Turn(), pieces[2])]

    assert_one_process(simulate_ranks(on_rank, 3, schedule, make, batch).results, one_process(make(), batch))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_micro_batch_without_rows_counts_nothing(reduction: str) -> None:
    schedule, batch = make_schedule("1f1b", 2, 4), make_batch([2, 0, 3, 0])

    def ranks() -> list[Found]:
        return [on_rank(schedule, lambda: make_pieces(2), batch, reduction) for _ in range(2)]

    expected = one_process(make_pieces(2), batch, reduction)
    for found in [*zip(*simulate_ranks(ranks, 2).results, strict=True), *zip(*run_ranks(ranks, 2), strict=True)]:
        assert_one_process(found, expected)


@each_schedule
def test_ranks_that_begin_differently_agree_on_what_they_share(name: str, p: int, m: int, v: int) -> None:
    """The first rank that holds a copy gives its values to the others; each else keeps its own."""
    schedule, batch = make_schedule(name, p, m, v), make_batch([2] * m)
    last = schedule.n_pieces - 1
    tied = [((0, "0.weight"), (last, "1.weight"))]

    def ranks() -> tuple[Found, dict[str, Tensor]]:
        whole = make_pieces(schedule.n_pieces)
        own = {i: whole[i] for i in schedule.pieces[dist.get_rank()]}
        with torch.no_grad():
            for parameter in {q for piece in own.values() for q in piece.parameters()}:
                parameter.mul_(1 + 0.1 * dist.get_rank())
        if 0 in own and last in own:
            own[last][1].weight = own[0][0].weight  # type: ignore[index]
        pipeline = Pipeline(own, schedule, mean_loss, shared=tied)
        values = {f"{i}.{key}": value.clone() for i, piece in own.items() for key, value in piece.state_dict().items()}
        loss = pipeline.step(*batch)
        return (loss, pipeline.losses, gradients(own)), values

    results = simulate_ranks(ranks, p).results
    values: dict[str, Tensor] = {}
    for _, held in results:
        for key, value in held.items():
            torch.testing.assert_close(values.setdefault(key, value), value, rtol=0, atol=0)
    pieces = make_pieces(schedule.n_pieces, tied=True)
    for i, piece in enumerate(pieces):
        piece.load_state_dict({key: values[f"{i}.{key}"] for key in piece.state_dict()})
    torch.testing.assert_close(values["0.0.weight"], values[f"{last}.1.weight"], rtol=0, atol=0)
    assert_one_process([found for found, _ in results], one_process(pieces, batch))


def test_real_processes_and_simulated_ranks_agree() -> None:
    def ranks() -> list[Found]:
        found = []
        for name, m, v in (("gpipe", 4, 1), ("1f1b", 4, 1), ("interleaved", 4, 2), ("zb-h1", 4, 1), ("zb-v", 4, 2)):
            schedule = make_schedule(name, 2, m, v)
            for recompute in (False, True):
                some = on_rank(
                    schedule,
                    lambda schedule=schedule: make_pieces(schedule.n_pieces, tied=True),
                    make_batch([2, 1, 3, 1]),
                    recompute=recompute,
                )
                found.append(some)
        return found

    real, simulated = run_ranks(ranks, 2), simulate_ranks(ranks, 2).results
    torch.testing.assert_close(real, simulated, rtol=1e-13, atol=1e-15)
    for place, n_pieces in enumerate([2, 2, 2, 2, 4, 4, 2, 2, 4, 4]):
        expected = one_process(make_pieces(n_pieces, tied=True), make_batch([2, 1, 3, 1]))
        assert_one_process([found[place] for found in real], expected)


@pytest.mark.gpu
@each_schedule
def test_on_a_gpu(name: str, p: int, m: int, v: int) -> None:
    schedule, batch = make_schedule(name, p, m, v), make_batch([2] * m)
    on_gpu = [x.cuda() for x in batch[0]], [y.cuda() for y in batch[1]]

    def make() -> list[nn.Module]:
        return [piece.cuda() for piece in make_pieces(schedule.n_pieces)]

    assert_one_process(simulate_ranks(on_rank, p, schedule, make, on_gpu).results, one_process(make(), on_gpu))


def test_both_directions_on_real_processes() -> None:
    schedules = [make_schedule("chimera", 4, 4), make_schedule("dualpipe", 4, 8)]

    def ranks() -> list[Found]:
        return [
            on_rank(schedule, lambda: make_pieces(4, tied=True), make_batch([2] * schedule.n_micro_batches))
            for schedule in schedules
        ]

    real = run_ranks(ranks, 4)
    for place, schedule in enumerate(schedules):
        batch = make_batch([2] * schedule.n_micro_batches)
        assert_one_process([found[place] for found in real], one_process(make_pieces(4, tied=True), batch))
