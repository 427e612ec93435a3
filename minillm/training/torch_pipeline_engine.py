"""A pipeline carried out by PyTorch: the schedules of `torch.distributed.pipelining` under the training loop.

For runs that want the production version, and to hold `minillm.distributed.pipeline` against: both give the loss curve
of one process. The forward and backward passes of training are PyTorch's. What it leaves to its users is done here or
by `minillm.distributed`: parameters that several stages share, data parallelism beside the pipeline, the norm over all
stages, the loss on every rank; and evaluation, which its V-shaped schedule cannot do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, schedules

from minillm.distributed.buckets import all_reduce_gradients
from minillm.distributed.pipeline.copies import Copies
from minillm.training.engines import Context, MakeOptimizer
from minillm.training.loss import Batch, summed_cross_entropy
from minillm.training.pipeline_engine import PipelineEngine
from minillm.training.plan import TORCH_SCHEDULES, ParallelPlan


class TorchPipelineEngine(PipelineEngine):
    """`torch.distributed.pipelining`; arguments as those of `PipelineEngine`."""

    def __init__(
        self,
        plan: ParallelPlan,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        device: torch.device,
        context: Context,
    ) -> None:
        super().__init__(plan, model, make_optimizer, device, context)
        self._class: Any = getattr(schedules, TORCH_SCHEDULES[plan.schedule])
        held = dict(zip(self._schedule.pieces[self._stage], self._pieces, strict=True))
        self._copies = Copies(self._schedule, held, self._shared, self._stage, self._group)
        self._modules = {number: _InContext(piece, context) for number, piece in held.items()}
        self._made: dict[torch.Size, Any] = {}

    def accumulating(self) -> contextlib.AbstractContextManager[object]:
        """See `Engine`."""
        return contextlib.nullcontext()

    def add_gradients(self, batches: Sequence[Batch]) -> tuple[Tensor, int]:
        """See `Engine`."""
        loss, n_targets = super().add_gradients(batches)
        self._copies.add_up()
        if self._data_group is not None:
            all_reduce_gradients(list(self.model.parameters()), self._data_group, mean=False)
        return loss, n_targets

    def _learn(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """See `PipelineEngine`."""
        schedule = self._made_for(inputs[0].shape)
        losses: list[Tensor] = []
        given = [torch.cat(list(inputs))] if 0 in self._modules else []
        ends: dict[str, Any] = {}
        if self._schedule.n_pieces - 1 in self._modules:
            ends = {"target": torch.cat(list(targets)), "losses": losses}
        schedule.step(*given, **ends)
        total = torch.zeros((), device=self.device)
        for loss in losses:
            total += loss.detach()
        return self.sum(total)

    def _made_for(self, shape: torch.Size) -> Any:
        """PyTorch's schedule for micro-batches of one shape: it does not take others once it has seen some."""
        if shape not in self._made:
            stages = [
                PipelineStage(module, number, self._schedule.n_pieces, self.device, group=self._group)
                for number, module in self._modules.items()
            ]
            single = issubclass(self._class, schedules.PipelineScheduleSingle)
            self._made[shape] = self._class(
                stages[0] if single else stages, self._plan.n_micro_batches, loss_fn=self._loss, scale_grads=False
            )
        return self._made[shape]

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        with self.context():
            return summed_cross_entropy(logits, targets) / self._n_targets


class _InContext(nn.Module):
    def __init__(self, module: nn.Module, context: Context) -> None:
        super().__init__()
        self.module, self.context = module, context

    def forward(self, *inputs: Tensor) -> Any:
        with self.context():
            return self.module(*inputs)
