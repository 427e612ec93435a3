"""Training a model that has experts: their losses, the biases that balance them, and how even their load is."""

from __future__ import annotations

import warnings
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
        model: a `minillm.models.Transformer`, or any module. Of another module's experts nothing is known here: it gets
            a warning.
        forward: calls the model, perhaps compiled, perhaps as one of several ranks.
        total_over_ranks: sums a tensor over the ranks, in place: all of them count as one batch.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        total_over_ranks: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self._forward, self._total = forward, total_over_ranks
        self._mixtures: list[MixtureOfExperts] = model.mixtures() if isinstance(model, Transformer) else []
        unseen = sum(isinstance(module, MixtureOfExperts) for module in model.modules())
        if unseen and not self._mixtures:
            text = f"the model's {unseen} layers of experts train without their losses and biases: it is no Transformer"
            warnings.warn(text, stacklevel=3)
        self.restart()

    def restart(self) -> None:
        """Forget what was gathered."""
        self._assigned: list[Tensor] = []  # of this update, by layer
        self._seen: list[Tensor] = []  # since the last reading, by layer
        self._worked: list[Tensor] = []  # those of them that were not dropped
        self._tokens: list[Tensor] = []  # (tokens, tokens that no expert worked on)
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
        counts = [record.experts_per_token for record in records]
        tokens = [torch.stack([torch.ones_like(count).sum(), (count == 0).sum()]) for count in counts]
        self._tokens = _plus(self._tokens, tokens)
        self._added.append(added)

    def after_update(self) -> None:
        """Move the biases of the routers that have them, by the load of this update: of all layers that share one."""
        loads: dict[SigmoidRouter, Tensor] = {}
        for mixture, own in zip(self._mixtures, self._assigned, strict=False):
            router = mixture.router
            if isinstance(router, SigmoidRouter):
                assigned = self._total(own.clone())
                loads[router] = loads[router] + assigned if router in loads else assigned
        for router, assigned in loads.items():
            router.update_bias(assigned)
        self._assigned = []

    def read(self) -> dict[str, float]:
        """The figures since the last reading, which starts anew; empty without experts.

        - router_loss: the mean of what was added to the loss.
        - max_over_mean: the largest load of an expert over the mean, in the layer where that is worst; 1 is even.
        - drop_rate: the fraction of assignments for which there was no room.
        - tokens_without_expert: the fraction of tokens that no expert worked on, in the layer where that is worst: all
          their choices were dropped, or, in expert choice, nobody chose them.
        """
        if not self._added:
            return {}
        loads = [self._total(seen.clone()) for seen in self._seen]
        shares = torch.stack([load.max() / load.float().mean().clamp(min=1e-9) for load in loads])
        assigned = torch.stack([load.sum() for load in loads]).sum()
        worked = self._total(torch.stack([load.sum() for load in self._worked]).sum())
        tokens, without = self._total(torch.stack(self._tokens)).unbind(1)  # (n_layers,) each
        added = torch.stack(self._added)
        passes, router_loss = self._total(torch.stack([torch.ones_like(added), added]).float().sum(1))
        figures = {
            "router_loss": router_loss / passes,
            "max_over_mean": shares.max(),
            "drop_rate": 1.0 - worked / assigned.clamp(min=1),
            "tokens_without_expert": (without / tokens.clamp(min=1)).max(),
        }
        self._seen, self._worked, self._tokens, self._added = [], [], [], []
        return dict(zip(figures, torch.stack(list(figures.values())).tolist(), strict=True))  # one wait for the device


def _plus(sums: list[Tensor], numbers: list[Tensor]) -> list[Tensor]:
    return [a + b for a, b in zip(sums, numbers, strict=True)] if sums else numbers
