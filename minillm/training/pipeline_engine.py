"""A training run whose model is cut into stages, one on each rank: `minillm.distributed.pipeline` under the loop.

Each rank keeps its own pieces of the model and their part of the optimizer; a checkpoint is put together on rank 0 and
is that of one process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.distributed import init_mesh
from minillm.distributed.pipeline.pipeline import Pipeline
from minillm.training.checkpoint import Checkpoint
from minillm.training.engines import Context, MakeOptimizer, ParallelEngine
from minillm.training.loss import IGNORED, Batch, count_targets, summed_cross_entropy, to_device
from minillm.training.plan import ParallelPlan
from minillm.training.state import SavedState, model_tensors, optimizer_tensors, plain_optimizer_state


class PipelineEngine(ParallelEngine):
    """`minillm.distributed.pipeline.Pipeline`, with the pieces of a rank and the way to a whole checkpoint and back.

    Args:
        plan: as many stages as `pp`, in each of `dp` pipelines.
        model: on any device. The rank's own pieces are moved to `device`; of the parameters of the others only the
            shapes stay, on the meta device.
        make_optimizer, context: see `minillm.training.parallel.make_engine`.
    """

    def __init__(
        self,
        plan: ParallelPlan,
        model: nn.Module,
        make_optimizer: MakeOptimizer,
        device: torch.device,
        context: Context,
    ) -> None:
        parts = plan.split(model)
        mesh = init_mesh(pp=plan.pp, dp=plan.dp)
        self._plan, self._schedule, self._shared = plan, plan.make_schedule(), parts.shared
        self._stage, self._replica = mesh.coordinate["pp"], mesh.coordinate["dp"]
        self._group, self._data_group = mesh.group("pp"), mesh.group("dp") if plan.dp > 1 else None
        tensors, self._tied = model_tensors(model)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self._pieces = [parts.pieces[piece].to(device) for piece in self._schedule.pieces[self._stage]]
        own = nn.ModuleList(self._pieces)
        super().__init__(own, make_optimizer(own), context)
        kept = {
            id(parameter): self._tied.get(name, name)
            for piece in self._pieces
            for name, parameter in piece.named_parameters()
        }
        self._names = [kept[id(parameter)] for group in self.param_groups for parameter in group["params"]]
        self._n_targets = 1
        self._pipeline = Pipeline(
            parts,
            self._schedule,
            lambda logits, targets: summed_cross_entropy(logits, targets) / self._n_targets,
            group=self._group,
            data_group=self._data_group,
            reduction="sum",
            context=context,
        )
        _release(model, own)

    def add_gradients(self, batches: Sequence[Batch]) -> tuple[Tensor, int]:
        """See `Engine`."""
        self._n_targets = count_targets(batches)
        if self._n_targets == 0:
            raise ValueError(f"no target to learn from: every target of {len(batches)} batches is {IGNORED}")
        for inputs, _ in batches:
            self._plan.check_rows(inputs.size(0))
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(batches, start=1):
            with self.accumulating() if number < len(batches) else contextlib.nullcontext():
                total += self._learn(*self._micro_batches(batch))
        return total, self._n_targets

    def _learn(self, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Add the gradients of micro-batches to those that are there; the sum of the loss over all pipelines' targets,
        over `_n_targets`."""
        return self._pipeline.step(inputs, targets)

    def mean_loss(self, batches: Iterable[Batch]) -> float:
        """See `Engine`."""
        total, n_targets, self._n_targets = 0.0, 0, 1
        for batch in batches:
            n_targets += count_targets([batch])
            if batch[0].size(0):
                total += float(self._pipeline.evaluate(*self._micro_batches(batch)))
        if n_targets == 0:
            raise ValueError("no target to evaluate on: the batches are empty")
        return total / n_targets

    def _micro_batches(self, batch: Batch) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """(inputs, targets) of this rank's rows in micro-batches of equal sizes.

        Rows that are missing at the end of an evaluation are made up by rows of which no target counts.
        """
        inputs, targets = batch
        n = self._plan.n_micro_batches
        missing = -inputs.size(0) % (self._plan.dp * n)
        if missing:
            inputs = torch.cat([inputs, inputs[:1].expand(missing, -1)])
            targets = torch.cat([targets, torch.full_like(targets[:1], IGNORED).expand(missing, -1)])
        own = (inputs.chunk(self._plan.dp)[self._replica], targets.chunk(self._plan.dp)[self._replica])
        inputs, targets = to_device(own, self.device)
        return inputs.chunk(n), targets.chunk(n)

    def accumulating(self) -> contextlib.AbstractContextManager[object]:
        """See `Engine`."""
        return self._pipeline.no_sync()

    def clip(self, max_norm: float) -> Tensor:
        """See `Engine`."""
        return self._pipeline.clip_grad_norm_(max_norm).float()

    def saved_state(self) -> SavedState | None:
        """See `Engine`."""
        if self._replica:
            return None
        moments, scalars = optimizer_tensors(self.optimizer.state_dict()["state"], self._names)
        own = {("model", name): tensor for name, tensor in self._own_tensors() if name not in self._tied}
        own |= {("optimizer", name): tensor for name, tensor in moments.items()}
        whole, all_scalars = _gathered(own, scalars, self._group, self.device)
        if self.rank:
            return None
        found: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for (kind, name), tensor in whole.items():
            found[kind][name] = tensor
        return SavedState(found["model"], self._tied, found["optimizer"], all_scalars)

    def restore(self, checkpoint: Checkpoint) -> None:
        """See `Engine`."""
        shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.model.items()}
        if shapes != self._shapes:
            names = sorted(name for name, _ in shapes.items() ^ self._shapes.items())
            raise ValueError(f"{checkpoint.path} is a checkpoint of another model: it differs in {', '.join(names)}")
        state = checkpoint.model_state()
        for piece in self._pieces:
            piece.load_state_dict({name: state[name] for name in piece.state_dict()})
        own = set(self._names)
        moments, scalars = (
            {name: value for name, value in values.items() if name.rpartition("/")[0] in own}
            for values in (checkpoint.optimizer, checkpoint.state["optimizer_scalars"])
        )
        plain = plain_optimizer_state(self._names, moments, scalars)
        self.optimizer.load_state_dict({"state": plain, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _own_tensors(self) -> Iterator[tuple[str, Tensor]]:
        for piece in self._pieces:
            for name, tensor in piece.state_dict().items():
                yield name, tensor.detach()


def _release(model: nn.Module, kept: nn.Module) -> None:
    """Leave no more than the shape of every parameter of the model that is not one of `kept`."""
    own = set(map(id, kept.parameters()))
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in own:
                shape = torch.empty_like(parameter, device="meta")
                setattr(module, name, nn.Parameter(shape, requires_grad=parameter.requires_grad))


def _gathered(
    own: Mapping[tuple[str, str], Tensor],
    scalars: Mapping[str, object],
    group: dist.ProcessGroup,
    device: torch.device,
) -> tuple[dict[tuple[str, str], Tensor], dict[str, object]]:
    """On the group's first rank all ranks' tensors and scalars by name, each from the first rank that has one of the
    name; nothing of the others' on other ranks. One tensor at a time goes through the device's memory."""
    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    described: list[tuple[list[tuple[tuple[str, str], torch.dtype, torch.Size]], dict[str, object]]]
    described = [([], {})] * n_ranks
    shapes = [(name, tensor.dtype, tensor.shape) for name, tensor in own.items()]
    dist.all_gather_object(described, (shapes, dict(scalars)), group=group)
    whole, all_scalars = dict(own), dict(scalars)
    seen = {name for name, _, _ in described[0][0]}
    for source, (theirs, their_scalars) in enumerate(described[1:], start=1):
        all_scalars = their_scalars | all_scalars
        for name, dtype, shape in theirs:
            if name in seen:
                continue
            seen.add(name)
            if rank == source:
                dist.send(own[name].to(device).contiguous(), group=group, group_dst=0)
            elif rank == 0:
                buffer = torch.empty(shape, dtype=dtype, device=device)
                dist.recv(buffer, group=group, group_src=source)
                whole[name] = buffer.cpu()
    return whole, all_scalars
