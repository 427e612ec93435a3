"""ZB-V: zero bubble with 1F1B's memory, as a stage holds two chunks and micro-batches go there and back.

The first stage holds the first and the last piece of the model, so that the loss is made where a micro-batch came in,
and its gradient starts at once. What a stage holds for long in its chunk 0 it holds for short in its chunk 1, and all
that fits into the memory of p micro-batches. (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 6.)
"""

from __future__ import annotations

from collections import defaultdict
from itertools import count

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.routes import v_route
from minillm.distributed.pipeline.schedule import Schedule, schedule_of
from minillm.distributed.pipeline.sizes import check_sizes


def zero_bubble_v(n_stages: int, n_micro_batches: int) -> Schedule:
    """ZB-V: each pass of a stage in turn, chunk by chunk.

    If F, I and W take the same time and m >= 2p - 1, no stage waits between its first and its last pass; p
    micro-batches' worth of a whole stage are in flight on the first one, fewer on the others.

    Args:
        n_stages: p; the model is cut into 2p pieces.
        n_micro_batches: m. With fewer than 2p - 1 the passes of those that are missing are left out.

    Raises:
        TypeError, ValueError: sizes that are no int or below 1.
    """
    check_sizes("ZB-V", n_stages=n_stages, n_micro_batches=n_micro_batches)
    m = max(n_micro_batches, 2 * n_stages - 1)
    orders = []
    for stage in range(n_stages):
        ahead = n_stages - stage  # this stage and those between it and the turn
        words = (
            ("F0 " * (2 * ahead - 1))  # until the first micro-batch is back from the turn
            + ("F1 F0 " * stage)  # until its gradient is back from the loss on stage 0
            + ("F1 I1 W1 " * ahead)  # until that is back from the turn, too
            + ("F0 I0 W0 F1 I1 W1 " * (m - 2 * n_stages + 1 + stage))
            + ("I0 W0 F1 I1 W1 " * (ahead - 1))  # no new micro-batches any more
            + ("I0 I1 " * stage)  # others wait for I: W is put off
            + ("I0 W0 " * ahead)
            + ("W1 " * stage)
            + ("W0 " * stage)
        ).split()
        micro_batches: dict[str, count[int]] = defaultdict(count)  # each kind of pass takes them in turn
        order = [Action(Kind(word[0]), next(micro_batches[word]), int(word[1])) for word in words]
        orders.append([action for action in order if action.micro_batch < n_micro_batches])
    return schedule_of("ZB-V", orders, n_micro_batches=n_micro_batches, routes=[v_route(n_stages)])
