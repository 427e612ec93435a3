"""Padding: making the encodings of a batch equally long, so that they fit into one tensor.

A model has to leave padding out: `Encoding.attention_mask` says where it is. Models that generate text want it at the
left, where nothing comes between a prompt and what follows it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import index
from typing import Any

from minillm.tokenizers.encoding import Encoding
from minillm.tokenizers.truncation import SIDES


@dataclass(frozen=True)
class Padding:
    """Fills encodings up to one length.

    Attributes:
        pad_id, pad_token, pad_type_id: The token that fills, how it is spelled, and its segment.
        length: Tokens; None: those of the longest encoding of a batch. Longer encodings stay as they are.
        multiple_of: The length is rounded up to a multiple of this, as fast kernels like it.
        side: Where the padding goes, "right" or "left".

    Raises:
        ValueError: An argument is negative, empty, 0 where it must be positive, or none of the above.
    """

    pad_id: int = 0
    pad_token: str = "[PAD]"
    pad_type_id: int = 0
    length: int | None = None
    multiple_of: int | None = None
    side: str = "right"

    def __post_init__(self) -> None:
        if not isinstance(self.pad_token, str) or not self.pad_token:
            raise ValueError(f"pad_token must be a str that is not empty, got {self.pad_token!r}")
        for name, least in (("pad_id", 0), ("pad_type_id", 0), ("length", 0), ("multiple_of", 1)):
            value = getattr(self, name)
            if value is None and name in ("length", "multiple_of"):
                continue
            if index(value) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.side not in SIDES:
            raise ValueError(f"side must be one of {list(SIDES)}, got {self.side!r}")

    def apply(self, batch: Iterable[Encoding]) -> list[Encoding]:
        """The encodings of a batch, and what has overflowed from them, made equally long."""
        batch = list(batch)
        length = self.length if self.length is not None else max(map(len, batch), default=0)
        if self.multiple_of is not None:
            length = -(-length // self.multiple_of) * self.multiple_of
        return [self._pad(encoding, length) for encoding in batch]

    def _pad(self, encoding: Encoding, length: int) -> Encoding:
        overflowing = tuple(self._pad(part, length) for part in encoding.overflowing)
        n = length - len(encoding)
        if n <= 0:
            return replace(encoding, overflowing=overflowing)
        padding = Encoding(
            ids=[self.pad_id] * n,
            tokens=[self.pad_token] * n,
            offsets=[(0, 0)] * n,
            type_ids=[self.pad_type_id] * n,
            special_tokens_mask=[1] * n,
            attention_mask=[0] * n,
            word_ids=[None] * n,
            sequence_ids=[None] * n,
        )
        parts = (encoding, padding) if self.side == "right" else (padding, encoding)
        return replace(Encoding.joined(parts), overflowing=overflowing)

    def to_json(self) -> dict[str, Any]:
        """The "padding" of a tokenizer.json."""
        return {
            "strategy": "BatchLongest" if self.length is None else {"Fixed": self.length},
            "direction": SIDES[self.side],
            "pad_to_multiple_of": self.multiple_of,
            "pad_id": self.pad_id,
            "pad_type_id": self.pad_type_id,
            "pad_token": self.pad_token,
        }


def padding_from_json(part: Any) -> Padding | None:
    """The "padding" of a tokenizer.json; ValueError for what cannot be one."""
    if part is None:
        return None
    sides = {there: here for here, there in SIDES.items()}
    try:
        longest = part["strategy"] == "BatchLongest"
        return Padding(
            pad_id=part["pad_id"],
            pad_token=part["pad_token"],
            pad_type_id=part["pad_type_id"],
            length=None if longest else part["strategy"]["Fixed"],
            multiple_of=part["pad_to_multiple_of"] or None,  # 0 there means the same as null
            side=sides[part["direction"]],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"padding: {part!r} is none that is known here ({error!r})") from None
