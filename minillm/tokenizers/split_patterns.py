"""Cutting text into the pieces inside which byte-level BPE merges: the GPT-2 and the GPT-4 (cl100k) split patterns.

A piece never crosses from a word into punctuation or into the next word, so merges learn parts of words, not phrases.
Each pattern is kept in two forms (see `piece_pattern`): the published one, for `regex`, which has the Unicode classes
``\\p{L}`` and ``\\p{N}``, and one for text that is ASCII only, for the standard `re`. (`re`'s own ``\\s`` also takes
the separators U+001C to U+001F, which Unicode does not count as white space, hence the explicit ranges.)

Which code points are letters and digits is a matter of the Unicode version, here that of the installed `regex`. Another
implementation splits equally every text whose characters its tables have too; a code point that only one of the two
knows is a letter to one and a symbol to the other. No text is lost either way.

Sources: GPT-2 (Radford et al. 2019, section 2.2 and its released code); GPT-4's cl100k_base as released with tiktoken.
"""

from __future__ import annotations

import re
from typing import Any

import regex

from minillm.tokenizers.piece_pattern import PiecePattern
from minillm.tokenizers.split import Split
from minillm.tokenizers.text_pattern import Regex

# Between a printable ASCII character and a space both patterns always cut: no alternative takes a space after
# something that is not white space. What follows such a place is therefore split as if the text began there.
_SAFE_CUT = r"[!-~](?= )"


class SplitPattern(PiecePattern):
    """One published split pattern; all pieces joined are the text.

    Args:
        name: The name by which `ByteBPETokenizer` knows it.
        published: The pattern as published, in the syntax of the `regex` library; this one is saved in files.
        ascii_only: A pattern that splits ASCII-only text equally, in the syntax of `re`.
    """

    def __init__(self, name: str, published: str, ascii_only: str) -> None:
        super().__init__(regex.compile(published).findall, re.compile(ascii_only).findall, _SAFE_CUT)
        self.name = name
        self.published = published

    def to_json(self) -> dict[str, Any]:
        """Its part of a tokenizer.json, for tokenizers whose pieces are text."""
        return Split(Regex(self.published), "isolated").to_json()


SPLIT_PATTERNS: dict[str, SplitPattern] = {
    "gpt2": SplitPattern(
        "gpt2",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r" ?[A-Za-z]+|'(?:[stmd]|re|ve|ll)| ?[0-9]+| ?[^\t-\r A-Za-z0-9]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+",
    ),
    "gpt4": SplitPattern(
        "gpt4",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
        r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\nA-Za-z0-9]?[A-Za-z]+|[0-9]{1,3}"
        r"| ?[^\t-\r A-Za-z0-9]+[\r\n]*|[\t-\r ]*[\r\n]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+",
    ),
}


def split_pattern(name: str) -> SplitPattern:
    """The split pattern called `name`; ValueError names the ones there are."""
    if name not in SPLIT_PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(map(repr, SPLIT_PATTERNS))}, got {name!r}")
    return SPLIT_PATTERNS[name]
