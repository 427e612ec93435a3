"""Cutting text by a pattern that matches its pieces, one after the other: what most pre-tokenizers come down to.

The pattern is kept in two forms: one run by the `regex` library, because it needs Unicode's classes, and one for text
that is ASCII only, run by the standard `re`, which is about twice as fast, or by `str` methods, which are faster still.
Long text is cut into blocks so that most blocks of mostly-English text take the fast form, and so that a corpus is
never held as one list of pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from minillm.tokenizers.aligned_text import AlignedText

BLOCK_LENGTH = 4096


class PiecePattern:
    """Cuts a text into the matches of a pattern; what lies between them is left out.

    Args:
        split_unicode: str -> its pieces in order, for any text.
        split_ascii: The same for text that is ASCII only, faster.
        safe_cut: Where this matches, the text may be cut behind the match: a piece ends there, and what follows is
            split as if the text began there.
    """

    def __init__(
        self, split_unicode: Callable[[str], list[str]], split_ascii: Callable[[str], list[str]], safe_cut: str
    ) -> None:
        self.split_unicode = split_unicode
        self.split_ascii = split_ascii
        self._safe_cut = re.compile(safe_cut)

    def split(self, text: str, block_length: int = BLOCK_LENGTH, *, at_start: bool = True) -> Iterator[list[str]]:
        """Yield the pieces of `text` in order, those of a block at a time.

        Args:
            text: Any text.
            block_length: Cut at the first safe place after so many characters; a text without one is one block.
            at_start: Whether `text` begins where the user's text does: of no consequence here.
        """
        start = 0
        while cut := self._safe_cut.search(text, start + block_length):
            yield self._split(text[start : cut.end()])
            start = cut.end()
        yield self._split(text[start:])

    def _split(self, text: str) -> list[str]:
        return self.split_ascii(text) if text.isascii() else self.split_unicode(text)

    def align(self, text: AlignedText) -> list[AlignedText]:
        """The same pieces, and where their characters come from."""
        pieces = []
        end = 0
        for block in self.split(text.text):
            for piece in block:
                # What is left out between pieces cannot hold a piece, so the first place found is the right one.
                start = text.text.index(piece, end)
                end = start + len(piece)
                pieces.append(text.slice(start, end))
        return pieces
