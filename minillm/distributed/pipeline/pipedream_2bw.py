"""PipeDream-2BW: no flush, and two versions of the weights instead of one for each stage.

The gradients of several micro-batches go into one update, and a micro-batch uses the version before the newest: while
those that began with the old one are finished, new ones begin with the next. All stages are one update behind:

    w(t+1) = w(t) - lr * grad f(w(t - 1)).

(Narayanan et al. 2021, "Memory-Efficient Pipeline-Parallel DNN Training", section 3.1.)
"""

from __future__ import annotations

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.schedule import Schedule, schedule_of
from minillm.distributed.pipeline.sizes import check_multiple, check_sizes


def pipedream_2bw(n_stages: int, n_micro_batches: int, *, accumulate: int | None = None) -> Schedule:
    """1F1B without a flush, with an update after each group of micro-batches and two buffers of weights.

    Group k uses version max(0, k - 1). A stage holds two versions at most; min(p - s, m) micro-batches are in flight on
    stage s.

    Args:
        n_stages: p.
        n_micro_batches: m, a multiple of `accumulate`.
        accumulate: micro-batches whose gradients make one update, at least p, so that the version that a group needs
            has been made when it begins; None is p.

    Raises:
        TypeError, ValueError: sizes that are no int or out of range.
    """
    accumulate = n_stages if accumulate is None else accumulate
    check_sizes("PipeDream-2BW", n_stages=n_stages, n_micro_batches=n_micro_batches, accumulate=accumulate)
    if accumulate < n_stages:
        raise ValueError(
            f"accumulate of PipeDream-2BW must be at least the {n_stages} stages, so that two versions of the weights "
            f"are enough; got {accumulate}, the nearest that will do: {n_stages}"
        )
    reason = f"each update takes the gradients of {accumulate}"
    check_multiple("PipeDream-2BW", "n_micro_batches", n_micro_batches, accumulate, reason)
    orders = []
    for stage in range(n_stages):
        behind = n_stages - 1 - stage
        forwards = [Action(Kind.FORWARD, i, version=max(0, i // accumulate - 1)) for i in range(n_micro_batches)]
        order = forwards[:behind]
        for i in range(n_micro_batches):
            order += forwards[i + behind : i + behind + 1]
            order.append(Action(Kind.BACKWARD, i, version=max(0, i // accumulate - 1)))
            if (i + 1) % accumulate == 0:
                order.append(Action(Kind.UPDATE, i, version=(i + 1) // accumulate))
        orders.append(order)
    return schedule_of("PipeDream-2BW", orders, n_micro_batches=n_micro_batches)
