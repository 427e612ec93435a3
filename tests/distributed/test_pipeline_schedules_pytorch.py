"""The schedules' orders are those of `torch.distributed.pipelining`, pass for pass, where both have them."""

import re
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.testing._internal.distributed.fake_pg import FakeStore

from minillm.distributed.pipeline import (
    Action,
    Kind,
    Schedule,
    dualpipe,
    loop_route,
    make_schedule,
    schedule_of,
    simulate,
    v_route,
)

Order = list[tuple[str, int, int]]
"""(kind, micro-batch, piece) of the passes of a stage."""


def pytorch_orders(name: str, p: int, m: int, v: int = 1) -> list[Order]:
    """PyTorch's table of all ranks, built by one process of a group that sends nothing."""
    of_rank_0 = [0, 2 * p - 1] if name in ("ScheduleZBVZeroBubble", "ScheduleDualPipeV") else range(0, v * p, p)
    kind = getattr(schedules, name)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=p)
    try:
        stages = [PipelineStage(nn.Identity(), i, v * p, torch.device("cpu")) for i in of_rank_0]
        if issubclass(kind, schedules.PipelineScheduleSingle):
            table = kind(stages[0], m, loss_fn=nn.MSELoss())._get_pipeline_order()
        else:
            table = kind(stages, m, loss_fn=nn.MSELoss()).pipeline_order
    finally:
        dist.destroy_process_group()
    return [list(_passes(" ".join(str(action) for action in table[rank] if action is not None))) for rank in range(p)]


def _passes(text: str) -> Iterator[tuple[str, int, int]]:
    for piece, kind, micro_batch in re.findall(r"(\d+)(F|B|I|W)(\d+)", text):  # also both of "(0F3;3B1)OVERLAP_F_B"
        yield kind, int(micro_batch), int(piece)


def orders(schedule: Schedule) -> list[Order]:
    return [
        [(str(a.kind), a.micro_batch, schedule.piece(stage, a.chunk)) for a in schedule.computes(stage)]
        for stage in range(schedule.n_stages)
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "chunks"),
    [
        ("interleaved", "ScheduleInterleaved1F1B", (2, 3, 4)),
        ("breadth-first", "ScheduleLoopedBFS", (1, 2, 3, 4)),
        ("zb-h1", "ScheduleInterleavedZeroBubble", (1,)),
        ("zb-v", "ScheduleZBVZeroBubble", (2,)),
    ],
)
def test_the_order_is_pytorchs(ours: str, theirs: str, chunks: tuple[int, ...]) -> None:
    for p in (1, 2, 3, 4, 8):
        for m in (p, 2 * p, 24 // p * p):
            for v in chunks:
                assert orders(make_schedule(ours, p, m, v)) == pytorch_orders(theirs, p, m, v), (p, m, v)


def test_1f1b_is_pytorchs_but_for_the_last_rank_of_its_table() -> None:
    """What that rank runs is right; `Schedule1F1B._get_pipeline_order` names passes twice there."""
    for p, m in [(2, 5), (3, 3), (4, 12), (8, 9)]:
        ours, theirs = orders(make_schedule("1f1b", p, m)), pytorch_orders("Schedule1F1B", p, m)
        assert ours[:-1] == theirs[:-1]
        assert ours[-1] == [(kind, i, p - 1) for i in range(m) for kind in "FB"]


def as_schedule(found: list[Order], m: int, *, v_shaped: bool = False) -> Schedule:
    p, n_pieces = len(found), 1 + max(piece for order in found for _, _, piece in order)
    route = v_route(p) if v_shaped else loop_route(p, n_pieces // p)
    actions = [[Action(Kind(kind), i, route[piece][1]) for kind, i, piece in order] for order in found]
    return schedule_of("PyTorch's", actions, n_micro_batches=m, routes=[route])


def test_gpipe_goes_back_in_the_papers_order_and_takes_as_long_as_pytorchs() -> None:
    """PyTorch starts the way back with the first micro-batch, the paper with the last one (figure 2c)."""
    for p, m in [(1, 3), (4, 4), (4, 9), (8, 3)]:
        ours, theirs = make_schedule("gpipe", p, m), as_schedule(pytorch_orders("ScheduleGPipe", p, m), m)
        assert orders(theirs)[0] == [("F", i, 0) for i in range(m)] + [("B", i, 0) for i in range(m)]
        assert orders(ours)[0] == [("F", i, 0) for i in range(m)] + [("B", i, 0) for i in reversed(range(m))]
        assert simulate(ours).makespan == simulate(theirs).makespan
        assert simulate(ours).peak_in_flight == simulate(theirs).peak_in_flight


@pytest.mark.parametrize("p", [2, 4, 6, 8])
def test_dualpipe_is_pytorchs_dualpipe_v_unfolded(p: int) -> None:
    """DualPipeV is DualPipe whose second half of the stages is folded onto the first: near passes are its chunk 0.

    (Its authors call it "cut in half": stages s and p - 1 - s do the same with directions swapped.)
    """
    for m in range(2 * p, 25, 2):
        found, half = dualpipe(p, m), m // 2
        unfolded = []
        for stage in range(p // 2):
            piece = (stage, p - 1 - stage)
            unfolded.append([(str(a.kind), a.micro_batch % half, piece[a.chunk]) for a in found.computes(stage)])
        assert unfolded == pytorch_orders("ScheduleDualPipeV", p // 2, half, 2)
