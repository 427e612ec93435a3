"""DualPipe: pipelines in both directions, a forward pass of one always beside a backward pass of the other.

As in Chimera each stage holds two pieces, its own and its mirror image's, and half of the micro-batches go each way. In
the long middle part a stage does F of one direction and B of the other in turn. That is what the schedule was made for:
with experts on other nodes a layer waits for messages about as long as it computes, and one pass computes while the
other one's messages are on their way. (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 3.2.1, figure 5.)

What is left out is that overlap inside a pair: the two passes stand one after the other here, in the paper's order.
"""

from __future__ import annotations

from itertools import count

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.schedule import Schedule, schedule_of
from minillm.distributed.pipeline.sizes import check_multiple, check_sizes


def dualpipe(n_stages: int, n_micro_batches: int) -> Schedule:
    """The paper's order, its pairs one after the other.

    With p stages, and times F, I and W of the passes (B = I + W the whole backward, F&B a pair), the paper counts a
    bubble of (p/2 - 1) (F&B + B - 3W), where a pair begins when both of its passes can and gives nothing before both
    have ended. One after the other (F&B = F + B) the passes of a pair wait for themselves only, and the bubble is
    (p/2 - 1) (F + I - W), less than half of ZB-H1's. Both are exact if F = I >= W. On each stage p + 1 micro-batches
    are in flight.

    Args:
        n_stages: p, even.
        n_micro_batches: m, even, at least 2p. The first half goes down, the second half up.

    Raises:
        TypeError, ValueError: sizes that are no int, below the least, or odd.
    """
    check_sizes("DualPipe", n_stages=n_stages, n_micro_batches=n_micro_batches)
    check_multiple("DualPipe", "n_stages", n_stages, 2, "each stage has a mirror image")
    check_multiple("DualPipe", "n_micro_batches", n_micro_batches, 2, "half of them go down, half go up")
    if n_micro_batches < 2 * n_stages:
        raise ValueError(
            f"n_micro_batches of DualPipe must be at least twice the {n_stages} stages, because each direction fills "
            f"all of them; got {n_micro_batches}, the nearest that will do: {2 * n_stages}"
        )
    half, orders = n_micro_batches // 2, []
    for stage in range(n_stages):
        outer = min(stage, n_stages - 1 - stage)  # stages between this one and the nearer end
        inner = n_stages // 2 - 1 - outer  # and between it and the middle
        # Near (N) is the direction that comes from the nearer end, far (D, distant) the other one.
        words = (
            ("FN " * (2 * inner))
            + ("FN FD " * (outer + 1))
            + ("ID W FD " * inner)  # W at once fills the wait for the next I
            + ("FN BD FD BN " * (half - n_stages + outer + 1))
            + ("BD FD BN " * inner)  # no new near ones any more
            + _halved("BD BN " * (outer + 1), outer + 1)  # others wait for I: from the middle on W is put off
            + ("W IN " * inner)
            + ("W " * (outer + 1))
        ).split()
        orders.append(_numbered(words, near=0 if stage < n_stages // 2 else 1, half=half))
    down = tuple((stage, 0) for stage in range(n_stages))
    up = tuple((stage, 1) for stage in reversed(range(n_stages)))
    return schedule_of(
        "DualPipe",
        orders,
        n_micro_batches=n_micro_batches,
        routes=[down, up],
        route_of=[0] * half + [1] * half,
    )


def _halved(words: str, whole: int) -> str:
    """Backward passes of which only the first `whole` stay whole."""
    parts = words.split()
    return " ".join([*parts[:whole], *(word.replace("B", "I") for word in parts[whole:])]) + " "


def _numbered(words: list[str], *, near: int, half: int) -> list[Action]:
    """The passes with their micro-batches: each direction's in turn, and a W for the oldest I that has none yet."""
    forward, backward = [count(0), count(half)], [count(0), count(half)]
    order: list[Action] = []
    waiting: list[Action] = []
    for word in words:
        if word == "W":
            first = waiting.pop(0)
            order.append(Action(Kind.BACKWARD_WEIGHT, first.micro_batch, first.chunk))
            continue
        kind, direction = Kind(word[0]), near if word[1] == "N" else 1 - near
        order.append(Action(kind, next((forward if kind is Kind.FORWARD else backward)[direction]), direction))
        if kind is Kind.BACKWARD_INPUT:
            waiting.append(order[-1])
    return order
