"""The plan of a training run carried out by PyTorch: DistributedDataParallel and `fully_shard` (FSDP2).

For runs that want the production version, and to hold `minillm.distributed` against: both give the loss curve of one
process. PyTorch averages gradients over ranks where the loop wants their sum, hence the `backward_factor`.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from minillm.training.checkpoint import Checkpoint
from minillm.training.engines import Context, MakeOptimizer, ParallelEngine, PlainLayout
from minillm.training.state import SavedState

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class DDPEngine(ParallelEngine):
    """`DistributedDataParallel`; with `divide` the optimizer's state is divided by `ZeroRedundancyOptimizer`."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, context: Context, divide: bool) -> None:
        self._plain = PlainLayout(model, optimizer)
        if divide:
            optimizer = ZeroRedundancyOptimizer(
                optimizer.param_groups, optimizer_class=type(optimizer), **optimizer.defaults
            )
        super().__init__(model, optimizer, context)
        self._wrapped = DistributedDataParallel(model)
        self.forward = self._wrapped
        self.backward_factor = float(self.n_ranks)

    def accumulating(self) -> contextlib.AbstractContextManager[object]:
        """See `Engine`."""
        context: contextlib.AbstractContextManager[object] = self._wrapped.no_sync()
        return context

    def saved_state(self) -> SavedState | None:
        """See `Engine`."""
        if isinstance(self.optimizer, ZeroRedundancyOptimizer):
            self.optimizer.consolidate_state_dict(0)
        if self.rank != 0:
            return None
        return self._plain.saved(self.model.state_dict(), self.optimizer.state_dict()["state"])

    def restore(self, checkpoint: Checkpoint) -> None:
        """See `Engine`."""
        checkpoint.restore(self.model)
        self.optimizer.load_state_dict(self._plain.optimizer_state(checkpoint))


class FSDPEngine(ParallelEngine):
    """`fully_shard` of each block and of the rest; parameters are gathered again for the backward pass, or kept."""

    def __init__(self, model: nn.Module, make_optimizer: MakeOptimizer, context: Context, reshard: bool) -> None:
        self._plain = PlainLayout(model, make_optimizer(model))
        blocks = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
        for block in blocks:
            fully_shard(block, reshard_after_forward=reshard)
        fully_shard(model, reshard_after_forward=reshard)
        super().__init__(model, make_optimizer(model), context)
        self._sharded: Any = model
        assert isinstance(model, FSDPModule)
        self.backward_factor = float(self.n_ranks)

    @contextlib.contextmanager
    def _unsynchronised(self) -> Any:
        self._sharded.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._sharded.set_requires_gradient_sync(True)

    def accumulating(self) -> contextlib.AbstractContextManager[object]:
        """See `Engine`."""
        context: contextlib.AbstractContextManager[object] = self._unsynchronised()
        return context

    def clip(self, max_norm: float) -> Tensor:
        """See `Engine`."""
        norm = super().clip(max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def saved_state(self) -> SavedState | None:
        """See `Engine`."""
        model: dict[str, Any] = get_model_state_dict(self.model, options=_WHOLE)
        optimizer: dict[str, Any] = get_optimizer_state_dict(self.model, self.optimizer, options=_WHOLE)
        if self.rank != 0:
            return None
        state = {index: optimizer["state"][name] for index, name in enumerate(self._plain.names)}
        return self._plain.saved(model, state)

    def restore(self, checkpoint: Checkpoint) -> None:
        """See `Engine`."""
        model: dict[str, Any] = dict(checkpoint.model_state())
        set_model_state_dict(self.model, model, options=_WHOLE)
        plain = self._plain.optimizer_state(checkpoint)
        names = self._plain.names
        by_name: dict[str, Any] = {
            "state": {names[index]: values for index, values in plain["state"].items()},
            "param_groups": [
                {**group, "params": [names[i] for i in group["params"]]} for group in plain["param_groups"]
            ],
        }
        set_optimizer_state_dict(self.model, self.optimizer, by_name, options=_WHOLE)


def make_torch_engine(stage: int, model: nn.Module, make_optimizer: MakeOptimizer, context: Context) -> ParallelEngine:
    """The engine of a stage: see `minillm.training.parallel.ParallelPlan`."""
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, 0)  # fully_shard takes each rank's own part, from whatever that rank has
    if stage < 2:
        return DDPEngine(model, make_optimizer(model), context, divide=stage == 1)
    return FSDPEngine(model, make_optimizer, context, reshard=stage == 3)
