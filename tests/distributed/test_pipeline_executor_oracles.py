"""The executor beside `torch.distributed.pipelining`: in the same program, from the same pieces, the same gradients."""

import copy
import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.nn import functional as F

from minillm.distributed import run_ranks, simulate_ranks
from minillm.distributed.pipeline import Pipeline, make_schedule

WIDTH, VOCABULARY, LENGTH, MICRO_BATCHES = 6, 9, 3, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.inner, self.outer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.outer(F.gelu(self.inner(self.norm(x))))
        return out


def make_pieces(n_pieces: int) -> list[nn.Module]:
    torch.manual_seed(1)
    layers: list[list[nn.Module]] = [[Block(), Block()] for _ in range(n_pieces)]
    layers[0].insert(0, nn.Embedding(VOCABULARY, WIDTH))
    layers[-1].append(nn.Linear(WIDTH, VOCABULARY))
    return [nn.Sequential(*some).double() for some in layers]


def make_batch(step: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (2 * MICRO_BATCHES, LENGTH + 1), generator=draw)
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


# ours -> (PyTorch's, chunks of a stage)
PAIRS = {
    "gpipe": ("ScheduleGPipe", 1),
    "1f1b": ("Schedule1F1B", 1),
    "interleaved": ("ScheduleInterleaved1F1B", 2),
    "breadth-first": ("ScheduleLoopedBFS", 2),
    "zb-h1": ("ScheduleInterleavedZeroBubble", 1),
    "zb-v": ("ScheduleZBVZeroBubble", 2),
}
# Without a counterpart of the same name: the gradient is the same all the same.
OTHERS = {
    "naive": ("ScheduleGPipe", 1),
    "zb-h2": ("ScheduleInterleavedZeroBubble", 1),
    "chimera": ("Schedule1F1B", 1),
    "dualpipe": ("ScheduleDualPipeV", 2),
}


class Theirs:
    """PyTorch's pipeline on this rank."""

    def __init__(self, kind: str, pieces: Sequence[nn.Module], n_chunks: int) -> None:
        rank, p = dist.get_rank(), dist.get_world_size()
        v_shape = kind in ("ScheduleZBVZeroBubble", "ScheduleDualPipeV")
        self.own = [rank, 2 * p - 1 - rank] if v_shape else [rank + p * chunk for chunk in range(n_chunks)]
        self.stages = [PipelineStage(pieces[i], i, len(pieces), torch.device("cpu")) for i in self.own]
        schedule_type = getattr(schedules, kind)
        single = issubclass(schedule_type, schedules.PipelineScheduleSingle)
        self.schedule = schedule_type(self.stages[0] if single else self.stages, MICRO_BATCHES, loss_fn=loss_of)
        self.first, self.last = 0 in self.own, len(pieces) - 1 in self.own

    def step(self, inputs: Tensor, targets: Tensor) -> Tensor | None:
        losses: list[Tensor] = []
        self.schedule.step(
            *([inputs] if self.first else []), **({"target": targets, "losses": losses} if self.last else {})
        )
        return torch.stack(losses).mean().detach() if self.last else None


def side_by_side(name: str, steps: int) -> tuple[float, float, float]:
    """The largest differences of gradients, parameters and losses over some steps of SGD with momentum."""
    p, rank = dist.get_world_size(), dist.get_rank()
    kind, n_chunks = {**PAIRS, **OTHERS}[name]
    same_places = name in PAIRS or n_chunks == 1
    schedule = make_schedule(name, p, MICRO_BATCHES, n_chunks if name in PAIRS else 1)
    theirs_pieces = make_pieces(p * n_chunks)
    ours_pieces = copy.deepcopy(theirs_pieces)
    if not same_places:  # half as many pieces of twice the size
        ours_pieces = [nn.Sequential(*ours_pieces[i : i + 2]) for i in range(0, len(ours_pieces), 2)]
    theirs = Theirs(kind, theirs_pieces, n_chunks)
    ours = Pipeline(ours_pieces, schedule, loss_of)
    optimizers = [
        torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
        for parameters in (ours.parameters(), nn.ModuleList(theirs_pieces[i] for i in theirs.own).parameters())
    ]
    worst = [0.0, 0.0, 0.0]
    for step in range(steps):
        loss, expected = ours.step(*make_batch(step)), theirs.step(*make_batch(step))
        if expected is not None:
            worst[2] = max(worst[2], float((loss - expected).abs()))
        their_parts = {i: [q.grad for q in theirs_pieces[i].parameters()] for i in theirs.own}
        everyones: list[dict[int, list[Tensor]]] = [{} for _ in range(p)]
        dist.all_gather_object(everyones, their_parts)
        by_piece = {i: grads for parts in everyones for i, grads in parts.items()}
        whole = list(itertools.chain.from_iterable(by_piece[i] for i in sorted(by_piece)))
        places = parameters_by_place(ours_pieces)
        for i, module in zip(schedule.pieces[rank], ours.modules, strict=True):
            for at, parameter in zip(places[i], module.parameters(), strict=True):
                assert parameter.grad is not None
                worst[0] = max(worst[0], float((parameter.grad - whole[at]).abs().max()))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    if same_places and len(schedule.routes) == 1:
        assert sorted(schedule.pieces[rank]) == sorted(theirs.own), (rank, name)
        for i in theirs.own:
            for a, b in zip(ours_pieces[i].parameters(), theirs_pieces[i].parameters(), strict=True):
                worst[1] = max(worst[1], float((a - b).detach().abs().max()))
    return worst[0], worst[1], worst[2]


def parameters_by_place(pieces: Sequence[nn.Module]) -> list[list[int]]:
    """Of each piece, which parameters of the model it has, counted from the first."""
    count = itertools.count()
    return [[next(count) for _ in piece.parameters()] for piece in pieces]


@pytest.mark.parametrize(("name", "p"), [*((name, 2) for name in {**PAIRS, **OTHERS}), *((name, 4) for name in PAIRS)])
def test_every_schedule_gives_pytorchs_gradients(name: str, p: int) -> None:
    for worst in simulate_ranks(side_by_side, p, name, 2).results:
        assert max(worst) < 1e-13


def some_pairs() -> list[tuple[float, float, float]]:
    return [side_by_side(name, 2) for name in ("gpipe", "1f1b", "interleaved", "zb-v")]


def test_on_real_processes() -> None:
    for of_rank in run_ranks(some_pairs, 2):
        assert max(itertools.chain.from_iterable(of_rank)) < 1e-13
