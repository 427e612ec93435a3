"""Truncation: making one text, or a pair, short enough for a model.

What does not fit is cut off at one side and kept in `Encoding.overflowing`, in stretches as long as what stays. With a
`stride`, each stretch begins with the last `stride` tokens of the one before: a question's answer that a cut goes
through is whole in one of them (Devlin et al., "BERT", 2019, read SQuAD's long paragraphs this way).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import index
from typing import Any

from minillm.tokenizers.encoding import Encoding

STRATEGIES = {"longest_first": "LongestFirst", "only_first": "OnlyFirst", "only_second": "OnlySecond"}
SIDES = {"right": "Right", "left": "Left"}


@dataclass(frozen=True)
class Truncation:
    """Cuts texts so that, with what a template adds, they have at most `max_length` tokens.

    Attributes:
        max_length: Tokens, those of the template included.
        strategy: Which text of a pair becomes shorter. "longest_first": the longer one, until both are equally long,
            then both. "only_first", "only_second": that one.
        stride: Tokens that two stretches next to each other have in common.
        side: "right" cuts off the end of a text, "left" its beginning.

    Raises:
        ValueError: An argument is none of the above; the stride is as long as what stays of a text.
    """

    max_length: int
    strategy: str = "longest_first"
    stride: int = 0
    side: str = "right"

    def __post_init__(self) -> None:
        if index(self.max_length) < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy must be one of {list(STRATEGIES)}, got {self.strategy!r}")
        if not 0 <= index(self.stride) < self.max_length:
            raise ValueError(f"stride must be from 0 to max_length - 1 = {self.max_length - 1}, got {self.stride}")
        if self.side not in SIDES:
            raise ValueError(f"side must be one of {list(SIDES)}, got {self.side!r}")

    def apply(
        self, first: Encoding, second: Encoding | None = None, n_added: int = 0
    ) -> tuple[Encoding, Encoding | None]:
        """A text, or a pair, cut so that there is room for `n_added` tokens more.

        A text for which no room is left at all overflows in one stretch.

        Raises:
            ValueError: The template alone is longer than `max_length`; of the text that "only_first" or "only_second"
                cuts no token would stay, or it is not there; `stride` is not less than what stays of a text.
        """
        room = self.max_length - n_added
        if room < 0:
            raise ValueError(f"max_length must be at least {n_added}, what the template adds; got {self.max_length}")
        n_first, n_second = len(first), 0 if second is None else len(second)
        if n_first + n_second <= room:
            return first, second
        if second is None and self.strategy != "only_second":
            return self._cut(first, room), None
        if second is not None and self.strategy == "longest_first":
            shorter = min(n_first, n_second, room // 2)
            longer = room - shorter
            n_first, n_second = (longer, shorter) if n_first > n_second else (shorter, longer)
            return self._cut(first, n_first), self._cut(second, n_second)
        if second is not None and self.strategy == "only_first" and room > n_second:
            return self._cut(first, room - n_second), second
        if second is not None and self.strategy == "only_second" and room > n_first:
            return first, self._cut(second, room - n_first)
        raise ValueError(
            f"strategy {self.strategy!r} must leave at least one token of the text that it cuts; this text has "
            f"{n_first} tokens, its pair {n_second}, and there is room for {room} in all"
        )

    def _cut(self, encoding: Encoding, length: int) -> Encoding:
        """The first (or last) `length` tokens; the others overflow."""
        n = len(encoding)
        if n <= length:
            return encoding
        if length == 0:
            return replace(encoding.slice(0, 0), overflowing=(encoding,))
        if self.stride >= length:
            raise ValueError(f"stride must be less than the {length} tokens that stay of a text, got {self.stride}")
        step = length - self.stride
        # As many steps as are needed for the last stretch to reach the end (seen from the side that stays).
        stretches = [(start, min(start + length, n)) for start in range(0, n - self.stride, step)]
        if self.side == "left":
            stretches = [(n - end, n - start) for start, end in stretches]
        kept, *rest = (encoding.slice(start, end) for start, end in stretches)
        return replace(kept, overflowing=tuple(rest))

    def to_json(self) -> dict[str, Any]:
        """The "truncation" of a tokenizer.json."""
        return {
            "direction": SIDES[self.side],
            "max_length": self.max_length,
            "strategy": STRATEGIES[self.strategy],
            "stride": self.stride,
        }


def truncation_from_json(part: Any) -> Truncation | None:
    """The "truncation" of a tokenizer.json; ValueError for what cannot be one."""
    if part is None:
        return None
    strategies = {there: here for here, there in STRATEGIES.items()}
    sides = {there: here for here, there in SIDES.items()}
    try:
        side = sides[part.get("direction", "Right")]
        return Truncation(part["max_length"], strategies[part["strategy"]], part["stride"], side)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"truncation: {part!r} is none that is known here ({error!r})") from None
