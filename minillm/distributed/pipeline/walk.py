"""One stage's way through its list: passes, messages and updates, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.batches import cut, update_groups, weights
from minillm.distributed.pipeline.chunk import Chunk, Loss
from minillm.distributed.pipeline.durations import Durations
from minillm.distributed.pipeline.schedule import Schedule
from minillm.distributed.pipeline.transport import Tensors, Transport
from minillm.distributed.simulator import compute


class Walk:
    """Runs a stage's actions on its chunks.

    Args:
        schedule, stage: whose list.
        chunks: of this stage.
        transport: to the other stages.
        loss_fn, mean: see `Pipeline`, as `durations`.
        update: called at an update, with its chunk.

    Attributes:
        losses: float64 (n_micro_batches,), what those micro-batches add to the loss whose last piece is here; 0 for the
            others.
        n_updates: how many losses of updates they are the parts of: 1 where the schedule makes none.
    """

    def __init__(
        self,
        schedule: Schedule,
        stage: int,
        chunks: Sequence[Chunk],
        transport: Transport,
        loss_fn: Callable[[Any, Any], Tensor],
        *,
        mean: bool,
        durations: Durations | None,
        update: Callable[[Chunk], None],
    ) -> None:
        self._schedule, self._stage, self._chunks, self._transport = schedule, stage, chunks, transport
        self._loss_fn, self._mean, self._durations, self._update = loss_fn, mean, durations, update
        self._groups = update_groups(schedule)
        self._broken_off = False
        self.n_updates = len(self._groups)

    def run(self, inputs: Any, targets: Any, device: torch.device, *, training: bool) -> None:
        """Go through the list once; without `training` only through its forward passes, of which nothing is kept.

        Args:
            inputs, targets: see `Pipeline.step`.
            device: of `losses`.
        """
        schedule, n = self._schedule, self._schedule.n_micro_batches
        first = any(piece == 0 for piece in schedule.pieces[self._stage])
        last = any(piece == schedule.n_pieces - 1 for piece in schedule.pieces[self._stage])
        self._inputs = cut(inputs, "inputs", n) if first else []
        self._targets = cut(targets, "targets", n) if last else []
        self._weights = weights(self._targets, self._groups, self._mean) if last else []
        if self._broken_off:
            raise RuntimeError(
                "an earlier step broke off on this rank, and what the stages sent each other then may still be on its "
                "way: make the process group and the Pipeline anew"
            )
        self._broken_off = schedule.n_stages > 1
        self.losses = torch.zeros(n, dtype=torch.float64, device=device)
        self._made: dict[Action, Tensors] = {}  # what a pass gave and no message or pass has taken yet
        for chunk in self._chunks:
            chunk.clear()
        source = schedule.routes[0][0][0]
        shapes = tuple(tuple((x.dtype, x.shape) for x in tensors) for tensors in self._inputs)
        self._transport.begin((training, shapes) if self._stage == source else None, source)
        for action in schedule.actions[self._stage]:
            try:
                self._do(action, training)
            except Exception as error:
                piece = schedule.piece(self._stage, action.chunk)
                error.add_note(f"in {action} of stage {self._stage}, piece {piece} of the model")
                if "leaf Variable" in str(error):
                    error.add_note(
                        "what comes into a piece is needed for its backward pass, so it cannot begin with an operation "
                        "in place, such as nn.ReLU(inplace=True): cut elsewhere, or take inplace=False"
                    )
                raise
        self._transport.finish()
        self._inputs, self._targets = [], []  # the batch is the caller's
        self._broken_off = False

    def _do(self, action: Action, training: bool) -> None:
        match action.kind:
            case Kind.FORWARD:
                self._forward(action, training)
            case Kind.SEND_FORWARD:
                self._transport.send_activation(action, self._made.pop(action), self._peer(action))
            case Kind.RECV_FORWARD:
                self._transport.post_activation(action, self._peer(action))
            case _ if training:
                self._second_half(action)

    def _second_half(self, action: Action) -> None:
        match action.kind:
            case Kind.BACKWARD | Kind.BACKWARD_INPUT:
                self._backward(action)
            case Kind.BACKWARD_WEIGHT:
                self._spend(action)
                self._chunks[action.chunk].backward_weight(action.micro_batch)
            case Kind.SEND_BACKWARD:
                self._transport.send_gradient(action, self._made.pop(action), self._peer(action))
            case Kind.RECV_BACKWARD:
                buffers = self._chunks[action.chunk].expected(action.micro_batch)
                self._transport.post(action, buffers, self._peer(action))
            case Kind.UPDATE:
                self._spend(action)
                self._update(self._chunks[action.chunk])

    def _forward(self, action: Action, training: bool) -> None:
        m, piece = action.micro_batch, self._schedule.piece(self._stage, action.chunk)
        inputs = self._inputs[m] if piece == 0 else self._given(Kind.RECV_FORWARD, action)
        self._spend(action)
        chunk, ends = self._chunks[action.chunk], piece == self._schedule.n_pieces - 1
        loss = self._loss(m) if ends else None
        if training:
            outputs = chunk.forward(m, inputs, action.version, loss, first=piece == 0)
        else:
            outputs = chunk.evaluate(inputs, loss)
        if ends:
            self.losses[m] = outputs[0].double()
        else:
            self._give(Kind.SEND_FORWARD, Kind.RECV_FORWARD, action, outputs)

    def _backward(self, action: Action) -> None:
        m, piece = action.micro_batch, self._schedule.piece(self._stage, action.chunk)
        grads = None
        if piece < self._schedule.n_pieces - 1:
            grads = self._given(Kind.RECV_BACKWARD, action)
            self._transport.arrived(Action(Kind.SEND_FORWARD, m, action.chunk))
        self._spend(action)
        made = self._chunks[action.chunk].backward(m, grads, action.version)
        if piece > 0:
            self._give(Kind.SEND_BACKWARD, Kind.RECV_BACKWARD, action, made)

    def _given(self, kind: Kind, action: Action) -> Tensors:
        """What a pass works on, from a message or from a pass of this stage."""
        received = Action(kind, action.micro_batch, action.chunk)
        return self._made.pop(received) if received in self._made else self._transport.received(received)

    def _give(self, send: Kind, receive: Kind, action: Action, tensors: Tensors) -> None:
        """Lay out what a pass gave for its message, or for the pass of this stage that takes it."""
        other = self._schedule.neighbour(self._stage, action)
        assert other is not None
        here = other[0] == self._stage
        to = Action(receive, action.micro_batch, other[1]) if here else Action(send, action.micro_batch, action.chunk)
        self._made[to] = tensors

    def _peer(self, message: Action) -> int:
        other = self._schedule.neighbour(self._stage, message)
        assert other is not None
        return other[0]

    def _loss(self, micro_batch: int) -> Loss:
        targets, weight = self._targets[micro_batch], self._weights[micro_batch]

        def loss(outputs: Tensors) -> Tensor:
            value = self._loss_fn(*(tensors[0] if len(tensors) == 1 else tensors for tensors in (outputs, targets)))
            _check_loss(value, outputs)
            # The mean over no rows is NaN, and counts nothing.
            return value.squeeze() * weight if weight else outputs[0].sum() * 0

        return loss

    def _spend(self, action: Action) -> None:
        """Let the pass take its time on the virtual clock."""
        if self._durations is not None:
            compute(self._durations.seconds(self._stage, action), name=str(action))


def _check_loss(value: Any, outputs: Tensors) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        got = f"{tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"loss_fn must give a scalar floating-point tensor for a micro-batch, got {got}")
    if any(output.requires_grad for output in outputs) and not value.requires_grad:
        raise ValueError("loss_fn must give a loss that depends on the output, got one that needs no gradient")
