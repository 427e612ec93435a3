"""From WordPiece tokens back to a text that reads well; what was lost (case, accents, white space) stays lost.

Source: the WordPiece decoder of Hugging Face's `tokenizers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from minillm.tokenizers.json_file import kind
from minillm.tokenizers.json_options import read_options

_CLEANUP = [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m")]
_CLEANUP += [(" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")]


@dataclass(frozen=True)
class WordPieceDecoder:
    """Joins tokens: what continues a word is put to it without the prefix, and before all else comes a space.

    Attributes:
        prefix: What a token begins with that continues a word.
        cleanup: No space in front of the tokens `.`, `?`, `!`, `,`, `n't`, `'m`, `'s`, `'ve` and `'re`. (An apostrophe
            that is a token by itself, as BERT's pre-tokenizer makes it, keeps its spaces: `it ' s`.)
    """

    prefix: str = "##"
    cleanup: bool = True

    def __call__(self, tokens: Sequence[str]) -> str:
        """The text of tokens."""
        following = tokens[1:]
        parts = {token: self._tidy(self._attached(token)) for token in set(following)}
        return "".join([*map(self._tidy, tokens[:1]), *map(parts.__getitem__, following)])

    def to_json(self) -> dict[str, Any]:
        """The "decoder" of a tokenizer.json."""
        return {"type": "WordPiece", "prefix": self.prefix, "cleanup": self.cleanup}

    @classmethod
    def from_json(cls, part: Any) -> Self | None:
        """The same, read; None for null. ValueError if it is another decoder."""
        if part is None:
            return None
        if kind(part) != "WordPiece":
            raise ValueError(f"decoder must be WordPiece or null, got {kind(part)}")
        return cls(**read_options(part, prefix=(str, "##"), cleanup=(bool, True)))

    def _attached(self, token: str) -> str:
        return token[len(self.prefix) :] if token.startswith(self.prefix) else " " + token

    def _tidy(self, text: str) -> str:
        for spaced, tight in _CLEANUP if self.cleanup else ():
            text = text.replace(spaced, tight)
        return text
