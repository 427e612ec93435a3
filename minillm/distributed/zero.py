"""ZeRO: data parallelism whose ranks divide the training state instead of each holding all of it.

Rajbhandari, Rasley, Ruwase, He 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", section 5.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.distributed.labels import annotate
from minillm.distributed.owner import check_unclaimed, claim
from minillm.distributed.zero_blocks import BlockGatherer
from minillm.distributed.zero_gradients import FlatGradients, GradientDivider
from minillm.distributed.zero_loading import load
from minillm.distributed.zero_mics import Ranks
from minillm.distributed.zero_optimizer import ShardedOptimizer
from minillm.distributed.zero_shards import FlatParameters
from minillm.distributed.zero_state import StateSaver
from minillm.distributed.zero_units import Unit, blocks_of, cast_inputs, units_of


class Zero:
    """Train `model` over the ranks of a group, each of which holds the n-th part of the training state.

    ===== ============================= ================================ =====================================
    stage divided over the n ranks      bytes a rank, Psi parameters     elements sent a step, times (n-1)/n
    ===== ============================= ================================ =====================================
    1     optimizer state and master    4 Psi + 12 Psi / n               2 Psi
    2     and gradients                 2 Psi + 14 Psi / n               2 Psi
    3     and parameters                16 Psi / n                       3 Psi (2 Psi without resharding)
    ===== ============================= ================================ =====================================

    (bf16 parameters and gradients with an fp32 master copy and Adam: the paper's 2 + 2 + 12 bytes.)

    The model stays the user's own module and is changed in place; so is the optimizer, which from here on updates this
    rank's part only. A training step is::

        loss = loss_of(model(batch))
        loss.backward()
        zero.clip_grad_norm_(1.0)
        zero.step()
        zero.zero_grad()

    All ranks begin with the first rank's parameters and buffers, and without gradients. They run the same modules in
    the same order and do the same number of backward passes. Gradients are in no `parameter.grad`: a hook takes them
    away; a parameter that no loss depends on has the gradient zero. What is frozen when this is made stays so.

    Args:
        model: holds all parameters, on every rank.
        optimizer: any elementwise one, made over `model.parameters()`; each of its groups keeps its own settings.
        stage: 1, 2 or 3.
        group: the ranks that divide the state; None is all.
        replicate_group: the ranks of other groups that hold the same part (:func:`minillm.distributed.mics_groups`).
        blocks: stage 3 gathers the parameters of one of these modules at a time; None: the elements of the model's
            `nn.ModuleList`s. What is in none or in several of them is gathered for the whole of `model.forward`.
        reshard_after_forward: free a block's parameters after its forward and gather them again for its backward.
        prefetch: start the gather of the next block before the work of this one.
        parameter_dtype: compute in this dtype, with a master copy of the parameters in float32 in the part; floating
            inputs of the model and of the blocks are cast. None: compute in the parameters' own.
        reduction: "mean" averages gradients over ranks; "sum" sums them, for losses that each rank has divided by the
            number of targets of all ranks.
        bucket_bytes: stages 1 and 2 send gradients off in buckets of about that many bytes.

    Raises:
        ValueError, TypeError: an argument outside of what is said here, with the reason; a model that is wrapped
            already; an optimizer that is not elementwise.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        stage: Literal[1, 2, 3],
        group: dist.ProcessGroup | None = None,
        replicate_group: dist.ProcessGroup | None = None,
        blocks: Iterable[nn.Module] | None = None,
        reshard_after_forward: bool = True,
        prefetch: bool = True,
        parameter_dtype: torch.dtype | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        bucket_bytes: int = 25 * 2**20,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
        if isinstance(stage, bool) or stage not in (1, 2, 3):
            raise ValueError(f"stage must be 1, 2 or 3, got {stage!r}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f'reduction must be "mean" or "sum", got {reduction!r}')
        if isinstance(bucket_bytes, bool) or not isinstance(bucket_bytes, int) or bucket_bytes < 1:
            raise ValueError(f"bucket_bytes must be an int of at least 1, got {bucket_bytes!r}")
        if parameter_dtype is not None and not parameter_dtype.is_floating_point:
            raise ValueError(f"parameter_dtype must be None or a floating dtype, got {parameter_dtype}")
        check_unclaimed(model)
        self.model, self.stage = model, stage
        self.ranks = Ranks.of(group, replicate_group)
        self._optimizer = ShardedOptimizer(optimizer, model)
        modules = blocks_of(model, blocks)
        self.units: list[Unit] = units_of(
            model,
            modules,
            self._optimizer.group_of,
            self.ranks,
            dtype=parameter_dtype,
            bucket_bytes=None if stage == 3 else bucket_bytes,
        )
        self._sharded = {place.parameter for flat in self._flats for place in flat.places}
        for tensor in (*(p for p in model.parameters() if p not in self._sharded), *model.buffers()):
            self.ranks.broadcast(tensor.data)
        for parameter in model.parameters():
            parameter.grad = None
        scale = 1.0 / self.ranks.n_ranks if reduction == "mean" else 1.0
        for unit in self.units:
            unit.gradients = [
                FlatGradients(flat, keep_own=stage == 1, scale=scale, label=unit.name)
                for flat in unit.flats
                if flat.trainable
            ]
        self._reducer = GradientDivider(
            [gradients for unit in self.units for gradients in unit.gradients], stage=stage, in_turn=stage < 3
        )
        claim(model.parameters(), self._reducer, "Zero")
        self._saver = StateSaver(self._entries, self._optimizer, self._flats)
        learnt = self._optimizer.take(self._flats)
        for flat in self._flats:
            self._optimizer.divide(flat, learnt)
        if parameter_dtype is not None:
            cast_inputs([model, *modules], parameter_dtype)
        self._gatherer: BlockGatherer | None = None
        if stage == 3:
            self._gatherer = BlockGatherer(
                model, self.units, self._reducer, reshard_after_forward=reshard_after_forward, prefetch=prefetch
            )

    @property
    def _flats(self) -> list[FlatParameters]:
        return [flat for unit in self.units for flat in unit.flats]

    def _entries(self) -> dict[str, Any]:
        with nullcontext() if self._gatherer is None else self._gatherer.unguarded():
            return self.model.state_dict(keep_vars=True)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, whose "lr" and other settings may be set before every step."""
        return self._optimizer.optimizer.param_groups

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("a Zero belongs to its model and its process group: save state_dict(), and make another one")

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here are not the last of their step: what can wait for that one does.

        Stage 1: nothing is sent. Stages 2 and 3: gradients are reduce-scattered inside the group all the same, because
        a rank has no room for all of its own; the sum over the replicas waits.
        """
        before, self._reducer.sync = self._reducer.sync, False
        try:
            yield
        finally:
            self._reducer.sync = before

    def zero_grad(self) -> None:
        """Forget all gradients."""
        self._reducer.clear()
        for _, segment in self._segments():
            segment.grad = None

    def _segments(self) -> Iterator[tuple[Tensor | None, nn.Parameter]]:
        """Each segment of the optimizer and its gradient, in the dtype of computing."""
        for bucket in self._reducer.buckets:
            for segment in bucket.flat.segments:
                yield None if bucket.reduced is None else bucket.reduced[segment.in_part], segment.parameter

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients so that their norm over all parameters is at most `max_norm`.

        Returns:
            A scalar on the parameters' device: the 2-norm of the gradient of the whole model before scaling, each
            parameter counted once, the same on all ranks. ``gradient *= min(1, max_norm / (norm + 1e-6))``, as
            `torch.nn.utils.clip_grad_norm_` does. float("inf") only measures.

        Raises:
            ValueError: a max_norm that is not above 0.
        """
        if not max_norm > 0:
            raise ValueError(f"max_norm must be above 0, got {max_norm!r}")
        self._reducer.finish()
        reduced = [bucket.reduced for bucket in self._reducer.buckets if bucket.reduced is not None]
        master = self._flats[0].master
        dtype = torch.promote_types(master.dtype, torch.float32)
        norms = [torch.linalg.vector_norm(part, dtype=dtype) for part in reduced]
        square = torch.stack(norms).square().sum() if norms else master.new_zeros((), dtype=dtype)
        if self.ranks.n_parts > 1:
            with annotate("norm of the gradients"):
                dist.all_reduce(square, group=self.ranks.partition)
        norm = square.sqrt()
        if max_norm != float("inf"):
            factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            for part in reduced:
                part.mul_(factor)
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """Update this rank's part, then in stages 1 and 2 fetch the parts of the others.

        Raises:
            ValueError: a parameter has been frozen, or trained, that was not when this was made.
            RuntimeError: the last backward did not come to its end: `zero_grad` forgets it.
        """
        for flat in self._flats:
            for place in flat.places:
                if place.parameter.requires_grad != flat.trainable:
                    raise ValueError(f"requires_grad of {place.name} must be what it was when Zero was made")
        if self._gatherer is not None:
            self._gatherer.free_all()
        self._reducer.finish()
        for gradient, segment in self._segments():
            # With a master copy the gradient is in its dtype for the time of the update only.
            segment.grad = None if gradient is None else gradient.to(segment.dtype)
        self._optimizer.optimizer.step()
        for gradient, segment in self._segments():
            if gradient is not None and gradient.dtype != segment.dtype:
                segment.grad = None
        self._publish()

    def _publish(self) -> None:
        with annotate("parameters"):
            gathers = [flat.publish() for flat in self._flats if flat.trainable]
        for gather in gathers:
            if gather is not None:
                gather.wait()
        # A graph from before must notice, as with any optimizer, that the parameters are others now.
        torch.autograd.graph.increment_version(list(self._optimizer.group_of))

    @contextmanager
    @torch.no_grad()
    def gathered(self, *, write: bool = False) -> Iterator[None]:
        """In here every parameter of the model holds all its numbers, whatever the stage; all ranks must enter.

        `model.state_dict()`, generation, pictures of weights, ...; without this stage 3 refuses `model.state_dict()`.

        Args:
            write: take what has been written to the parameters over into the parts (and master copies) when leaving;
                all ranks must have written the same. Without it stage 3 forgets it.
        """
        if self._gatherer is not None:
            self._gatherer.hold_all()
        try:
            yield
            if write:
                for flat in self._flats:
                    flat.read_full()
        finally:
            if self._gatherer is not None:
                self._gatherer.release_all()

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of every trainable parameter that has one, over all ranks, by name; all ranks must call this."""
        self._reducer.finish()
        found: dict[str, Tensor] = {}
        for bucket in self._reducer.buckets:
            if bucket.reduced is not None:
                full = bucket.flat.assemble(bucket.reduced)
                for place in bucket.flat.places:
                    found[place.name] = full[place.start : place.stop].view(place.shape).clone()
        return found

    def tensors_by_kind(self) -> dict[str, list[Tensor]]:
        """What this rank holds, for :func:`minillm.distributed.measure_memory`; master copies are optimizer state."""
        masters = [flat.master for flat in self._flats if flat.master is not flat.shard]
        states = self._optimizer.optimizer.state.values()
        learnt = [value for state in states for value in state.values() if isinstance(value, Tensor)]
        return {
            "parameters": [tensor for flat in self._flats for tensor in (flat.full, flat.shard)],
            "gradients": [tensor for bucket in self._reducer.buckets for tensor in bucket.held()],
            "optimizer state": [*masters, *learnt],
        }

    def state_dict(self, *, full: bool = True, everywhere: bool = False) -> dict[str, Any]:
        """The parameters and the optimizer's state; all ranks must call this.

        Args:
            full: gather the whole: {"model": ..., "optimizer": ...}, what `model.state_dict()` and
                `optimizer.state_dict()` of one process are, on the CPU, parameters in the master's dtype. Else
                this rank's part: {"tensors": {name: tensor}, "metadata": {...}}, tensors for safetensors and metadata
                for JSON.
            everywhere: give the whole to every rank; else to the first, and {} to others.
        """
        return self._saver.whole(everywhere) if full else self._saver.part()

    def load_state_dict(self, state: Any) -> None:
        """Take over what :meth:`state_dict` gave, in this or in another number of ranks; all ranks must call this.

        Args:
            state: the whole, on every rank or on the first rank only ({} on others), or of one process: {"model":
                model.state_dict(), "optimizer": optimizer.state_dict()}. Or parts: all of them, in a list, from any
                number of ranks; or this rank's own, if it was saved in the same number of ranks.

        Raises:
            ValueError: something is missing, or of another shape, in words.
        """
        if self._gatherer is not None:
            self._gatherer.free_all()
        self.zero_grad()
        load(state, self._entries(), self._optimizer, self._flats, self.ranks)
        self._publish()
