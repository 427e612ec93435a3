"""The language-modelling loss, summed over tokens so that gradient accumulation is exact."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""A target of this value does not count (the convention of `torch.nn.functional.cross_entropy`)."""

Batch = tuple[Tensor, Tensor]
"""(inputs, targets): int64 tensors of shape (batch, seq), the targets being the inputs shifted by one."""


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum of log softmax(logits)[target] over the targets that count, in nats: a scalar, float32 under autocast.

    Args:
        logits: (batch, seq, vocab_size), floating point.
        targets: (batch, seq), int64; IGNORED entries do not count.
    """
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="sum", ignore_index=IGNORED)


def count_targets(batches: Sequence[Batch]) -> int:
    """How many targets count."""
    return sum(int((targets != IGNORED).sum()) for _, targets in batches)


def accumulate_gradients(
    forward: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]],
    batches: Sequence[Batch],
    device: torch.device,
    context: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    *,
    n_targets: int | None = None,
    accumulating: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    backward_factor: float = 1.0,
) -> tuple[Tensor, int]:
    """Add to the parameters' gradients that of the mean loss over all targets of all `batches`, one batch at a time.

    Each batch's summed loss is divided by the number of targets in all of them. The mean of the batches' own means
    would weigh the tokens of a short batch more than those of a long one; this is the gradient of the one big batch.

    What `forward` adds to the loss (the balance of experts, a mean over its tokens) is weighed by the share of the
    batch in all targets, and learned from, but not reported as a part of the loss.

    Args:
        forward: tokens (batch, seq) -> logits (batch, seq, vocab_size), or (logits, a scalar to be added to the loss).
        batches: at least one, on the CPU; each may have its own shape.
        device: where `forward` computes.
        context: entered around each forward pass, for autocast.
        n_targets: what to divide by, where other ranks have the rest of the batches; None counts those of `batches`.
        accumulating: entered around the passes of every batch but the last, for gradients that are sent with that one.
        backward_factor: what a loss is multiplied by before its backward pass, and not in the result.

    Returns:
        (loss, n_targets): the mean loss in nats per token as a detached scalar on `device`, and the number of targets.
        (Of `batches`' share in it, where `n_targets` is given.)

    Raises:
        ValueError: no target counts.
    """
    n_targets = count_targets(batches) if n_targets is None else n_targets
    if n_targets == 0:
        raise ValueError(f"no target to learn from: every target of {len(batches)} batches is {IGNORED}")
    total = torch.zeros((), device=device)
    for number, batch in enumerate(batches, start=1):
        inputs, targets = to_device(batch, device)
        with accumulating() if number < len(batches) else contextlib.nullcontext():
            with context():
                logits = forward(inputs)
                logits, added = logits if isinstance(logits, tuple) else (logits, None)
                loss = summed_cross_entropy(logits, targets) / n_targets
            total += loss.detach()
            if added is not None:
                loss = loss + added * (count_targets([batch]) / n_targets)
            loss = loss if backward_factor == 1.0 else loss * backward_factor
            loss.backward()  # type: ignore[no-untyped-call]
    return total, n_targets


@torch.no_grad()
def mean_loss(
    forward: Callable[[Tensor], Tensor],
    batches: Iterable[Batch],
    device: torch.device,
    context: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    *,
    total_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> float:
    """The mean loss in nats per token over all targets of all `batches`, which are read one at a time.

    Args:
        total_over_ranks: where each rank has its rows of the batches, what sums a tensor over ranks.

    Raises:
        ValueError: no target counts.
    """
    total, n_targets = torch.zeros((), device=device), 0
    for batch in batches:
        inputs, targets = to_device(batch, device)
        with context():
            total += summed_cross_entropy(forward(inputs), targets)
        n_targets += count_targets([batch])
    n_targets = int(total_over_ranks(torch.tensor(n_targets, device=device)))
    if n_targets == 0:
        raise ValueError("no target to evaluate on: the batches are empty")
    return total_over_ranks(total).item() / n_targets


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move a batch; to a CUDA device through pinned memory, so that the copy does not wait for the device."""
    inputs, targets = batch
    if device.type == "cuda":
        return inputs.pin_memory().to(device, non_blocking=True), targets.pin_memory().to(device, non_blocking=True)
    return inputs.to(device), targets.to(device)
