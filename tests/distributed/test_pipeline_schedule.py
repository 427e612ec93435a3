"""The schedule language: its notation, the messages that are put in, and what is refused in words."""

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.distributed.pipeline import (
    Action,
    Kind,
    Schedule,
    ScheduleError,
    dependencies,
    loop_route,
    schedule_of,
    v_route,
    validate,
)

actions = st.builds(Action, st.sampled_from(Kind), st.integers(0, 999), st.integers(0, 20), st.integers(0, 50))


@given(actions)
def test_notation_there_and_back(action: Action) -> None:
    assert Action.parse(str(action)) == action
    assert Action.parse(f"  {action}\n") == action


def test_notation() -> None:
    assert Action.parse("F3") == Action(Kind.FORWARD, 3)
    assert Action.parse("RB3.1") == Action(Kind.RECV_BACKWARD, 3, 1)
    assert Action.parse("W12.2@7") == Action(Kind.BACKWARD_WEIGHT, 12, 2, 7)
    assert str(Action("SF", 4, 0, 0)) == "SF4"  # type: ignore[arg-type]
    kinds = {str(kind): (kind.computes, kind.sends, kind.receives) for kind in Kind}
    assert {name for name, (computes, *_) in kinds.items() if computes} == set("FBIW")
    assert {name for name, (_, sends, _) in kinds.items() if sends} == {"SF", "SB"}
    assert {name for name, (*_, receives) in kinds.items() if receives} == {"RF", "RB"}


@pytest.mark.parametrize(
    "text", ["", "F", "3", "f3", "X3", "F-1", "F3.", "F3@", "F3.1.1", "F3@1.1", "F 3", "FB3", "F3 B3"]
)
def test_what_is_no_action_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"written like F3, B3\.1 or F3@2"):
        Action.parse(text)


def test_numbers_of_an_action_count_from_0() -> None:
    with pytest.raises(ValueError, match="count from 0, got 0, -1 and 0"):
        Action(Kind.FORWARD, 0, -1)
    with pytest.raises(ValueError, match="'X' is not a valid Kind"):
        Action("X", 0)  # type: ignore[arg-type]


def test_routes() -> None:
    assert loop_route(3) == ((0, 0), (1, 0), (2, 0))
    assert loop_route(2, 2) == ((0, 0), (1, 0), (0, 1), (1, 1))
    assert v_route(3) == ((0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1))


def lists_of(schedule: Schedule) -> list[str]:
    return [" ".join(map(str, stage)) for stage in schedule.actions]


def test_messages_of_a_small_one() -> None:
    """1F1B with two stages: a message is in both lists where its sender begins to compute it."""
    schedule = schedule_of("mine", [["F0", "F1", "B0", "B1"], ["F0", "B0", "F1", "B1"]], n_micro_batches=2)
    assert lists_of(schedule) == ["F0 SF0 F1 SF1 RB0 B0 RB1 B1", "RF0 RF1 F0 B0 SB0 F1 B1 SB1"]
    assert str(schedule).splitlines() == [
        "mine: 2 stages, 2 micro-batches",
        "stage 0: F0 F1 B0 B1",
        "stage 1: F0 B0 F1 B1",
    ]


def test_only_the_half_for_the_input_sends_and_updates_send_nothing() -> None:
    schedule = schedule_of("mine", [["F0", "I0", "W0", "U0@1"], ["F0", "I0", "W0", "U0@1"]], n_micro_batches=1)
    assert lists_of(schedule) == ["F0 SF0 RB0 I0 W0 U0@1", "RF0 F0 I0 SB0 W0 U0@1"]
    assert schedule.splits_backward
    assert not schedule.synchronous


def test_no_message_from_a_stage_to_itself() -> None:
    order = [["F0", "F0.1", "B0.1", "B0"]]
    schedule = schedule_of("mine", order, n_micro_batches=1)
    assert lists_of(schedule) == ["F0 F0.1 B0.1 B0"]
    turn = schedule_of(
        "V", [["F0", "F0.1", "B0.1", "B0"], ["F0", "F0.1", "B0.1", "B0"]], n_micro_batches=1, routes=[v_route(2)]
    )
    assert lists_of(turn) == ["F0 SF0 RF0.1 F0.1 B0.1 SB0.1 RB0 B0", "RF0 F0 F0.1 SF0.1 RB0.1 B0.1 B0 SB0"]


def test_two_directions_share_their_stages() -> None:
    down, up = ((0, 0), (1, 0)), ((1, 1), (0, 1))
    orders = [["F0", "F1.1", "B1.1", "B0"], ["F1.1", "F0", "B0", "B1.1"]]
    schedule = schedule_of("both", orders, n_micro_batches=2, routes=[down, up], route_of=[0, 1])
    assert schedule.pieces == ((0, 1), (1, 0))
    assert (schedule.n_stages, schedule.n_micro_batches, schedule.n_pieces) == (2, 2, 2)
    assert [schedule.place(m, piece) for m in (0, 1) for piece in (0, 1)] == [(0, 0), (1, 0), (1, 1), (0, 1)]
    assert validate(schedule).n_messages == 4


def test_neighbours_and_dependencies() -> None:
    schedule = schedule_of(
        "mine",
        [["F0", "F0.1", "I0.1", "I0", "W0", "W0.1"], ["F0", "F0.1", "B0.1", "B0"]],
        n_micro_batches=1,
    )
    parse = Action.parse
    assert [schedule.neighbour(0, parse(a)) for a in ("F0", "F0.1", "RF0.1", "RB0.1", "B0.1", "B0", "RF0")] == [
        (1, 0), (1, 1), (1, 0), (1, 1), (1, 0), None, None,
    ]  # fmt: skip
    assert schedule.neighbour(1, parse("F0.1")) is None  # the loss
    assert dependencies(schedule, 0, parse("F0")) == []
    assert dependencies(schedule, 0, parse("F0.1")) == [("F", 0, 1)]
    assert dependencies(schedule, 0, parse("I0.1")) == [("F", 0, 2), ("B", 0, 3)]
    assert dependencies(schedule, 1, parse("B0.1")) == [("F", 0, 3)]
    assert dependencies(schedule, 0, parse("W0")) == [("B", 0, 0)]


@st.composite
def random_orders(draw: st.DrawFn) -> dict[str, Any]:
    """Some order in which the passes of all stages can be done one after the other, told apart by stage.

    Loops, there and back, or two directions; backward passes whole or in halves, pass by pass.
    """
    p, m, v = draw(st.integers(1, 5)), draw(st.integers(1, 6)), draw(st.integers(1, 3))
    kind = draw(st.sampled_from(["loop", "v", "both"]))
    routes = {
        "loop": [loop_route(p, v)],
        "v": [v_route(p)],
        "both": [loop_route(p), tuple((p - 1 - s, 1) for s in range(p))],
    }[kind]
    route_of = [draw(st.integers(0, len(routes) - 1)) for _ in range(m)]
    luck = random.Random(draw(st.integers(0, 2**32)))
    n_pieces = len(routes[0])
    orders: list[list[str]] = [[] for _ in range(p)]
    state = [("F", 0)] * m  # what each micro-batch does next; weights' gradients wait in `late`
    late: list[tuple[int, str]] = []
    while state.count(("", 0)) < m or late:
        choices: list[int | None] = [i for i, (what, _) in enumerate(state) if what]
        chosen = luck.choice([*choices, None] if late else choices)
        if chosen is None:
            stage, text = late.pop(luck.randrange(len(late)))
            orders[stage].append(text)
            continue
        what, piece = state[chosen]
        stage, chunk = routes[route_of[chosen]][piece]
        name = f"{chosen}.{chunk}"
        if what == "F":
            orders[stage].append(f"F{name}")
            state[chosen] = ("F", piece + 1) if piece + 1 < n_pieces else ("B", piece)
        else:
            halves = luck.random() < 0.5
            orders[stage].append(f"{'I' if halves else 'B'}{name}")
            if halves:
                late.append((stage, f"W{name}"))
            state[chosen] = ("B", piece - 1) if piece else ("", 0)
    return {"orders": orders, "n_micro_batches": m, "routes": routes, "route_of": route_of}


@given(random_orders())
@settings(max_examples=150, deadline=None)
def test_messages_that_are_put_in_never_get_stuck(drawn: dict[str, Any]) -> None:
    """Whatever order the stages compute in, if it can be done at all: as the rendezvous of the proof says."""
    schedule = schedule_of("random", **drawn)
    proof = validate(schedule)
    assert [[str(a) for a in schedule.computes(s)] for s in range(schedule.n_stages)] == [
        [text.removesuffix(".0") for text in order] for order in drawn["orders"]
    ]
    hops = [sum(a[0] != b[0] for a, b in pairwise(route)) for route in drawn["routes"]]
    assert proof.n_messages == 2 * sum(hops[route] for route in drawn["route_of"])


@pytest.mark.parametrize(
    ("orders", "arguments", "message"),
    [
        ([], {}, r"mine needs at least 1 stage and 1 micro-batch, got 0 and 1"),
        ([["F0"]], {"n_micro_batches": 0}, r"at least 1 stage and 1 micro-batch, got 1 and 0"),
        ([["F0", "SF0"], ["F0"]], {}, r"SF0 on stage 0: messages are put in here"),
        ([["F0", "F1"]], {}, r"F1 on stage 0: there are 1 micro-batches, counted from 0"),
        ([["F0.1"]], {"routes": [((0, 0),)]}, r"F0\.1 on stage 0: .* does not come to its chunk 1; its route is 0\.0"),
        ([["F0"]], {"routes": []}, r"1 route through 1 piece"),
        ([["F0"]], {"routes": [((3, 0),)]}, r"piece 0 is on stage 3; its stages are 0 to 0"),
        ([["F0.1"]], {"routes": [((0, 1),)]}, r"chunks of stage 0 are numbered \[1\]; they count from 0"),
        ([["F0"]], {"routes": [((0, 0), (0, 0))]}, r"stage 0 has pieces 0 and 1 as chunk 0"),
        ([["F0"]], {"routes": [((0, 0),), ((0, 0), (0, 1))]}, r"routes pass 1 and 2 pieces of one model"),
        ([["F0"]], {"route_of": [-1]}, r"micro-batch 0 takes route -1; there are 1, from 0"),
        ([["F0"]], {"route_of": [1]}, r"micro-batch 0 takes route 1; there are 1, from 0"),
        ([["F0"]], {"route_of": [0, 0]}, r"route_of is for 2 micro-batches, and there are 1"),
        ([["B0", "F0"]], {}, r"mine gets stuck: stage 0 waits at B0 for F0 of stage 0"),
        ([["F0", "B0"], ["B0", "F0"]], {}, r"stage 0 waits at B0 for B0 of stage 1; stage 1 waits at B0 for F0"),
        ([["F0", "B0"], []], {}, r"gets stuck: stage 0 waits at B0 for B0 of stage 1"),
    ],
)
def test_orders_that_are_none_are_refused_in_words(
    orders: list[list[str]], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        schedule_of("mine", orders, **({"n_micro_batches": 1} | arguments))
