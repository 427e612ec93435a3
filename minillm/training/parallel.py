"""How a training run is spread over ranks: the plan, and the engine that carries it out.

One process, `minillm.distributed`'s data parallelism and ZeRO (`minillm.training.engines`), or PyTorch's DDP and FSDP2
(`minillm.training.torch_engines`): the loop does not know which.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from minillm.training.engines import Context, DataParallelEngine, Engine, MakeOptimizer, ZeroEngine

ENGINES = ("minillm", "torch")


@dataclass(frozen=True)
class ParallelPlan:
    """How many ranks share the work, and what they divide.

    Args:
        dp: data-parallel ranks; each computes its rows of every batch. 1 is one process.
        zero: what the ranks divide (Rajbhandari et al. 2020): 0 nothing, 1 the optimizer's state, 2 and the gradients,
            3 and the parameters.
        engine: "minillm" for `minillm.distributed`; "torch" for PyTorch's DistributedDataParallel (stage 0; with
            ZeroRedundancyOptimizer stage 1) and `fully_shard` (stage 2 without, stage 3 with resharding after forward).

    Raises:
        ValueError, TypeError: a value that is not allowed.
    """

    dp: int = 1
    zero: int = 0
    engine: str = "minillm"

    def __post_init__(self) -> None:
        for name, low, high in (("dp", 1, None), ("zero", 0, 3)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < low or (high is not None and value > high):
                raise ValueError(f"{name} must be {f'at least {low}' if high is None else f'0 to {high}'}, got {value}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.dp == 1 and (self.zero or self.engine != "minillm"):
            raise ValueError(f"zero={self.zero} and engine={self.engine!r} need more than one rank: dp is 1")

    def check_ranks(self) -> None:
        """Raise RuntimeError unless there is a process group of as many ranks as the plan has."""
        n_ranks = dist.get_world_size() if dist.is_initialized() else 1
        if n_ranks != self.dp:
            raise RuntimeError(
                f"dp={self.dp} needs {self.dp} ranks, and there {'is 1' if n_ranks == 1 else f'are {n_ranks}'}: "
                f"torchrun --standalone --nproc-per-node {self.dp} ..."
            )


def make_engine(
    plan: ParallelPlan, model: nn.Module, make_optimizer: MakeOptimizer, device: torch.device, context: Context
) -> Engine:
    """What carries out the plan.

    Args:
        model: of any device; moved to `device`, or as much of it as this rank trains.
        make_optimizer: makes one for the parameters of the module that it is given, of the model or of a part of it.
        context: entered around each forward pass, for autocast.

    Raises:
        RuntimeError: there are not as many ranks as the plan has.
    """
    plan.check_ranks()
    model = model.to(device)
    if plan.dp == 1:
        return Engine(model, make_optimizer(model), context)
    if plan.engine == "torch":
        # Here, because its imports take seconds.
        from minillm.training.torch_engines import make_torch_engine

        return make_torch_engine(plan.zero, model, make_optimizer, context)
    if plan.zero == 0:
        return DataParallelEngine(model, make_optimizer(model), context)
    return ZeroEngine(model, make_optimizer(model), context, plan.zero)
