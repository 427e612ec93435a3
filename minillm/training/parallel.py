"""How a training run is spread over ranks: the plan, and the engine that carries it out.

One process, `minillm.distributed`'s data parallelism and ZeRO (`minillm.training.engines`) and pipelines
(`minillm.training.pipeline_engine`), or PyTorch's DDP, FSDP2 (`minillm.training.torch_engines`) and pipelines
(`minillm.training.torch_pipeline_engine`): the loop does not know which.
"""

from __future__ import annotations

import torch
from torch import nn

from minillm.training.engines import Context, DataParallelEngine, Engine, MakeOptimizer, ZeroEngine
from minillm.training.pipeline_engine import PipelineEngine
from minillm.training.plan import ParallelPlan

__all__ = ["ParallelPlan", "make_engine"]


def make_engine(
    plan: ParallelPlan, model: nn.Module, make_optimizer: MakeOptimizer, device: torch.device, context: Context
) -> Engine:
    """What carries out the plan.

    Args:
        model: on any device; moved to `device`, or as much of it as this rank trains.
        make_optimizer: makes one for the parameters of the module that it is given, of the model or of a part of it.
        context: entered around each forward pass, for autocast.

    Raises:
        RuntimeError: there are not as many ranks as the plan has.
        ValueError: a model that cannot be divided so.
    """
    plan.check_ranks()
    if plan.pp > 1:
        if plan.engine == "torch":
            # Here, because its imports take seconds, as those of the other one.
            from minillm.training.torch_pipeline_engine import TorchPipelineEngine

            return TorchPipelineEngine(plan, model, make_optimizer, device, context)
        return PipelineEngine(plan, model, make_optimizer, device, context)
    model = model.to(device)
    if plan.dp == 1:
        return Engine(model, make_optimizer(model), context)
    if plan.engine == "torch":
        from minillm.training.torch_engines import make_torch_engine

        return make_torch_engine(plan.zero, model, make_optimizer, context)
    if plan.zero == 0:
        return DataParallelEngine(model, make_optimizer(model), context)
    return ZeroEngine(model, make_optimizer(model), context, plan.zero)
