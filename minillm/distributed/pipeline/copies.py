"""Parameters that stand on several stages: tied embeddings, and pieces that pipelines in two directions have twice.

Each stage adds up the gradient of its own passes; what the parameter is trained with is the sum over the stages.
(Narayanan et al. 2021, "Efficient Large-Scale Language Model Training", section 3, on the embedding's two copies.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.distributed.buckets import GradientBucket, assign_buckets
from minillm.distributed.labels import annotate
from minillm.distributed.pipeline.schedule import Schedule

Shared = Sequence[Sequence[tuple[int, str]]]
"""Groups of (piece, parameter name) that are one parameter."""

_BUCKET_BYTES = 25 * 2**20  # of gradients in one message


class Copies:
    """This stage's parameters that other stages have, too.

    Args:
        schedule: says which stages hold which pieces.
        modules: piece -> module, of this stage.
        shared: the parameters that stand in several pieces.
        stage: this one; rank `stage` of `group`.

    Raises:
        ValueError: a name that is no parameter of its piece, or pieces of one stage that hold copies of a parameter
            where it must be one.
    """

    def __init__(
        self,
        schedule: Schedule,
        modules: Mapping[int, nn.Module],
        shared: Shared,
        stage: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self._stage, self._group = stage, group
        held = [set(pieces) for pieces in schedule.pieces]
        self._by_holders: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)  # in the same order everywhere
        tied = {key for keys in shared for key in keys}
        for keys in shared:
            holders = tuple(i for i, pieces in enumerate(held) if any(piece in pieces for piece, _ in keys))
            own = {id(p): p for piece, name in keys if piece in modules for p in [_parameter(modules, piece, name)]}
            if len(own) > 1:
                raise ValueError(
                    f"stage {stage} holds {_names(keys)}, which are one parameter: give it pieces that share it, "
                    "as split() makes them"
                )
            self._note(holders, own.values())
        for piece in range(schedule.n_pieces):
            holders = tuple(i for i, pieces in enumerate(held) if piece in pieces)
            if len(holders) > 1 and piece in modules:
                names = [name for name, _ in modules[piece].named_parameters()]
                self._note(holders, [modules[piece].get_parameter(n) for n in names if (piece, n) not in tied])

    def _note(self, holders: tuple[int, ...], parameters: Sequence[nn.Parameter] | object) -> None:
        if len(holders) > 1 and self._stage in holders:
            self._by_holders[holders] += parameters  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._by_holders)

    def counted_elsewhere(self) -> set[nn.Parameter]:
        """Those that a norm over all stages counts on an earlier one."""
        return {p for holders, found in self._by_holders.items() if self._stage != holders[0] for p in found}

    def leave_to_first(self) -> None:
        """Drop the sums that earlier steps left on all stages but the first: the next sum would count them again."""
        for parameter in self.counted_elsewhere():
            parameter.grad = None

    @torch.no_grad()
    def make_equal(self) -> None:
        """Give every copy the values of the first stage that holds it."""
        for holders, parameters in sorted(self._by_holders.items()):
            for parameter in parameters:
                if self._stage == holders[0]:
                    for work in [self._send(parameter.data, other) for other in holders[1:]]:
                        work.wait()
                else:
                    buffer = torch.empty_like(parameter, memory_format=torch.contiguous_format)
                    self._receive(buffer, holders[0]).wait()
                    parameter.copy_(buffer)

    @torch.no_grad()
    def add_up(self) -> None:
        """Give every copy the sum of all copies' gradients: the same bits on each, as all add in the stages' order."""
        for holders, found in sorted(self._by_holders.items()):
            learning = [parameter for parameter in found if parameter.requires_grad]
            for members in assign_buckets(learning, _BUCKET_BYTES):
                bucket = GradientBucket([learning[index] for index in members])
                for place in range(len(members)):
                    bucket.fill(place, 1.0)
                own = bucket.flat  # (n,)
                assert own is not None
                theirs = {i: torch.empty_like(own) for i in holders if i != self._stage}
                with annotate("gradients of copies"):
                    works = [
                        self._receive(theirs[i], i) if receives else self._send(own, i)
                        for i in theirs
                        # One of two that exchange sends first: NCCL carries out what two ranks do in its order.
                        for receives in ((False, True) if self._stage < i else (True, False))
                    ]
                    for work in works:
                        work.wait()
                parts = [own if i == self._stage else theirs[i] for i in holders]
                own.copy_(sum(parts[1:], parts[0]))
                for place, parameter in enumerate(bucket.parameters):
                    parameter.grad = bucket.place(place)

    def _send(self, tensor: Tensor, stage: int) -> dist.Work:
        work = dist.isend(tensor.contiguous(), group=self._group, group_dst=stage)
        assert work is not None
        return work

    def _receive(self, tensor: Tensor, stage: int) -> dist.Work:
        work = dist.irecv(tensor, group=self._group, group_src=stage)
        assert work is not None
        return work


def _parameter(modules: Mapping[int, nn.Module], piece: int, name: str) -> nn.Parameter:
    try:
        return modules[piece].get_parameter(name)
    except AttributeError:
        raise ValueError(f"shared names {name!r} of piece {piece}, which has no such parameter") from None


def _names(keys: Sequence[tuple[int, str]]) -> str:
    return " and ".join(f"{name} of piece {piece}" for piece, name in keys)
