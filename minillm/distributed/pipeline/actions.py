"""What a stage of a pipeline can do: the words that schedules are written in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """The kinds of an action, by the letters that pictures and texts show."""

    FORWARD = "F"
    BACKWARD = "B"  # the whole: gradients of the input and of the weights
    BACKWARD_INPUT = "I"  # the half that the stage before waits for
    BACKWARD_WEIGHT = "W"  # the half that nobody waits for but the optimizer
    UPDATE = "U"
    SEND_FORWARD = "SF"  # an output, to where the micro-batch goes next
    RECV_FORWARD = "RF"
    SEND_BACKWARD = "SB"  # the gradient of an input, to where it came from
    RECV_BACKWARD = "RB"

    @property
    def computes(self) -> bool:
        """Whether it is a pass over a chunk's layers: neither a message nor an update."""
        return self in _COMPUTES

    @property
    def sends(self) -> bool:
        """Whether it sends a message."""
        return self in (Kind.SEND_FORWARD, Kind.SEND_BACKWARD)

    @property
    def receives(self) -> bool:
        """Whether it receives a message."""
        return self in (Kind.RECV_FORWARD, Kind.RECV_BACKWARD)


_COMPUTES = (Kind.FORWARD, Kind.BACKWARD, Kind.BACKWARD_INPUT, Kind.BACKWARD_WEIGHT)
_KINDS = "|".join(sorted(Kind, key=len, reverse=True))
_NOTATION = re.compile(rf"({_KINDS})(\d+)(?:\.(\d+))?(?:@(\d+))?")


@dataclass(frozen=True, slots=True)
class Action:
    """One thing that a stage does.

    Written ``F3``: the forward pass of micro-batch 3; ``F3.1``: through the stage's chunk 1; ``F3@2``: with the weights
    of version 2; ``RB3.1``: receive the gradient of what ``F3.1`` gave.

    Attributes:
        kind: what.
        micro_batch: of which micro-batch, from 0. Of an update: the last one whose gradient goes into it.
        chunk: with which of the stage's chunks of the model, from 0.
        version: how many updates the weights have seen that a pass works with; of an update, that it has made with its
            own. Messages have none.
    """

    kind: Kind
    micro_batch: int
    chunk: int = 0
    version: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "kind", Kind(self.kind))
        if min(self.micro_batch, self.chunk, self.version) < 0:
            raise ValueError(
                f"micro_batch, chunk and version of an action count from 0, "
                f"got {self.micro_batch}, {self.chunk} and {self.version}"
            )

    def __str__(self) -> str:
        chunk = f".{self.chunk}" if self.chunk else ""
        version = f"@{self.version}" if self.version else ""
        return f"{self.kind}{self.micro_batch}{chunk}{version}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action of its notation: ``Action.parse("B3.1")``.

        Raises:
            ValueError: it is none.
        """
        match = _NOTATION.fullmatch(text.strip())
        if match is None:
            raise ValueError(f"an action is written like F3, B3.1 or F3@2, with one of {', '.join(Kind)}; got {text!r}")
        kind, *numbers = match.groups()
        return cls(Kind(kind), *(int(number or 0) for number in numbers))
