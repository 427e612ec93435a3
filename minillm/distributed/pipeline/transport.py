"""Activations and their gradients on their way between the stages of a pipeline.

What two stages exchange stands in the same order in both of their lists, so messages need no names. The receiver of an
activation must know its shape before it comes: the first time that micro-batches of some shapes pass, each message has
a header before it, and later ones do not. The first stage says at the start of a run which shapes they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from minillm.distributed.labels import annotate
from minillm.distributed.pipeline.actions import Action

Tensors = tuple[Tensor, ...]
_Layout = tuple[tuple[torch.dtype, tuple[int, ...]], ...]

# Of a header, in which a dtype is a number.
_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip


class Transport:
    """Sends that do not stop the sender, receives that are posted before they are needed.

    Args:
        group: rank i is stage i.
        device: where tensors come to.
        most_sends: so many gradients may be on their way before a send waits for the oldest.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, most_sends: int) -> None:
        self._group, self._device, self._most = group, device, most_sends
        self._known: dict[int, dict[Action, _Layout]] = {}  # signature -> what each receive brings
        self._signatures: dict[Hashable, int] = {}  # of the first stage: shapes of micro-batches -> signature
        self._layouts: dict[Action, _Layout] = {}
        self._headers = True
        self._coming: dict[Action, list[tuple[Tensor, dist.Work]]] = {}
        self._going: deque[tuple[Tensor, dist.Work]] = deque()
        self._activations: dict[Action, list[tuple[Tensor, dist.Work]]] = {}

    def begin(self, shapes: Hashable | None, source: int) -> None:
        """Start a run: `source` is the stage that knows the micro-batches' shapes, where `shapes` is not None.

        A collective of the group.
        """
        signature = torch.zeros(1, dtype=torch.int64, device=self._device)
        if shapes is not None:
            signature += self._signatures.setdefault(shapes, len(self._signatures))
        with annotate("shapes of the micro-batches"):
            dist.broadcast(signature, group_src=source, group=self._group)
        number = int(signature)
        self._headers = number not in self._known
        self._layouts = self._known.get(number, {})
        self._number = number

    def finish(self) -> None:
        """End a run: what was sent has arrived."""
        for _, work in [*self._going, *(pair for pairs in self._activations.values() for pair in pairs)]:
            work.wait()
        self._going.clear()
        self._activations.clear()
        self._known[self._number] = self._layouts

    def send_activation(self, action: Action, tensors: Tensors, stage: int) -> None:
        """Send what a forward pass gave; `arrived` with the same action lets go of it."""
        for tensor in tensors:
            if tensor.dtype not in _DTYPES:
                raise TypeError(
                    f"{action} cannot send {tensor.dtype}: a piece gives one of {', '.join(map(str, _DTYPES))}"
                )
        layout = tuple((tensor.dtype, tuple(tensor.shape)) for tensor in tensors)
        if layout != self._layouts.setdefault(action, layout):
            raise ValueError(
                f"{action} must bring {self._layouts[action]}, as it did for inputs of these shapes before, and got "
                f"{layout}: what a piece gives must depend on the shapes of the inputs alone"
            )
        if self._headers:
            numbers = [len(tensors)]
            for tensor in tensors:
                numbers += [_DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape]
            for header in ([len(numbers)], numbers):
                self._going.append(self._post(torch.tensor(header, device=self._device), stage, "shape"))
        self._activations[action] = [self._post(tensor, stage, str(action)) for tensor in tensors]

    def arrived(self, action: Action) -> None:
        """What was sent has been received, as its gradient has come: this waits no longer than that message takes."""
        for _, work in self._activations.pop(action, ()):
            work.wait()

    def send_gradient(self, action: Action, tensors: Tensors, stage: int) -> None:
        """Send the gradients of what a pass was given."""
        self._going.extend(self._post(tensor, stage, str(action)) for tensor in tensors)
        while len(self._going) > self._most:
            self._going.popleft()[1].wait()

    def post_activation(self, action: Action, stage: int) -> None:
        """Be ready to receive what another stage's forward pass gives."""
        if self._headers:
            length = self._receive(torch.empty(1, dtype=torch.int64, device=self._device), stage)
            numbers = self._receive(torch.empty(int(length), dtype=torch.int64, device=self._device), stage).tolist()
            self._layouts[action] = _layout(numbers)
        self.post(action, [self._empty(*layout) for layout in self._layouts[action]], stage)

    def post(self, action: Action, buffers: Sequence[Tensor], stage: int) -> None:
        """Be ready to receive tensors like `buffers`, into them."""
        self._coming[action] = [(buffer, self._irecv(buffer, stage)) for buffer in buffers]

    def received(self, action: Action) -> Tensors:
        """What was posted, once it is there."""
        pairs = self._coming.pop(action)
        for _, work in pairs:
            work.wait()
        return tuple(buffer for buffer, _ in pairs)

    def _empty(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _post(self, tensor: Tensor, stage: int, label: str) -> tuple[Tensor, dist.Work]:
        tensor = tensor.detach().contiguous()
        with annotate(label):
            work = dist.isend(tensor, group=self._group, group_dst=stage)
        assert work is not None
        return tensor, work

    def _irecv(self, buffer: Tensor, stage: int) -> dist.Work:
        work = dist.irecv(buffer, group=self._group, group_src=stage)
        assert work is not None
        return work

    def _receive(self, buffer: Tensor, stage: int) -> Tensor:
        self._irecv(buffer, stage).wait()
        return buffer


def _layout(numbers: Sequence[int]) -> _Layout:
    """Read a header: how many tensors, and of each dtype, number of dimensions and sizes."""
    layout, at = [], 1
    for _ in range(numbers[0]):
        dtype, n_dims = numbers[at : at + 2]
        layout.append((_DTYPES[dtype], tuple(numbers[at + 2 : at + 2 + n_dims])))
        at += 2 + n_dims
    return tuple(layout)
