"""Training a model that has experts: their losses, the biases that balance them, and how even their load is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from minillm.layers.moe import MixtureOfExperts, MoERecord
from minillm.layers.routers import SigmoidRouter
from minillm.models.transformer import Transformer


class MixtureTraining:
    """What a training loop does for the experts of a model; nothing for a model that has none.

    Between two updates the records of all forward passes are summed up, on the device. `after_update` then moves the
    biases of sigmoid routers (DeepSeek-AI 2024, "DeepSeek-V3", section 2.1.2), for which accumulated batches count as
    one.

    Args:
        model: a `minillm.models.Transformer`, or any module, which then has no experts to care for.
        forward: calls the model, perhaps compiled.
    """

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._mixtures: list[MixtureOfExperts] = model.mixtures() if isinstance(model, Transformer) else []
        self._assigned: list[Tensor] = []  # of this update, by layer
        self._worked: list[Tensor] = []  # since the last reading, by layer
        self._seen: list[Tensor] = []  # assignments before any was dropped
        self._added: list[Tensor] = []

    def forward(self, tokens: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Logits, and where there are experts the sum of their losses: what `accumulate_gradients` takes."""
        if not self._mixtures:
            logits: Tensor = self._forward(tokens)
            return logits
        logits, records = self._forward(tokens, return_records=True)
        added = torch.stack([loss for record in records for loss in record.losses.values()] or [logits.new_zeros(())])
        self._gather(records, added.sum().detach())
        return logits, added.sum()

    @torch.no_grad()
    def _gather(self, records: list[MoERecord], added: Tensor) -> None:
        assigned = [record.routing.assigned for record in records]
        worked = [record.load for record in records]
        self._assigned = _plus(self._assigned, assigned)
        self._seen, self._worked = _plus(self._seen, assigned), _plus(self._worked, worked)
        self._added.append(added)

    def after_update(self) -> None:
        """Move the biases of the routers that have them, by the load of this update."""
        for mixture, assigned in zip(self._mixtures, self._assigned, strict=False):
            if isinstance(mixture.router, SigmoidRouter):
                mixture.router.update_bias(assigned)
        self._assigned = []

    def read(self) -> dict[str, float]:
        """The figures since the last reading, which starts anew; empty without experts.

        - router_loss: the mean of what was added to the loss.
        - load_imbalance: the largest load of an expert over the mean, in the layer where that is worst; 1 is even.
        - drop_rate: the fraction of assignments for which there was no room.
        """
        if not self._added:
            return {}
        assigned, worked = torch.stack(self._seen), torch.stack(self._worked)  # (n_layers, n_experts)
        figures = {
            "router_loss": torch.stack(self._added).mean().item(),
            "load_imbalance": (assigned.amax(1) / assigned.float().mean(1).clamp(min=1e-9)).max().item(),
            "drop_rate": 1.0 - worked.sum().item() / max(assigned.sum().item(), 1),
        }
        self._seen, self._worked, self._added = [], [], []
        return figures


def _plus(sums: list[Tensor], numbers: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(sums, numbers, strict=True)] if sums else numbers
