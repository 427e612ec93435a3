"""Flat buckets: many small tensors, such as gradients, travel in one message, because every message costs its latency.

A collective of b bytes takes about ``latency + b / bandwidth`` seconds. A gradient a message pays the latency once a
parameter; one message for all of them cannot start before the last gradient is there. Buckets of some megabytes lie
between (Li et al. 2020, "PyTorch Distributed", section 3.2.2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


def assign_buckets(
    tensors: Sequence[Tensor], bucket_bytes: int, *, first_bucket_bytes: int | None = None
) -> list[list[int]]:
    """Which tensors travel together, in the order in which the buckets are full when the tensors come in order.

    A bucket is closed as soon as it holds `bucket_bytes` or more, so that it exceeds them by less than its last tensor;
    tensors of different dtypes or devices go to different buckets. DDP divides its parameters by the same rule.

    Args:
        tensors: in the order in which they become ready.
        bucket_bytes: bytes, at least 1.
        first_bucket_bytes: the same for the first bucket of each dtype, which a small size lets start early;
            None: `bucket_bytes`.

    Returns:
        Indices into `tensors`: each index stands in exactly one bucket, in increasing order.
    """
    for name, limit in (("bucket_bytes", bucket_bytes), ("first_bucket_bytes", first_bucket_bytes)):
        if limit is not None and limit < 1:
            raise ValueError(f"{name} must be at least 1 byte, got {limit}")
    first = bucket_bytes if first_bucket_bytes is None else first_bucket_bytes
    closed: list[list[int]] = []
    filling: dict[tuple[torch.dtype, torch.device], tuple[list[int], int]] = {}
    limits: dict[tuple[torch.dtype, torch.device], int] = {}
    for index, tensor in enumerate(tensors):
        kind = (tensor.dtype, tensor.device)
        bucket, held = filling.pop(kind, ([], 0))
        bucket.append(index)
        held += tensor.numel() * tensor.element_size()
        if held >= limits.get(kind, first):
            closed.append(bucket)
            limits[kind] = bucket_bytes
        else:
            filling[kind] = (bucket, held)
    closed += [bucket for bucket, _ in filling.values()]
    return sorted(closed, key=lambda bucket: bucket[-1])


class GradientBucket:
    """Gradients of some parameters, one behind the other in one flat tensor that a collective reduces in place.

    The flat tensor is made when the first gradient comes. Once reduced, each gradient's place in it becomes
    ``parameter.grad``: nothing is copied back, and the memory lives as long as the gradients do.

    Args:
        parameters: of one dtype and device, in the order in which they lie in the bucket.

    Attributes:
        parameters: as given.
        flat: (n_elements,) of the parameters' dtype, from the first `fill` up to `release`; None otherwise.
        missing: how many parameters have not been filled in.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        sizes = [parameter.numel() for parameter in self.parameters]
        self._starts = [sum(sizes[:place]) for place in range(len(sizes))]
        self.n_elements = sum(sizes)
        self.release()

    def release(self) -> None:
        """Forget the flat tensor; gradients that lie in it keep it alive."""
        self.flat: Tensor | None = None
        self._places: list[Tensor | None] = [None] * len(self.parameters)
        self.missing = len(self.parameters)

    def filled(self, place: int) -> bool:
        """Whether the parameter at this place is filled in."""
        return self._places[place] is not None

    @torch.no_grad()
    def fill(self, place: int, scale: float) -> None:
        """Write ``scale * parameter.grad`` to its place, zeros where there is no gradient."""
        parameter = self.parameters[place]
        if self.flat is None:
            self.flat = torch.empty(self.n_elements, dtype=parameter.dtype, device=parameter.device)
        if parameter.is_contiguous() or not _dense(parameter):
            view = self.flat[self._starts[place] :][: parameter.numel()].view(parameter.shape)
        else:
            view = self.flat.as_strided(parameter.shape, parameter.stride(), self._starts[place])
        if parameter.grad is None:
            view.zero_()
        else:
            torch.mul(parameter.grad, scale, out=view)
        self.missing -= self._places[place] is None
        self._places[place] = view

    def place(self, place: int) -> Tensor:
        """A view of `flat` in the parameter's shape, with its strides where these are dense; `fill` it first."""
        view = self._places[place]
        assert view is not None
        return view


@torch.no_grad()
def all_reduce_gradients(
    parameters: Sequence[nn.Parameter],
    group: dist.ProcessGroup | None,
    *,
    mean: bool,
    bucket_bytes: int = 25 * 2**20,
) -> None:
    """Make each ``parameter.grad`` the mean or sum over the ranks of a group, after all backward passes; a collective.

    Args:
        parameters: the same on every rank, in the same order; frozen ones are left out. One without a gradient takes
            part with zeros.
    """
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    scale = 1.0 / dist.get_world_size(group) if mean else 1.0
    for members in assign_buckets(learning, bucket_bytes):
        bucket = GradientBucket([learning[index] for index in members])
        for place in range(len(members)):
            bucket.fill(place, scale)
        assert bucket.flat is not None
        dist.all_reduce(bucket.flat, group=group)
        for place, parameter in enumerate(bucket.parameters):
            parameter.grad = bucket.place(place)


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one stretch of memory without gaps or overlaps, in whatever order of the dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
