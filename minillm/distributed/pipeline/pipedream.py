"""PipeDream: a pipeline that never runs empty, because nobody waits for the others' updates.

Each micro-batch is a batch of its own: when its backward pass has been through a stage, the stage updates its weights
and goes on. The stages are busy all the time; the price is that a gradient belongs to weights of some updates ago. With
*weight stashing* a stage keeps the weights of each micro-batch that is under way, so that forward and backward pass
agree: with p stages and n = p,

    w(t+1) = w(t) - lr * grad f(w_1(t - n + 1), w_2(t - n + 2), ..., w_n(t)).

*Vertical sync* gives a micro-batch the same version on all stages, at the price of p versions everywhere:

    w(t+1) = w(t) - lr * grad f(w_1(t - n + 1), w_2(t - n + 1), ..., w_n(t - n + 1)).

(Narayanan et al. 2019, "PipeDream: Generalized Pipeline Parallelism for DNN Training", sections 3.2 and 3.3.)
"""

from __future__ import annotations

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.schedule import Schedule, schedule_of
from minillm.distributed.pipeline.sizes import check_sizes


def pipedream(n_stages: int, n_micro_batches: int, *, vertical_sync: bool = False, stashing: bool = True) -> Schedule:
    """1F1B without a flush, with an update after each backward pass.

    Stage s works p - 1 - s updates behind: micro-batch b uses version max(0, b - (p - 1 - s)) of its weights, with
    vertical sync max(0, b - (p - 1)). It holds p - s versions, with vertical sync p, and min(p - s, m) micro-batches
    are in flight there. There is no bubble but that of filling the pipeline once and emptying it at the end.

    Args:
        n_stages: p.
        n_micro_batches: m, the length of the stream.
        vertical_sync: the same version on all stages.
        stashing: False is the naive asynchronous pipeline, to see what goes wrong: a backward pass takes the weights
            that are there by then, and its gradient is that of no function.

    Raises:
        TypeError, ValueError: sizes that are no int or below 1; vertical sync without stashing.
    """
    check_sizes("PipeDream", n_stages=n_stages, n_micro_batches=n_micro_batches)
    if vertical_sync and not stashing:
        raise ValueError("vertical_sync needs stashing: without it there is one version of the weights on each stage")
    orders = []
    for stage in range(n_stages):
        behind = n_stages - 1 - stage
        delay = n_stages - 1 if vertical_sync else behind
        order = [Action(Kind.FORWARD, i) for i in range(min(behind, n_micro_batches))]
        for i in range(n_micro_batches):
            now = i  # updates that this stage has made
            if i + behind < n_micro_batches:
                order.append(Action(Kind.FORWARD, i + behind, version=max(0, i + behind - delay)))
            version = max(0, i - delay) if stashing else now
            order.append(Action(Kind.BACKWARD, i, version=version))
            order.append(Action(Kind.UPDATE, i, version=now + 1))
        orders.append(order)
    name = "PipeDream" if stashing else "PipeDream without stashing"
    return schedule_of(
        f"{name}, vertical sync" if vertical_sync else name,
        orders,
        n_micro_batches=n_micro_batches,
        stashing=stashing,
    )
