"""The naive pipeline: a micro-batch goes through all stages and back before the next one starts.

The model is spread over the stages, nothing else is gained: one stage works at a time, p - 1 wait. (Huang et al. 2019,
"GPipe", figure 2b; "model parallelism" in older texts.)
"""

from __future__ import annotations

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.schedule import Schedule, schedule_of
from minillm.distributed.pipeline.sizes import check_sizes


def naive(n_stages: int, n_micro_batches: int) -> Schedule:
    """One micro-batch at a time.

    With p stages the bubble is 1 - 1/p of the total, whatever the number of micro-batches; one is in flight.

    Args:
        n_stages: p.
        n_micro_batches: m.

    Raises:
        TypeError, ValueError: sizes that are no int or below 1.
    """
    check_sizes("the naive pipeline", n_stages=n_stages, n_micro_batches=n_micro_batches)
    order = [Action(kind, i) for i in range(n_micro_batches) for kind in (Kind.FORWARD, Kind.BACKWARD)]
    return schedule_of("Naive", [order] * n_stages, n_micro_batches=n_micro_batches)
