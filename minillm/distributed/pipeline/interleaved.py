"""Interleaved 1F1B: a stage holds several thin chunks of the model instead of one thick one.

Piece i of the model stands on stage i mod p, so that a micro-batch goes round the stages v times. Filling the pipeline
takes p - 1 passes as before, but a pass is v times shorter. The price is v times the messages and some memory.
(Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", section 2.2.)
"""

from __future__ import annotations

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.one_f_one_b import one_f_one_b
from minillm.distributed.pipeline.routes import loop_route
from minillm.distributed.pipeline.schedule import Schedule, schedule_of
from minillm.distributed.pipeline.sizes import check_multiple, check_sizes


def interleaved(n_stages: int, n_micro_batches: int, n_chunks: int) -> Schedule:
    """Interleaved 1F1B.

    Micro-batches go in groups of p: a group passes a stage's first chunk, then its second, and so on. With p stages, m
    micro-batches and v chunks the bubble is (p - 1) / (v m) of the work of a stage. On stage s up to
    (v - 1) p + 2 (p - 1 - s) + 1 chunks' activations are in flight (and not more than v m), on the first stage
    p (1 + (p - 1) / (p v)) micro-batches' worth of a whole stage. With one chunk it is plain 1F1B.

    Args:
        n_stages: p.
        n_micro_batches: m, a multiple of p (with one chunk: any).
        n_chunks: v, the pieces of the model on each stage.

    Raises:
        TypeError, ValueError: sizes that are no int or below 1, or an m that p does not divide.
    """
    check_sizes("interleaved 1F1B", n_stages=n_stages, n_micro_batches=n_micro_batches, n_chunks=n_chunks)
    if n_chunks == 1:
        return one_f_one_b(n_stages, n_micro_batches)
    reason = f"micro-batches go round the {n_stages} stages in groups of {n_stages}"
    check_multiple("interleaved 1F1B", "n_micro_batches", n_micro_batches, n_stages, reason)
    forwards, backwards = [], []
    for first in range(0, n_micro_batches, n_stages):
        for chunk in range(n_chunks):
            for i in range(first, first + n_stages):
                forwards.append(Action(Kind.FORWARD, i, chunk))
                backwards.append(Action(Kind.BACKWARD, i, n_chunks - 1 - chunk))
    orders = []
    for stage in range(n_stages):
        # When the first micro-batch has been through all chunks of the last stage, its gradient starts to come back;
        # what goes on meanwhile between there and this stage, in both directions, is 2 (p - 1 - s) passes.
        warm_up = min((n_chunks - 1) * n_stages + 2 * (n_stages - 1 - stage), len(forwards))
        order = forwards[:warm_up]
        for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
            order += [forward, backward]
        orders.append(order + backwards[len(forwards) - warm_up :])
    routes = [loop_route(n_stages, n_chunks)]
    return schedule_of("Interleaved 1F1B", orders, n_micro_batches=n_micro_batches, routes=routes)
