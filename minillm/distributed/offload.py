"""ZeRO-Offload: optimizer state, master weights and the update on the host; the device keeps 16-bit parameters alone.

Ren et al. 2021, "ZeRO-Offload: Democratizing Billion-Scale Model Training" (arXiv 2101.06840). Of the 16 bytes a
parameter of mixed-precision Adam the device keeps 2. The cut is the one with the least traffic that keeps float32 off
the device (section 3): 2 bytes a parameter go to the host (gradients) and 2 come back (parameters) in each step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.distributed.labels import annotate
from minillm.distributed.offload_arguments import check_arguments, groups_of
from minillm.distributed.offload_bucket import OffloadBucket
from minillm.distributed.offload_link import Link
from minillm.distributed.offload_shipping import GradientShipping
from minillm.distributed.offload_state import StateOnHost
from minillm.distributed.offload_updates import HostUpdates
from minillm.distributed.owner import check_unclaimed, claim
from minillm.distributed.zero_mics import Ranks
from minillm.distributed.zero_optimizer import elementwise_state
from minillm.distributed.zero_units import cast_inputs, units_of


class Offload:
    """Train `model` with its optimizer on the host.

    ============================ ============================================================
    device, Psi parameters       2 Psi of parameters, and a bucket or two of gradients
    host, n ranks                12 Psi / n of master weights and Adam's moments, 2 Psi / n of gradients (4 Psi / n
                                 with delayed updates)
    link, a step                 2 Psi / n to the host and 2 Psi / n back
    ============================ ============================================================

    (16-bit parameters; each parameter's place in its bucket begins at a multiple of 16 bytes.) The model stays the
    user's own module and is changed in place::

        offload = Offload(model, CPUAdam(model.parameters(), lr=1e-4), parameter_dtype=torch.bfloat16)
        loss_of(model(batch)).backward()
        offload.clip_grad_norm_(1.0)
        offload.step()
        offload.zero_grad()
        ...
        offload.flush()

    During backward each gradient moves from `parameter.grad` to a buffer, and each full buffer to the host beside the
    rest of backward (section 4.1). `step` updates bucket by bucket: while one is updated, the one before goes back to
    the device. A step uses its gradients up: `zero_grad` is needed only to forget gradients without a step. Gradients
    of several backward passes before a step add up on the host; inside of `no_sync` they add up on the device instead,
    which saves traffic and costs 2 Psi there. A parameter that no rank's backward has reached is left as it is. What is
    written to a parameter by hand lasts until its next update: the master weights count.

    Over the n ranks of a group (section 4.2) each bucket is reduce-scattered before it leaves the device, as in ZeRO's
    stage 2. A rank's host holds and updates the n-th part, and the new parameters are gathered on the devices.

    **Delayed parameter update** (section 5.2): the first `delay_after` steps are ordinary. From then on `step` begins
    the update by its own gradients and returns; that goes on on the host beside the next forward and backward, and the
    next `step` fetches its result. With w_t the parameters that step t = 0, 1, ... computes its gradient with, g_t =
    gradient(w_t), U one update of the optimizer and k = delay_after:

        t < k     w_{t+1} = U(w_t, g_t)
        t = k     w_{t+1} = w_t
        t > k     w_{t+1} = U(w_t, g_{t-1})            parameters are one step behind

    `flush` ends it: w = U(w, g of the last step). Settings such as the learning rate are those at the call of the step
    whose gradient is used.

    Args:
        model: on one device.
        optimizer: an elementwise one over all trainable parameters. Its groups' settings may be changed between
            steps, also by a schedule; what it has learnt moves to the host. :class:`minillm.optim.CPUAdam` updates in
            one pass over 16-bit gradients and parameters; any other gets its gradients widened a bucket at a time.
        group: the ranks; None is the default group, or this process alone where there is none.
        bucket_bytes: gradients go off in buckets of about that many bytes.
        delay_after: delay updates from this step (counted from 0) on; None: never.
        reduction: "mean" averages gradients over ranks, "sum" sums them.
        parameter_dtype: compute in this dtype; floating inputs of the model are cast. None: in the parameters' own. The
            master weights are in float32 (float64 for parameters that are that) either way.
        link_bandwidth: bytes/s each way, for the virtual clock alone. PCIe 3.0 with 16 lanes has 16e9.
        host_speed: parameters updated a second, for the virtual clock alone. Adam moves 28 bytes a parameter: memory of
            100e9 bytes/s allows 3.5e9.

    Raises:
        ValueError, TypeError: an argument outside of what is said here, or an optimizer that is not elementwise.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        group: dist.ProcessGroup | None = None,
        bucket_bytes: int = 25 * 2**20,
        delay_after: int | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        parameter_dtype: torch.dtype | None = None,
        link_bandwidth: float = 16e9,
        host_speed: float = 3.5e9,
    ) -> None:
        check_arguments(bucket_bytes, delay_after, reduction, parameter_dtype, link_bandwidth, host_speed)
        group_of = groups_of(model, optimizer)
        check_unclaimed(model)
        if group is not None or dist.is_initialized():
            self.ranks = Ranks.of(group, None)
        else:
            self.ranks = Ranks(None, 0, 1, None, 0, 1)
        self.model, self.optimizer, self.delay_after = model, optimizer, delay_after
        self.steps = 0
        for tensor in (*(p for p in model.parameters() if not p.requires_grad), *model.buffers()):
            self.ranks.broadcast(tensor.data)
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        flats = [
            flat
            for unit in units_of(model, (), group_of, self.ranks, dtype=parameter_dtype, bucket_bytes=bucket_bytes)
            for flat in unit.flats
        ]
        self.link = Link(flats[0].full.device, link_bandwidth)
        scale = 1.0 / self.ranks.n_ranks if reduction == "mean" else 1.0
        self.buckets = [
            OffloadBucket(flat, self.link, optimizer, scale, f"bucket {number}") for number, flat in enumerate(flats)
        ]
        if parameter_dtype is not None:
            cast_inputs([model], parameter_dtype)
        self._shipping = GradientShipping(self.buckets, self.ranks)
        claim(model.parameters(), self._shipping, "Offload")
        self._updates = HostUpdates(self.buckets, host_speed)
        divided = elementwise_state(optimizer, self.buckets[0].master.dtype, torch.device("cpu"))
        self._state = StateOnHost(model, optimizer, self.buckets, self.ranks, divided)
        self._state.divide({names[p]: dict(state) for p, state in optimizer.state.items() if state})
        optimizer.state.clear()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups, whose "lr" and other settings may be set before every step."""
        return self.optimizer.param_groups

    @property
    def link_bytes(self) -> dict[str, int]:
        """Bytes that this rank's copies have moved so far, "to host" and "to device"."""
        return dict(self.link.sent.items())

    @property
    def device_bytes(self) -> int:
        """Bytes of trained parameters, and of gradients in buckets, that are on the device now."""
        gradients = sum(tensor.nbytes for tensor in self._shipping.gradients_on_device())
        return gradients + sum(bucket.flat.full.nbytes for bucket in self.buckets)

    @property
    def host_bytes(self) -> int:
        """Bytes of this rank's master weights, optimizer state (but for single numbers) and gradients on the host."""
        state = [tensor for bucket in self.buckets for tensor in bucket.optimizer_state()]
        return sum(tensor.nbytes for tensor in (*state, *self._gradients_on_host()))

    def _gradients_on_host(self) -> list[Tensor]:
        return self._updates.buffers() + [tensor for bucket in self.buckets for tensor in bucket.gradients_on_host()]

    def tensors_by_kind(self) -> dict[str, list[Tensor]]:
        """What :func:`minillm.distributed.measure_memory` asks for, on the device and on the host."""
        return {
            "gradients": [*self._shipping.gradients_on_device(), *self._gradients_on_host()],
            "optimizer state": [tensor for bucket in self.buckets for tensor in bucket.optimizer_state()],
        }

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here leave their gradients in `parameter.grad`; the next one outside sends the sum."""
        before, self._shipping.sync = self._shipping.sync, False
        try:
            yield
        finally:
            self._shipping.sync = before

    def zero_grad(self) -> None:
        """Forget the gradients that no step has used; a delayed update that is on its way stays so."""
        self._shipping.clear()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the gradients on the host so that their norm over all parameters is at most `max_norm`.

        It waits for all gradients, since no update may begin before the norm is known.

        Returns:
            A scalar on the host: the 2-norm of the whole model's gradient before, the same on all ranks.
            ``gradient *= min(1, max_norm / (norm + 1e-6))``, as `torch.nn.utils.clip_grad_norm_` does; float("inf")
            only measures.

        Raises:
            ValueError: a max_norm that is not above 0.
        """
        if not max_norm > 0:
            raise ValueError(f"max_norm must be above 0, got {max_norm!r}")
        self._shipping.finish()
        came = [bucket.gradient for bucket in self.buckets if bucket.gradient.holds]
        dtype = self.buckets[0].master.dtype
        square = torch.zeros((), dtype=dtype)
        for gradient in came:
            gradient.settle()
            square += torch.linalg.vector_norm(gradient.buffer, dtype=dtype).square()
        if self.ranks.n_parts > 1:
            on_device = square.to(self.link.device)
            with annotate("norm of the gradients"):
                dist.all_reduce(on_device, group=self.ranks.partition)
            square = on_device.cpu()
        norm = square.sqrt()
        if max_norm != float("inf"):
            coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
            for gradient in came:
                gradient.buffer.mul_(coefficient)
        return norm

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters by the gradients that came since the last step; delayed, those of the step before.

        Raises:
            RuntimeError: the last backward did not come to its end: `zero_grad` forgets it.
        """
        self._shipping.finish()
        self._shipping.agree_on_used()
        self.optimizer.step()  # it has no gradients: this tells schedules and hooks that a step was made
        self._updates.wait()
        for bucket in self.buckets:
            bucket.set_hyperparameters(self.param_groups)
        ready = [bucket for bucket in self.buckets if bucket.gradient.holds]
        if self.delay_after is not None and self.steps >= self.delay_after:
            self._updates.begin(ready)
        else:
            self._updates.make(ready)
        self.steps += 1

    @torch.no_grad()
    def flush(self) -> None:
        """Finish a delayed update, if one is under way: the model then has the parameters that the host has."""
        self._updates.flush()

    def state_dict(self) -> dict[str, Any]:
        """What one process would save, on the CPU; all ranks must call this, and each gets the whole.

        Returns:
            {"model": what `model.state_dict()` is, with the master weights as parameters, "optimizer": what
            `optimizer.state_dict()` is, "offload": {"steps": int, "shown": None}}. While a delayed update waits to be
            fetched "shown" holds the parameters, by name, that the model still computes with.
        """
        self._updates.wait()
        return self._state.give(self.steps, shown=self._updates.beside is not None)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave, in any number of ranks; all ranks must call this with the same.

        Without "offload" it may be the {"model": ..., "optimizer": ...} of one process, or of
        :class:`minillm.distributed.Zero`.

        Raises:
            ValueError: something is missing, or of another shape.
        """
        self._updates.forget()
        self.zero_grad()
        self.link.synchronize()  # the host's buffers are about to be written to
        self._state.load(state)
        own = state.get("offload", {"steps": self.steps, "shown": None})
        self.steps = own["steps"]
        if own["shown"] is not None:
            self._updates.show_later()
            self._state.show(own["shown"])
