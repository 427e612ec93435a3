"""GPipe: all forward passes, then all backward passes.

Micro-batches follow each other through the stages, so that stages work at the same time. The price is memory: when the
first backward pass starts, the activations of all micro-batches are held. (Huang et al. 2019, "GPipe: Efficient
Training of Giant Neural Networks using Pipeline Parallelism", section 2.3 and figure 2c.)
"""

from __future__ import annotations

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.schedule import Schedule, schedule_of
from minillm.distributed.pipeline.sizes import check_sizes


def gpipe(n_stages: int, n_micro_batches: int) -> Schedule:
    """All forward passes, then all backward passes, the last micro-batch first.

    With p stages and m micro-batches the bubble is (p - 1) / (m + p - 1) of the total, (p - 1) / m of the work of a
    stage; m micro-batches are in flight on every stage.

    Args:
        n_stages: p.
        n_micro_batches: m.

    Raises:
        TypeError, ValueError: sizes that are no int or below 1.
    """
    check_sizes("GPipe", n_stages=n_stages, n_micro_batches=n_micro_batches)
    order = [Action(Kind.FORWARD, i) for i in range(n_micro_batches)]
    order += [Action(Kind.BACKWARD, i) for i in reversed(range(n_micro_batches))]
    return schedule_of("GPipe", [order] * n_stages, n_micro_batches=n_micro_batches)
