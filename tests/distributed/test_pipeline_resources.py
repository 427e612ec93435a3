"""What a pipeline sends, what it keeps, and when it does what: counted, and held against the schedule's own numbers."""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.costs import pipeline_bytes_sent, pipeline_in_flight
from minillm.distributed import Message, Network, Span, measure_memory, now, simulate_ranks
from minillm.distributed.pipeline import (
    Durations,
    Pipeline,
    Schedule,
    gpipe,
    interleaved,
    make_schedule,
    one_f_one_b,
    pipedream,
    pipedream_2bw,
    simulate,
    validate,
)

WIDTH = 16


WHOLE = [  # whose backward passes are whole
    ("naive", 4, 5, 1),
    ("gpipe", 4, 7, 1),
    ("1f1b", 4, 7, 1),
    ("1f1b", 4, 2, 1),
    ("interleaved", 4, 8, 2),
    ("interleaved", 2, 4, 3),
    ("breadth-first", 4, 8, 2),
    ("chimera", 4, 8, 1),
]
ALL = [*WHOLE, ("zb-h1", 4, 8, 1), ("zb-h2", 4, 9, 1), ("zb-v", 4, 8, 2), ("dualpipe", 4, 8, 1)]
ASYNCHRONOUS = [("pipedream", 4, 8, 1), ("vertical sync", 4, 6, 1), ("without stashing", 3, 7, 1), ("2bw", 3, 12, 1)]


def make(case: tuple[str, int, int, int]) -> Schedule:
    name, p, m, _ = case
    if name == "2bw":
        return pipedream_2bw(p, m)
    if name in ("pipedream", "vertical sync", "without stashing"):
        return pipedream(p, m, vertical_sync=name == "vertical sync", stashing=name != "without stashing")
    return make_schedule(*case)


def pipeline_of(schedule: Schedule, durations: Durations | None = None) -> Pipeline:
    pieces = make_pieces(schedule.n_pieces)
    own = [parameter for i in schedule.pieces[dist.get_rank()] for parameter in pieces[i].parameters()]
    optimizer = None if schedule.synchronous else torch.optim.SGD(own, lr=0.01)
    return Pipeline(pieces, schedule, loss_of, optimizer=optimizer, durations=durations)


def each(cases: list[tuple[str, int, int, int]]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=["-".join(map(str, case)) for case in cases])


def make_pieces(n_pieces: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(n_pieces)]


def batch_of(rows: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.ones(n, WIDTH) for n in rows], [torch.zeros(n, WIDTH) for n in rows]


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def second_step(schedule: Schedule, rows: list[int]) -> list[Message]:
    """The messages of the passes of a step whose shapes are known."""

    def ranks() -> None:
        pipeline = pipeline_of(schedule)
        pipeline.step(*batch_of(rows))
        pipeline.step(*batch_of(rows))

    messages = simulate_ranks(ranks, schedule.n_stages).messages
    sends = {str(a) for actions in schedule.actions for a in actions if a.kind.sends}
    found = [message for message in messages if message.operation == "send" and message.label in sends]
    assert len(found) % 2 == 0
    return found[len(found) // 2 :]


@each([*ALL, *ASYNCHRONOUS])
def test_messages_and_bytes_of_each_link_are_the_schedules(case: tuple[str, int, int, int]) -> None:
    schedule = make(case)
    rows = [1 + i % 3 for i in range(schedule.n_micro_batches)]

    found = Counter[tuple[int, int, str]]()
    n_bytes = Counter[tuple[int, int]]()
    for message in second_step(schedule, rows):
        found[message.source, message.destination, message.label] += 1
        n_bytes[message.source, message.destination] += message.n_bytes

    expected = Counter[tuple[int, int, str]]()
    expected_bytes = Counter[tuple[int, int]]()
    for stage, actions in enumerate(schedule.actions):
        for action in actions:
            if action.kind.sends:
                other = schedule.neighbour(stage, action)
                assert other is not None
                expected[stage, other[0], str(action)] += 1
                expected_bytes[stage, other[0]] += rows[action.micro_batch] * WIDTH * 4
    assert found == expected
    assert n_bytes == expected_bytes


@pytest.mark.parametrize(
    ("schedule", "v"), [(gpipe(3, 5), 1), (one_f_one_b(4, 5), 1), (interleaved(2, 4, 3), 3), (interleaved(4, 4, 2), 2)]
)
def test_stages_send_the_bytes_of_the_closed_form(schedule: Schedule, v: int) -> None:
    p, m, activation = schedule.n_stages, schedule.n_micro_batches, 3 * WIDTH * 4
    sent = [0] * p
    for message in second_step(schedule, [3] * m):
        sent[message.source] += message.n_bytes
    assert sent == [pipeline_bytes_sent(p, m, activation, stage=stage, n_chunks=v) for stage in range(p)]


def test_shapes_go_ahead_of_their_first_messages_only() -> None:
    def ranks() -> None:
        pipeline = Pipeline(make_pieces(3), one_f_one_b(3, 4), loss_of)
        for rows in ([2] * 4, [2] * 4, [1, 2, 3, 4], [2] * 4, [1, 2, 3, 4]):
            pipeline.step(*batch_of(rows))
        pipeline.evaluate(*batch_of([2] * 4))
        pipeline.evaluate(*batch_of([2] * 4))

    headers = [message for message in simulate_ranks(ranks, 3).messages if message.label == "shape"]
    per_link = Counter((message.source, message.destination) for message in headers)
    # Length and contents, for each of 4 micro-batches, of 3 batches of new shapes (evaluation is one of them).
    assert per_link == {(0, 1): 3 * 4 * 2, (1, 2): 3 * 4 * 2}


class Token:
    """Stands for what a graph keeps."""


class Kept(torch.autograd.Function):
    """Hands on what it is given; its graph holds a token that a counter knows of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: "Counting") -> Tensor:
        ctx.token = Token()
        count.now += 1
        count.most = max(count.most, count.now)
        weakref.finalize(ctx.token, count.gone)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0], None


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0

    def gone(self) -> None:
        self.now -= 1

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = Kept.apply(x, self)  # type: ignore[no-untyped-call]
        return result


@each(WHOLE)
def test_graphs_alive_at_the_peak_are_those_of_the_proof(case: tuple[str, int, int, int]) -> None:
    schedule = make_schedule(*case)

    def ranks() -> tuple[int, int]:
        counter = Counting()
        pieces = [nn.Sequential(piece, counter) for piece in make_pieces(schedule.n_pieces)]
        pipeline = Pipeline(pieces, schedule, loss_of)
        pipeline.step(*batch_of([1] * schedule.n_micro_batches))
        return counter.most, counter.now

    results = simulate_ranks(ranks, schedule.n_stages).results

    chunks = schedule.n_pieces / schedule.n_stages
    assert [most / chunks for most, _ in results] == pytest.approx(list(validate(schedule).peak_in_flight))
    assert all(left == 0 for _, left in results)
    name, p, m, v = case
    if name in ("gpipe", "1f1b", "interleaved"):
        in_theory = [pipeline_in_flight(name, p, m, stage, n_chunks=v) for stage in range(p)]
        assert [most / chunks for most, _ in results] == pytest.approx(in_theory)


def test_graphs_of_a_step_that_was_broken_off_are_gone_with_the_next_run() -> None:
    def ranks() -> tuple[int, int]:
        counter, calls = Counting(), 0

        def loss_that_fails_once(output: Tensor, target: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise ArithmeticError("no such number")
            return loss_of(output, target)

        pieces = [nn.Sequential(nn.Linear(WIDTH, WIDTH), counter)]
        pipeline = Pipeline(pieces, gpipe(1, 4), loss_that_fails_once)
        batch = batch_of([1] * 4)
        with contextlib.suppress(ArithmeticError):
            pipeline.step(*batch)
        left = counter.now
        pipeline.evaluate(*batch)
        return left, counter.now

    assert simulate_ranks(ranks, 1).results == [(2, 0)]


DEPTH, INNER, ROWS = 3, 8, 32
ACTIVATION = ROWS * WIDTH * 4
KEPT = DEPTH * (1 + INNER)
"""Activations that a piece keeps of a micro-batch: the inputs of its linear layers."""


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(WIDTH, INNER * WIDTH, bias=False) for _ in range(DEPTH))
        self.outer = nn.ModuleList(nn.Linear(INNER * WIDTH, WIDTH, bias=False) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = outer(torch.relu_(inner(x)))
        return x


def peak_activations(schedule: Schedule, recompute: bool) -> list[float]:
    """By stage, in units of what one activation takes; parameters and their gradients do not count."""

    def ranks() -> float:
        torch.manual_seed(0)
        pieces = [Deep() for _ in range(schedule.n_pieces)]
        pipeline = Pipeline(pieces, schedule, loss_of, recompute=recompute)
        batch = batch_of([ROWS] * schedule.n_micro_batches)
        pipeline.step(*batch)  # gradients are there, shapes are told
        with measure_memory(nn.ModuleList(pipeline.modules)) as memory:
            pipeline.step(*batch)
        return sum(memory.peak[kind] for kind in ("activations", "other")) / ACTIVATION

    return list(simulate_ranks(ranks, schedule.n_stages).results)


PASSING = 4 * INNER
"""What a backward pass holds for a moment."""


def summed(schedule: Schedule) -> float:
    """What the sum of copies' gradients holds, where whole pieces are copies: the others' and what is added up."""
    parameters = 2 * DEPTH * INNER * WIDTH**2 * 4 / ACTIVATION
    return 3 * 2 * parameters if len(schedule.routes) > 1 else 0


HEAVY = [
    ("gpipe", 4, 7, 1),
    ("1f1b", 4, 7, 1),
    ("interleaved", 2, 4, 2),
    ("chimera", 2, 4, 1),
    ("zb-h1", 3, 5, 1),
    ("zb-v", 2, 4, 2),
]


@each(HEAVY)
def test_bytes_of_activations_at_the_peak(case: tuple[str, int, int, int]) -> None:
    schedule = make_schedule(*case)
    on_the_way = 2 * schedule.n_stages + 2 + summed(schedule)
    for stage, found in enumerate(peak_activations(schedule, recompute=False)):
        graphs = validate(schedule).peak_in_flight[stage] * schedule.n_pieces / schedule.n_stages
        # A micro-batch whose gradients of the weights are put off keeps the gradients of its layers' outputs too.
        most = (2 if schedule.splits_backward else 1) * KEPT + 2
        assert graphs * (KEPT - 1) <= found <= graphs * most + PASSING + on_the_way, stage


@pytest.mark.parametrize("recompute", [False, True], ids=["graphs", "recompute"])
def test_what_1f1b_holds_does_not_grow_with_its_micro_batches(recompute: bool) -> None:
    few, many = (peak_activations(make_schedule("1f1b", 3, m), recompute) for m in (8, 24))
    # Not by one activation: what was sent goes when its gradient has come. Each micro-batch has its loss, a number.
    assert many == pytest.approx(few, abs=0.2)


@each(HEAVY)
def test_with_recompute_only_inputs_are_kept(case: tuple[str, int, int, int]) -> None:
    schedule = make_schedule(*case)
    on_the_way = 2 * schedule.n_stages + 2 + summed(schedule)
    for stage, found in enumerate(peak_activations(schedule, recompute=True)):
        graphs = validate(schedule).peak_in_flight[stage] * schedule.n_pieces / schedule.n_stages
        recomputed = 2 * KEPT * graphs if schedule.splits_backward else KEPT
        assert found <= 3 * graphs + recomputed + PASSING + on_the_way, stage


def spans_of(schedule: Schedule, durations: Durations, network: Network) -> list[Span]:
    """What the ranks did in a step, by the clock at which the first of them began it."""

    def ranks() -> float:
        pipeline = pipeline_of(schedule, durations)
        batch = batch_of([1] * schedule.n_micro_batches)
        pipeline.step(*batch)  # shapes are told in the first
        dist.barrier()
        begin = now()
        pipeline.step(*batch)
        return begin

    simulation = simulate_ranks(ranks, schedule.n_stages, network=network)
    begin = max(simulation.results)
    spans = [span for span in simulation.timeline if span.lane == "compute" and span.start >= begin]
    start = min(span.start for span in spans)
    return [Span(span.rank, "compute", span.name, span.start - start, span.end - start) for span in spans]


def by_rank(spans: Iterator[Span]) -> list[tuple[int, str, float, float]]:
    return sorted((s.rank, s.name, s.start, s.end) for s in spans)


TIMED = [(case, 1.5, True) for case in (*ALL, *ASYNCHRONOUS)]
TIMED += [(case, 0.0, False) for case in (ALL[1], ALL[2], ALL[4], ALL[-2], ALL[-1], ASYNCHRONOUS[0])]


@pytest.mark.parametrize(("case", "latency", "uneven"), TIMED)
def test_the_executor_takes_the_time_that_the_simulator_says(
    case: tuple[str, int, int, int], latency: float, uneven: bool
) -> None:
    schedule = make(case)
    costs: Any = [1.0 + 0.5 * (i % 3) for i in range(schedule.n_pieces)] if uneven else 1.0
    doubled: Any = [2 * cost for cost in costs] if uneven else 2.0
    durations = Durations.of(schedule, forward=costs, backward=doubled, update=0.5)

    found = spans_of(schedule, durations, Network(latency=latency, bandwidth=1e30))

    timeline = simulate(schedule, forward=costs, backward=doubled, update=0.5, latency=latency)
    expected = [span for span in timeline.spans if span.lane == "compute"]
    for (rank, name, start, end), (other, other_name, other_start, other_end) in zip(
        by_rank(iter(found)), by_rank(iter(expected)), strict=True
    ):
        assert (rank, name) == (other, other_name)
        assert (start, end) == pytest.approx((other_start, other_end), abs=1e-6), (rank, name)
