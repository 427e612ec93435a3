"""What a training loop asks of a way to train on one or several ranks, and `minillm.distributed`'s answers.

The ranks read the same batches, each computes its rows, and the update is that of one process with the whole batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.distributed import DataParallel, Zero
from minillm.training.checkpoint import Checkpoint
from minillm.training.loss import Batch, accumulate_gradients, count_targets, mean_loss
from minillm.training.state import (
    SavedState,
    model_tensors,
    optimizer_tensors,
    parameter_names,
    plain_optimizer_state,
    saved_state,
)

Context = Callable[[], contextlib.AbstractContextManager[object]]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Engine:
    """One process; the others override what is different for them.

    Attributes:
        model: what is trained on this rank, on its device.
        optimizer: its `param_groups` may be given another "lr" before each step.
        context: entered around each forward pass, for autocast.
        forward: calls the model in training. What stands around the model there (a compiler, the watch over its
            experts) is put here.
        backward_factor: what a loss is to be multiplied by before its backward pass.
    """

    rank, n_ranks = 0, 1
    backward_factor = 1.0

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, context: Context) -> None:
        self.model, self.optimizer, self.context = model, optimizer, context
        self.device = next(model.parameters()).device
        self.forward: Callable[..., Any] = model

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups."""
        return self.optimizer.param_groups

    def own_rows(self, batch: Batch) -> Batch:
        """This rank's rows of a batch; fewer ranks than others may get one less, or none."""
        inputs, targets = batch
        return inputs.tensor_split(self.n_ranks)[self.rank], targets.tensor_split(self.n_ranks)[self.rank]

    def add_gradients(self, batches: Sequence[Batch]) -> tuple[Tensor, int]:
        """Add to the gradients that of the mean loss over all targets of all batches: see `accumulate_gradients`.

        Returns:
            (loss, n_targets): the mean loss over all ranks' rows, on each, and the number of targets in them.
        """
        loss, n_targets = accumulate_gradients(
            self.forward,
            [self.own_rows(batch) for batch in batches],
            self.device,
            self.context,
            n_targets=count_targets(batches),
            accumulating=self.accumulating,
            backward_factor=self.backward_factor,
        )
        return self.sum(loss), n_targets

    def mean_loss(self, batches: Iterable[Batch]) -> float:
        """The mean loss over all targets of the batches, on each rank; the model is in evaluation mode already."""
        own = map(self.own_rows, batches)
        return mean_loss(self.model, own, self.device, self.context, total_over_ranks=self.sum)

    def accumulating(self) -> contextlib.AbstractContextManager[object]:
        """To be entered around the forward and backward passes of a step but the last."""
        return contextlib.nullcontext()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, on each; in place."""
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag

    def barrier(self) -> None:
        """Wait for all ranks."""

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradient to a norm of at most `max_norm`; returns the norm that it had."""
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def step(self) -> None:
        """Update the parameters."""
        self.optimizer.step()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def saved_state(self) -> SavedState | None:
        """What a checkpoint holds of the model and the optimizer, as one process would have it; None but on rank 0."""
        return saved_state(self.model, self.optimizer) if self.rank == 0 else None

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take up the model and the optimizer of a checkpoint, from whatever number of ranks."""
        checkpoint.restore(self.model, self.optimizer)


class ParallelEngine(Engine):
    """What all ways to train on several ranks have in common."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, context: Context) -> None:
        super().__init__(model, optimizer, context)
        self.rank, self.n_ranks = dist.get_rank(), dist.get_world_size()

    def sum(self, tensor: Tensor) -> Tensor:
        """See `Engine`."""
        dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """See `Engine`."""
        return bool(self.sum(torch.tensor(int(flag), device=self.device)))

    def barrier(self) -> None:
        """See `Engine`."""
        self.any(False)


class PlainLayout:
    """The names that a model and its optimizer have in one process, kept from before their tensors are divided."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        _, self._tied = model_tensors(model)
        self.names = parameter_names(optimizer, model)
        self._groups = optimizer.state_dict()["param_groups"]

    def saved(self, model: Mapping[str, Tensor], optimizer: Mapping[int, Mapping[str, Any]]) -> SavedState:
        """What a checkpoint holds, from a whole model's state dict and the part "state" of an optimizer's."""
        tensors = {name: tensor.contiguous() for name, tensor in model.items() if name not in self._tied}
        return SavedState(tensors, self._tied, *optimizer_tensors(optimizer, self.names))

    def optimizer_state(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """The optimizer's state dict of a checkpoint, with the hyperparameters of now."""
        scalars = checkpoint.state["optimizer_scalars"]
        state = plain_optimizer_state(self.names, checkpoint.optimizer, scalars)
        return {"state": state, "param_groups": self._groups}


class DataParallelEngine(ParallelEngine):
    """`minillm.distributed.DataParallel`."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, context: Context) -> None:
        super().__init__(model, optimizer, context)
        self._wrapped = DataParallel(model, reduction="sum")
        self.forward = self._wrapped

    def accumulating(self) -> contextlib.AbstractContextManager[object]:
        """See `Engine`."""
        return self._wrapped.no_sync()


class ZeroEngine(ParallelEngine):
    """`minillm.distributed.Zero`."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, context: Context, stage: Any) -> None:
        super().__init__(model, optimizer, context)
        self._plain = PlainLayout(model, optimizer)
        self._zero = Zero(model, optimizer, stage=stage, reduction="sum")

    def accumulating(self) -> contextlib.AbstractContextManager[object]:
        """See `Engine`."""
        return self._zero.no_sync()

    def clip(self, max_norm: float) -> Tensor:
        """See `Engine`."""
        return self._zero.clip_grad_norm_(max_norm)

    def step(self) -> None:
        """See `Engine`."""
        self._zero.step()

    def zero_grad(self) -> None:
        """See `Engine`."""
        self._zero.zero_grad()

    def saved_state(self) -> SavedState | None:
        """See `Engine`."""
        whole = self._zero.state_dict()
        return self._plain.saved(whole["model"], whole["optimizer"]["state"]) if whole else None

    def restore(self, checkpoint: Checkpoint) -> None:
        """See `Engine`."""
        self._zero.load_state_dict(
            {"model": checkpoint.model_state(), "optimizer": self._plain.optimizer_state(checkpoint)}
        )
