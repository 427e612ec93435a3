"""Zero bubble: the backward pass in two halves, of which one fills the gaps.

The gradient of a layer's input is what the stage before waits for (I); that of the weights (W) is wanted at the
optimizer's step only. With the halves apart the chain of backward passes from the last stage to the first is shorter,
and the W passes go where a stage would wait. (Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2; its B is
our I.)
"""

from __future__ import annotations

import difflib

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.schedule import Schedule, schedule_of
from minillm.distributed.pipeline.sizes import check_sizes
from minillm.distributed.pipeline.zero_bubble_v import zero_bubble_v

_VARIANTS = ("h1", "h2", "v")


def zero_bubble(n_stages: int, n_micro_batches: int, *, variant: str = "h1") -> Schedule:
    """ZB-H1, ZB-H2 or ZB-V.

    With p stages, and times F, I and W of the passes, in the paper's count (from a stage's first pass to its last):

    - "h1": 1F1B's memory, p micro-batches in flight; bubble (p - 1) (F + I - W), a third of 1F1B's if they are equal.
    - "h2": 2p - 1 in flight; bubble (p - 1) (F + I - 2W), none if they are equal and m >= 2p - 1.
    - "v": p in flight and no bubble if they are equal; see :mod:`minillm.distributed.pipeline.zero_bubble_v`.

    In flight is a micro-batch until its W has ended.

    Args:
        n_stages: p.
        n_micro_batches: m.
        variant: which.

    Raises:
        TypeError, ValueError: sizes that are no int or below 1, or a variant that is not there.
    """
    if variant not in _VARIANTS:
        near = difflib.get_close_matches(str(variant).lower(), _VARIANTS, n=1, cutoff=0.0)[0]
        raise ValueError(f'variant must be one of {", ".join(_VARIANTS)}, got {variant!r}; the nearest is "{near}"')
    if variant == "v":
        return zero_bubble_v(n_stages, n_micro_batches)
    check_sizes(f"ZB-{variant.upper()}", n_stages=n_stages, n_micro_batches=n_micro_batches)
    orders = []
    for stage in range(n_stages):
        after = n_stages - 1 - stage
        # H2 fills the time in which the first micro-batch is on its way with twice the forward passes. A stage that
        # holds fewer micro-batches for their I may hold more for their W: all stages come to the same memory.
        ahead, late = (after + 1, stage) if variant == "h1" else (2 * after + 1, 2 * stage)
        order = [Action(Kind.FORWARD, i) for i in range(min(ahead, n_micro_batches))]
        for i in range(n_micro_batches + late):
            if i < n_micro_batches:
                order.append(Action(Kind.BACKWARD_INPUT, i))
            if 0 <= i - late < n_micro_batches:
                order.append(Action(Kind.BACKWARD_WEIGHT, i - late))
            if i + ahead < n_micro_batches:
                order.append(Action(Kind.FORWARD, i + ahead))
        orders.append(order)
    return schedule_of(f"ZB-{variant.upper()}", orders, n_micro_batches=n_micro_batches)
