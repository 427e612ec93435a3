"""A batch in micro-batches, and how much each of them counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minillm.distributed.pipeline.actions import Kind
from minillm.distributed.pipeline.schedule import Schedule
from minillm.distributed.pipeline.transport import Tensors


def cut(batch: Any, name: str, n_micro_batches: int) -> list[Tensors]:
    """The micro-batches of a batch, each a tuple of tensors.

    Args:
        batch: a tensor (batch, ...), to be cut into equal parts; or a sequence of micro-batches.
        name: what messages call it.

    Raises:
        ValueError: it is missing, cannot be cut into equal parts, or has another number of micro-batches.
        TypeError: it is something else.
    """
    if batch is None:
        piece = "first" if name == "inputs" else "last"
        raise ValueError(f"{name} are needed on the rank that holds the {piece} piece of the model, got None")
    if isinstance(batch, Tensor):
        rows = batch.size(0) if batch.dim() else 0
        if rows == 0 or rows % n_micro_batches:
            raise ValueError(
                f"{name} of {rows} rows do not divide into {n_micro_batches} equal micro-batches: take "
                f"{_nearest(rows, n_micro_batches)}, or give a sequence of micro-batches of the sizes that you want"
            )
        return [(part,) for part in torch.split(batch, rows // n_micro_batches)]
    if not isinstance(batch, Sequence):
        raise TypeError(f"{name} must be a tensor or a sequence of micro-batches, got {type(batch).__name__}")
    if len(batch) != n_micro_batches:
        raise ValueError(f"{name} hold {len(batch)} micro-batches, and the schedule is for {n_micro_batches}")
    found = [part if isinstance(part, tuple) else (part,) for part in batch]
    for part in found:
        if not part or not all(isinstance(tensor, Tensor) for tensor in part):
            raise TypeError(f"a micro-batch of {name} is a tensor or a tuple of tensors, got {type(part[0]).__name__}")
    return found


def _nearest(rows: int, n_micro_batches: int) -> str:
    least = max(1, -(-rows // n_micro_batches)) * n_micro_batches
    counts = [n for n in range(1, rows + 1) if rows % n == 0]
    if not counts:
        return f"a batch of {n_micro_batches} rows"
    near = min(counts, key=lambda n: (abs(n - n_micro_batches), n))
    return f"a batch of {least} rows, a schedule of {near} micro-batches"


def update_groups(schedule: Schedule) -> list[list[int]]:
    """The micro-batches whose gradients go into one update together."""
    if schedule.synchronous:
        return [list(range(schedule.n_micro_batches))]
    last_stage = schedule.place(0, schedule.n_pieces - 1)[0]
    groups: list[list[int]] = [[]]
    for action in schedule.computes(last_stage):
        if action.kind is Kind.BACKWARD:
            groups[-1].append(action.micro_batch)
        elif action.kind is Kind.UPDATE:
            groups.append([])
    return [group for group in groups if group]


def weights(targets: Sequence[Tensors], groups: Sequence[Sequence[int]], mean: bool) -> list[float]:
    """By micro-batch, what its loss is multiplied by: its share of the rows of its update, or 1 where losses add up.

    Raises:
        ValueError: an update's micro-batches have no rows.
    """
    if not mean:
        return [1.0] * len(targets)
    rows = [tensors[0].size(0) if tensors[0].dim() else 1 for tensors in targets]
    shares = [0.0] * len(targets)
    for group in groups:
        total = sum(rows[m] for m in group)
        if total == 0:
            raise ValueError("targets have no rows: there is nothing to learn from")
        for m in group:
            shares[m] = rows[m] / total
    return shares
