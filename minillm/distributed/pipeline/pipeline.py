"""The executor: runs a schedule on real or simulated ranks, one rank a stage.

It reads the same lists as the picture, the validator and the simulator, and does what they say: each rank goes through
its own list, and waits for nothing but the message that a pass needs.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.distributed.buckets import all_reduce_gradients
from minillm.distributed.labels import annotate
from minillm.distributed.pipeline.actions import Kind
from minillm.distributed.pipeline.chunk import Chunk
from minillm.distributed.pipeline.copies import Copies, Shared
from minillm.distributed.pipeline.durations import Durations
from minillm.distributed.pipeline.meeting import Pieces, agree, check_settings, own_pieces, stage_of
from minillm.distributed.pipeline.schedule import Schedule
from minillm.distributed.pipeline.transport import Transport
from minillm.distributed.pipeline.walk import Walk
from minillm.distributed.pipeline.weight_versions import WeightVersions
from minillm.distributed.replicas import broadcast_from_first, check_replicas


class Pipeline:
    """A model in pieces, one or several on each rank, that micro-batches pass as a schedule says.

        pipeline = Pipeline(split(model, schedule.n_pieces), schedule, loss_fn)
        optimizer = torch.optim.AdamW(pipeline.parameters())

        loss = pipeline.step(inputs, targets)         # forward and backward passes of all micro-batches
        pipeline.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()

    Making one is a collective of `group`, and of `data_group`: the ranks check that they mean the same, and copies of a
    parameter get the values of the first rank that has it.

    Args:
        pieces: of the whole model (a `Split`, or a sequence of modules), of which this rank keeps its own; or piece
            number -> module, those of this rank alone. A piece takes a tensor, or several, and gives a tensor or a
            tuple of them.
        schedule: what each stage does; rank i of `group` is stage i.
        loss_fn: (output of the last piece, targets of a micro-batch) -> scalar. Parameters of its own would get
            gradients on the last rank alone, and are in no norm and no sum: what learns belongs into a piece.
        group: the ranks of this pipeline; None is the default group.
        data_group: the ranks that hold this stage in pipelines beside this one, each with its own part of the batch.
        reduction: "mean": `loss_fn` is a mean over the rows of its micro-batch, so micro-batches count by their rows,
            and ranks of `data_group` count alike. "sum": losses are added as they are, over micro-batches and over
            `data_group`; where not all targets count, `loss_fn` divides by their number in the whole batch.
        recompute: keep only what each forward pass was given, and run it again before its backward pass. For each stage
            to say: the first ones have the most in flight.
        optimizer: of an asynchronous schedule, over `parameters()` of this rank; the schedule's updates are its steps.
        shared: parameters that stand in several pieces, each as its (piece, name) in all of them. Told by themselves
            where `pieces` is the whole model.
        durations: on simulated ranks, how long each pass takes on the virtual clock.
        context: entered around each forward pass and its loss, such as ``partial(torch.autocast, "cpu")``.

    Raises:
        ValueError, TypeError: on all ranks alike: pieces that are not the schedule's, ranks that were given different
            schedules, a group that has not as many ranks as the schedule has stages, an asynchronous schedule without
            an optimizer or with parameters that stand on several stages.
        RuntimeError: there is no process group.

    Attributes:
        schedule: as given.
        stage: this rank's number in `group`.
        modules: this rank's pieces, by chunk.
        losses: float64 (n_micro_batches,), of the last step: what each micro-batch adds to the loss, on every rank.
    """

    def __init__(
        self,
        pieces: Pieces,
        schedule: Schedule,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        group: dist.ProcessGroup | None = None,
        data_group: dist.ProcessGroup | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        recompute: bool = False,
        optimizer: torch.optim.Optimizer | None = None,
        shared: Shared = (),
        durations: Durations | None = None,
        context: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction must be 'mean' or 'sum', got {reduction!r}")
        self.stage = stage_of(schedule, group)
        problem: ValueError | TypeError | None = None
        try:
            held, shared = own_pieces(pieces, schedule, self.stage, shared)
            check_settings(schedule, held, shared, optimizer)
            self._copies = Copies(schedule, held, shared, self.stage, group)
        except (ValueError, TypeError) as error:
            problem = error
        agree(schedule, f"reduction={reduction!r}", problem, group)
        self.schedule = schedule
        self.modules = [held[piece] for piece in schedule.pieces[self.stage]]
        self._parameters = list(dict.fromkeys(p for module in self.modules for p in module.parameters()))
        self._device = _device(self.modules, group)
        self._mean, self._optimizer = reduction == "mean", optimizer
        self._group, self._data_group = group, data_group
        if data_group is not None:
            for module in self.modules:
                check_replicas(module, data_group)
                broadcast_from_first([*module.parameters(), *module.buffers()], data_group)
        self._copies.make_equal()
        versions = [None if schedule.synchronous else self._versions(module) for module in self.modules]
        weight_passes = [a for a in schedule.actions[self.stage] if a.kind is Kind.BACKWARD_WEIGHT]
        split = [{a.micro_batch for a in weight_passes if a.chunk == chunk} for chunk in range(len(held))]
        chunks = [
            Chunk(module, recompute=recompute, split=own_split, context=context, versions=own)
            for module, own_split, own in zip(self.modules, split, versions, strict=True)
        ]
        # Gradients on their way: more of them wait for the slowest neighbour to have received the oldest.
        transport = Transport(group, self._device, most_sends=2 * schedule.n_stages)
        self._walk = Walk(
            schedule, self.stage, chunks, transport, loss_fn, mean=self._mean, durations=durations, update=self._update
        )
        self._synchronise, self._waiting = True, False
        self.losses = torch.zeros(schedule.n_micro_batches, dtype=torch.float64, device=self._device)

    @property
    def n_stages(self) -> int:
        """How many ranks the pipeline has."""
        return self.schedule.n_stages

    def parameters(self) -> Iterator[nn.Parameter]:
        """This rank's parameters, each once: what its optimizer is to be given."""
        return iter(self._parameters)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, a step only adds to this rank's gradients; the next step outside sums them over copies and over
        `data_group`. For all steps of an accumulation but the last.

        Raises:
            RuntimeError: the schedule is asynchronous.
        """
        self._refuse_updates("no_sync is for steps that only add up gradients")
        self._synchronise = False
        try:
            yield
        finally:
            self._synchronise = True

    def step(self, inputs: Any = None, targets: Any = None) -> Tensor:
        """Forward and backward passes of a batch; gradients are added to ``.grad``, to the sums of steps before.

        Where a schedule splits backward passes, hooks on the weights of linear layers are not called: their gradients
        are made outside of autograd (`minillm.distributed.pipeline.deferred`).

        An asynchronous schedule makes its updates too: for it the micro-batches are a stream of batches, and gradients
        that were there before count in its first update.

        Args:
            inputs: (batch, ...), to be cut into micro-batches of equal sizes; or a sequence of micro-batches of any
                sizes, each a tensor or a tuple of tensors. Needed on the ranks that hold the first piece.
            targets: the same for the loss. Needed on the ranks that hold the last piece.

        Returns:
            The loss of the whole batch, on every rank: float64, detached. Of an asynchronous schedule the mean over its
            updates.

        Raises:
            ValueError, TypeError: a batch that cannot be cut, or is missing where it is needed; a loss that is no
                scalar; a piece that gives something else than tensors.
            RuntimeError: an earlier step broke off on this rank, beside others that went on.
        """
        if self.schedule.synchronous and not self._waiting:
            self._count_once()
        self._waiting = not self._synchronise
        self._walk.run(inputs, targets, self._device, training=True)
        if self.schedule.synchronous and self._synchronise:
            self._copies.add_up()
            self._sum_over_data_group()
        return self._total_loss()

    def evaluate(self, inputs: Any = None, targets: Any = None) -> Tensor:
        """The loss of a batch, on every rank, without gradients; arguments and result as those of `step`.

        Modules stay in the mode that they are in: ``eval()`` is for the caller to say.
        """
        self._walk.run(inputs, targets, self._device, training=False)
        return self._total_loss()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients so that their norm over the whole model is at most `max_norm`; returns what it was.

        A parameter that stands on several stages counts once. A collective of `group`.

        Raises:
            RuntimeError: the schedule is asynchronous.
        """
        self._refuse_updates("clip_grad_norm_ comes too late")
        learning = [parameter for parameter in self._parameters if parameter.grad is not None]
        elsewhere = self._copies.counted_elsewhere()
        own = [parameter.grad for parameter in learning if parameter not in elsewhere]
        square = nn.utils.get_total_norm([grad for grad in own if grad is not None]).to(self._device).double() ** 2
        dist.all_reduce(square, group=self._group)
        norm = square.sqrt()
        nn.utils.clip_grads_with_norm_(learning, max_norm, norm)
        return norm

    def _refuse_updates(self, reason: str) -> None:
        if not self.schedule.synchronous:
            raise RuntimeError(f"{reason}: {self.schedule.name} makes its updates inside of step()")

    def _versions(self, module: nn.Module) -> WeightVersions:
        backwards = (a for a in self.schedule.actions[self.stage] if a.kind is Kind.BACKWARD)
        return WeightVersions(module, Counter(a.version for a in backwards), stashing=self.schedule.stashing)

    def _update(self, chunk: Chunk) -> None:
        assert chunk.versions is not None
        assert self._optimizer is not None
        self._sum_over_data_group()
        chunk.versions.update()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def _count_once(self) -> None:
        """Let one rank alone keep a sum that earlier steps have left on several: the next sum then counts it once."""
        self._copies.leave_to_first()
        if self._data_group is not None and not self._mean and dist.get_rank(self._data_group):
            for parameter in self._parameters:
                parameter.grad = None

    def _sum_over_data_group(self) -> None:
        if self._data_group is not None:
            with annotate("gradients"):
                all_reduce_gradients(self._parameters, self._data_group, mean=self._mean)

    def _total_loss(self) -> Tensor:
        """The loss of the whole batch; `losses` then are the same on every rank."""
        self.losses = self._walk.losses
        with annotate("losses"):
            dist.all_reduce(self.losses, group=self._group)
            if self._data_group is not None:
                dist.all_reduce(self.losses, group=self._data_group)
                if self._mean:
                    self.losses /= dist.get_world_size(self._data_group)
        return self.losses.sum() / self._walk.n_updates


def _device(modules: Sequence[nn.Module], group: dist.ProcessGroup | None) -> torch.device:
    """Where this rank's pieces are; of those that hold nothing, where the group's tensors must be."""
    held = (tensor for module in modules for tensor in [*module.parameters(), *module.buffers()])
    cuda = "nccl" in dist.get_backend_config(group)
    return next(
        (t.device for t in held), torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    )
