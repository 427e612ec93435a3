"""Tensors that travel together, as one message of bytes, and how a model's are shared out to several places."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minillm.distributed.point_to_point import plain


class Part:
    """Some tensors of one device, of any shapes and dtypes, whose numbers travel as one message.

    Attributes:
        tensors: the widest dtype first: so each begins at a multiple of its own width.
        n_bytes: of the message.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = sorted(tensors, key=lambda tensor: -tensor.element_size())
        self.n_bytes = sum(tensor.nbytes for tensor in tensors)

    def buffer(self) -> Tensor:
        """uint8 (n_bytes,): room for a message."""
        return torch.empty(self.n_bytes, dtype=torch.uint8, device=self.tensors[0].device)

    def pack(self, values: Sequence[Tensor]) -> Tensor:
        """uint8 (n_bytes,): a copy of these values, which are of the shapes and dtypes of `tensors`."""
        return torch.cat([plain("tensor", value).view(-1).view(torch.uint8) for value in values])

    def views(self, message: Tensor) -> list[Tensor]:
        """What a message holds for each of `tensors`, in its shape and dtype; no copies."""
        pieces = torch.split(message, [tensor.nbytes for tensor in self.tensors])
        return [piece.view(tensor.dtype).view(tensor.shape) for piece, tensor in zip(pieces, self.tensors, strict=True)]


def share_out(tensors: Sequence[Tensor], n_parts: int) -> list[Part]:
    """Whole tensors in parts of about the same number of bytes: the largest first, each to the part that has least.

    The same on every rank that has tensors of the same sizes in the same order.

    Raises:
        ValueError: fewer tensors than parts.
    """
    if len(tensors) < n_parts:
        raise ValueError(f"n_parts must be at most the {len(tensors)} tensors that there are, got {n_parts}")
    parts: list[list[Tensor]] = [[tensor] for tensor in sorted(tensors, key=lambda tensor: -tensor.nbytes)]
    parts, rest = parts[:n_parts], parts[n_parts:]
    for (tensor,) in rest:
        min(parts, key=lambda part: sum(kept.nbytes for kept in part)).append(tensor)
    return [Part(part) for part in parts]
