"""Breadth-first looped pipeline: several chunks a stage, and all micro-batches through a chunk before the next one.

It has interleaved 1F1B's bubble and GPipe's memory. What it is for: a chunk's passes stand together, so that with
sharded data parallelism its weights are gathered twice and its gradients are reduced once a batch, beside the passes of
the other chunks. (Lamy-Poirier 2022, "Breadth-First Pipeline Parallelism", section 4; "looped BFS" in PyTorch.)
"""

from __future__ import annotations

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.routes import loop_route
from minillm.distributed.pipeline.schedule import Schedule, schedule_of
from minillm.distributed.pipeline.sizes import check_sizes


def breadth_first(n_stages: int, n_micro_batches: int, n_chunks: int) -> Schedule:
    """All micro-batches through a stage's first chunk, then all through its second, and the same way back.

    With p stages, m micro-batches and v chunks the bubble is (p - 1) / (v m) of the work of a stage, if m >= p. With
    fewer, every round but the last waits p - m passes more: (p - 1 + (v - 1) (p - m)) / (v m). All m micro-batches are
    in flight on every stage. With one chunk it is GPipe.

    Args:
        n_stages: p.
        n_micro_batches: m.
        n_chunks: v, the pieces of the model on each stage.

    Raises:
        TypeError, ValueError: sizes that are no int or below 1.
    """
    check_sizes("breadth-first", n_stages=n_stages, n_micro_batches=n_micro_batches, n_chunks=n_chunks)
    order = [Action(Kind.FORWARD, i, chunk) for chunk in range(n_chunks) for i in range(n_micro_batches)]
    order += [Action(Kind.BACKWARD, a.micro_batch, a.chunk) for a in reversed(order)]
    routes = [loop_route(n_stages, n_chunks)]
    return schedule_of("Breadth-first", [order] * n_stages, n_micro_batches=n_micro_batches, routes=routes)
