"""GPipe: all forward passes, then all backward passes."""

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.schedule import Schedule, schedule_of


def gpipe(n_stages: int, n_micro_batches: int) -> Schedule:
    """See the paper (Huang et al. 2019)."""
    orders = [
        [Action(Kind.FORWARD, m) for m in range(n_micro_batches)]
        + [Action(Kind.BACKWARD, m) for m in reversed(range(n_micro_batches))]
        for _ in range(n_stages)
    ]
    return schedule_of("GPipe", orders, n_micro_batches=n_micro_batches)
