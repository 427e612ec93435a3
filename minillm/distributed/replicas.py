"""The start of data parallelism: every rank holds the same model, with the values of the group's first rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.distributed.buckets import assign_buckets
from minillm.distributed.labels import annotate


def state_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that are part of the model's state, by name.

    Not those registered with ``persistent=False``: tables that a model works out itself, and that may grow with the
    longest sequence a rank has seen.
    """
    state = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in state}


def check_replicas(model: nn.Module, group: dist.ProcessGroup | None = None, *, settings: str = "") -> None:
    """Raise the same ValueError on every rank of the group unless all of them have brought the same model.

    Names, shapes, dtypes and order of the parameters must agree, which of them are frozen, and the buffers of the
    state. A collective: all ranks of the group call it. Without it, ranks with different models would add up unrelated
    gradients, or wait for each other for ever.

    Args:
        model: this rank's.
        group: None is the default group.
        settings: anything else in words that must be the same everywhere.

    Raises:
        ValueError: naming the first difference, the ranks (in the group) and what each of the two has.
    """
    own = [
        f"parameter {_described(name, p)}{'' if p.requires_grad else ', frozen'}"
        for name, p in model.named_parameters()
    ]
    own += [f"buffer {_described(name, buffer)}" for name, buffer in state_buffers(model).items()]
    own = [settings, *own, "the end"]
    with annotate("comparison of the models"):
        sent: list[list[str]] = [own]
        dist.broadcast_object_list(sent, group_src=0, group=group)
        first, n_ranks = sent[0], dist.get_world_size(group)
        same = [a == b for a, b in zip(first, own, strict=False)]
        where = same.index(False) if False in same else len(own)
        # The least (place, rank) over the ranks; one that has no difference says a place that nobody has.
        code = torch.tensor(
            where * n_ranks + dist.get_rank(group) if where < len(own) else torch.iinfo(torch.int64).max
        )
        code = code.to(_device(model))
        dist.all_reduce(code, op=dist.ReduceOp.MIN, group=group)
        if int(code) == torch.iinfo(torch.int64).max:
            return
        where, rank = divmod(int(code), n_ranks)
        other = [own[where] if rank == dist.get_rank(group) else ""]
        dist.broadcast_object_list(other, group_src=rank, group=group)
    raise ValueError(
        f"every rank must bring the same model: rank 0 has {first[where]!r} where rank {rank} has {other[0]!r}"
    )


@torch.no_grad()
def broadcast_from_first(
    tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None, *, bucket_bytes: int = 25 * 2**20
) -> None:
    """Give every rank the values that the group's first rank has in `tensors`, in place; of any dtypes, a collective.

    They travel as bytes, many in one message.
    """
    as_bytes = [tensor.detach().reshape(-1).view(torch.uint8) for tensor in tensors]
    for bucket in assign_buckets(as_bytes, bucket_bytes):
        flat = torch.cat([as_bytes[index] for index in bucket])
        dist.broadcast(flat, group_src=0, group=group)
        if dist.get_rank(group) != 0:
            for index, part in zip(
                bucket, torch.split(flat, [as_bytes[index].numel() for index in bucket]), strict=True
            ):
                tensor = tensors[index]
                tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))  # clone: aligned for the dtype


def _described(name: str, tensor: Tensor) -> str:
    return f"{name}: {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _device(model: nn.Module) -> torch.device:
    """Where collectives of this model run."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
