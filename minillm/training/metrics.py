"""The numbers of the steps, gathered without waiting for the device, and the watch over them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


class NonFiniteError(RuntimeError):
    """The loss or the norm of the gradient became NaN or infinite. `step` is the update at which it did."""

    def __init__(self, step: int, loss: float, grad_norm: float, checkpoint: Path | None = None) -> None:
        kept = f"the last good checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint before it"
        super().__init__(f"training stopped at step {step}: loss {loss}, norm of the gradient {grad_norm}; {kept}")
        self.step, self.loss, self.grad_norm, self.checkpoint = step, loss, grad_norm, checkpoint


class StepStatistics:
    """The losses since the last reading, and the first step that went bad, kept on the device.

    Reading a number from a GPU waits until the GPU has caught up; so the numbers are gathered there, and read together
    when a line of metrics is written.
    """

    def __init__(self, device: torch.device) -> None:
        self._bad = torch.zeros(3, device=device)  # step (0: none), loss, norm of the gradient
        self._grad_norm = torch.zeros((), device=device)
        self._sum = torch.zeros((), device=device)
        self._n_targets = 0

    def add(self, step: int, loss: Tensor, grad_norm: Tensor, n_targets: int) -> None:
        """Take in a step: its mean loss, the norm of its gradient before clipping, and its number of targets."""
        numbers = torch.stack([torch.full_like(loss, step), loss, grad_norm])
        bad_now = (self._bad[0] == 0) & ~numbers.isfinite().all()
        self._bad = torch.where(bad_now, numbers, self._bad)
        self._grad_norm = grad_norm
        self._sum = self._sum + loss * n_targets
        self._n_targets += n_targets

    def check(self) -> None:
        """Wait for the device; raise NonFiniteError if a step's loss or gradient was not finite."""
        step, loss, grad_norm = self._bad.tolist()
        if step:
            raise NonFiniteError(int(step), loss, grad_norm)

    def read(self) -> tuple[float, float, int]:
        """(mean loss per target, last gradient norm, number of targets) since the last reading, which starts anew."""
        self.check()
        total, grad_norm = torch.stack([self._sum, self._grad_norm]).tolist()
        n_targets = self._n_targets
        self._sum, self._n_targets = torch.zeros_like(self._sum), 0
        return total / n_targets, grad_norm, n_targets
