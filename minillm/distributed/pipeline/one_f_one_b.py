"""1F1B with a flush: one forward, one backward pass in turn, so that few micro-batches are in flight.

A stage starts with as many forward passes as there are stages after it, and from then on lets one micro-batch go for
each that it takes. The bubble is GPipe's; the memory does not grow with the number of micro-batches. At the end of the
batch the pipeline runs empty (the flush), and the optimizer steps: all micro-batches see the same weights, unlike in
PipeDream, where the order comes from. (Narayanan et al. 2021, "Memory-Efficient Pipeline-Parallel DNN Training",
"PipeDream-Flush", section 3; Fan et al. 2021, "DAPPLE", section 3; Megatron-LM's default schedule.)
"""

from __future__ import annotations

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.schedule import Schedule, schedule_of
from minillm.distributed.pipeline.sizes import check_sizes


def one_f_one_b(n_stages: int, n_micro_batches: int) -> Schedule:
    """One forward, one backward.

    With p stages and m micro-batches the bubble is (p - 1) / (m + p - 1) of the total; min(p - s, m) micro-batches are
    in flight on stage s.

    Args:
        n_stages: p.
        n_micro_batches: m.

    Raises:
        TypeError, ValueError: sizes that are no int or below 1.
    """
    check_sizes("1F1B", n_stages=n_stages, n_micro_batches=n_micro_batches)
    orders = []
    for stage in range(n_stages):
        warm_up = min(n_stages - 1 - stage, n_micro_batches)
        order = [Action(Kind.FORWARD, i) for i in range(warm_up)]
        for i in range(n_micro_batches):
            if warm_up + i < n_micro_batches:
                order.append(Action(Kind.FORWARD, warm_up + i))
            order.append(Action(Kind.BACKWARD, i))
        orders.append(order)
    return schedule_of("1F1B", orders, n_micro_batches=n_micro_batches)
