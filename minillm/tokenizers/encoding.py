"""What a tokenizer says about a text: the ids, and for each of them its spelling, its place, its role."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from itertools import chain
from typing import Any


@dataclass(frozen=True)
class Encoding:
    """The tokens of a text, or of a pair of texts. All lists are equally long, one entry a token.

    Attributes:
        ids: What a model reads.
        tokens: How each token is spelled in the vocabulary.
        offsets: (start, end): the characters `text[start:end]` of the text as it was given; (0, 0) for tokens that a
            template or padding added. Of a pair, each text is counted from its own beginning.
        type_ids: Which segment a token belongs to, for models with segment embeddings (BERT's 0 and 1).
        special_tokens_mask: 1 for what a template or padding added, 0 for the text.
        attention_mask: 0 for padding, 1 for the rest.
        word_ids: The number of the piece (from pre-tokenization) that a token is part of; None for what was added.
        sequence_ids: 0 for the first text, 1 for the second of a pair; None for what was added.
        overflowing: What truncation cut off, in stretches as long as this one.
    """

    ids: list[int]
    tokens: list[str]
    offsets: list[tuple[int, int]]
    type_ids: list[int]
    special_tokens_mask: list[int]
    attention_mask: list[int]
    word_ids: list[int | None]
    sequence_ids: list[int | None]
    overflowing: tuple[Encoding, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of_text(
        cls, ids: list[int], tokens: list[str], offsets: list[tuple[int, int]], word_ids: list[int | None]
    ) -> Encoding:
        """The encoding of one text to which nothing was added."""
        n = len(ids)
        return cls(ids, tokens, offsets, [0] * n, [0] * n, [1] * n, word_ids, [0] * n)

    def slice(self, start: int, end: int) -> Encoding:
        """Tokens `start` to `end`, without what had overflowed."""
        columns: dict[str, Any] = {name: getattr(self, name)[start:end] for name in _PER_TOKEN}
        return Encoding(**columns)

    @classmethod
    def joined(cls, parts: Iterable[Encoding]) -> Encoding:
        """One encoding after the other, without what had overflowed."""
        parts = list(parts)
        columns: dict[str, Any] = {
            name: list(chain.from_iterable(getattr(part, name) for part in parts)) for name in _PER_TOKEN
        }
        return cls(**columns)


_PER_TOKEN = [attribute.name for attribute in fields(Encoding) if attribute.name != "overflowing"]
