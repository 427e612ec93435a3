"""How long each pass of a schedule takes: for the simulator, and for the executor on the virtual clock."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.schedule import Schedule


@dataclass(frozen=True)
class Durations:
    """Seconds of passes and updates; make it with `Durations.of`.

    Attributes:
        pieces: by stage and chunk, which piece of the model it is.
        seconds_of: kind of a pass -> seconds, by piece.
        update: seconds of an update.
    """

    pieces: tuple[tuple[int, ...], ...]
    seconds_of: dict[Kind, tuple[float, ...]]
    update: float

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        *,
        forward: float | Sequence[float] = 1.0,
        backward: float | Sequence[float] = 2.0,
        backward_input: float | Sequence[float] | None = None,
        backward_weight: float | Sequence[float] | None = None,
        update: float = 0.0,
    ) -> Durations:
        """The durations of a schedule's passes.

        Args:
            forward, backward: a number is what ``1 / n_stages`` of the model takes, so that schedules of different
                numbers of chunks are compared on one model: a piece takes ``n_stages / n_pieces`` of it. A sequence is
                what each piece takes.
            backward_input, backward_weight: the same for the halves of a backward pass; None: half of `backward` each.
            update: of one update.

        Raises:
            ValueError: a time that is negative or not finite, or not as many as there are pieces.
        """
        share = schedule.n_stages / schedule.n_pieces

        def by_piece(name: str, value: float | Sequence[float]) -> tuple[float, ...]:
            if isinstance(value, Sequence):
                if len(value) != schedule.n_pieces:
                    raise ValueError(
                        f"{name} must be a number or one for each of the {schedule.n_pieces} pieces, got {len(value)}"
                    )
                found = tuple(float(one) for one in value)
            else:
                found = (value * share,) * schedule.n_pieces
            if not all(math.isfinite(one) and one >= 0 for one in found):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
            return found

        whole = by_piece("backward", backward)
        half = tuple(one / 2 for one in whole)
        if not (math.isfinite(update) and update >= 0):
            raise ValueError(f"update must be finite and at least 0, got {update}")
        return cls(
            schedule.pieces,
            {
                Kind.FORWARD: by_piece("forward", forward),
                Kind.BACKWARD: whole,
                Kind.BACKWARD_INPUT: half if backward_input is None else by_piece("backward_input", backward_input),
                Kind.BACKWARD_WEIGHT: half if backward_weight is None else by_piece("backward_weight", backward_weight),
            },
            float(update),
        )

    def seconds(self, stage: int, action: Action) -> float:
        """What a pass or an update of a stage takes; messages take none of the stage's own time."""
        if action.kind is Kind.UPDATE:
            return self.update
        return self.seconds_of[action.kind][self.pieces[stage][action.chunk]] if action.kind.computes else 0.0
