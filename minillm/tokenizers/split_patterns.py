"""Cutting text into the pieces inside which byte-level BPE merges: the GPT-2 and the GPT-4 (cl100k) split patterns.

A piece never crosses from a word into punctuation or into the next word, so merges learn parts of words, not phrases.
Each pattern is kept in two forms: the published one, run by the `regex` library because it needs the Unicode classes
``\\p{L}`` and ``\\p{N}``, and one for text that is ASCII only, run by the standard `re`, which is about twice as fast.
(`re`'s own ``\\s`` also takes the separators U+001C to U+001F, which Unicode does not count as white space, hence the
explicit ranges.) Long text is cut into blocks so that most blocks of mostly-English text take the fast form, and so
that a corpus is never held as one list of pieces.

Which code points are letters and digits is a matter of the Unicode version, here that of the installed `regex`. Another
implementation splits equally every text whose characters its tables have too; a code point that only one of the two
knows is a letter to one and a symbol to the other. No text is lost either way.

Sources: GPT-2 (Radford et al. 2019, section 2.2 and its released code); GPT-4's cl100k_base as released with tiktoken.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import regex

# Between a printable ASCII character and a space both patterns always cut: no alternative takes a space after
# something that is not white space. What follows such a place is therefore split as if the text began there.
_SAFE_CUT = re.compile(r"[!-~](?= )")


@dataclass(frozen=True)
class SplitPattern:
    """One published split pattern.

    Attributes:
        name: The name by which `ByteBPETokenizer` knows it.
        published: The pattern as published, in the syntax of the `regex` library; this one is saved in files.
        split_unicode: str -> list of pieces whose concatenation is the text, for any text.
        split_ascii: The same for ASCII-only text, faster.
    """

    name: str
    published: str
    split_unicode: Callable[[str], list[str]]
    split_ascii: Callable[[str], list[str]]

    def split(self, text: str, block_length: int = 4096) -> Iterator[list[str]]:
        """Yield the pieces of `text` in order, those of a block at a time; all of them joined are `text`.

        Args:
            text: Any text.
            block_length: Cut at the first safe place after so many characters; a text without one is one block.
        """
        for block in _blocks(text, block_length):
            yield self.split_ascii(block) if block.isascii() else self.split_unicode(block)


def _blocks(text: str, length: int) -> Iterator[str]:
    start = 0
    while cut := _SAFE_CUT.search(text, start + length):
        yield text[start : cut.end()]
        start = cut.end()
    yield text[start:]


def _pattern(name: str, published: str, ascii_only: str) -> SplitPattern:
    return SplitPattern(name, published, regex.compile(published).findall, re.compile(ascii_only).findall)


SPLIT_PATTERNS: dict[str, SplitPattern] = {
    "gpt2": _pattern(
        "gpt2",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r" ?[A-Za-z]+|'(?:[stmd]|re|ve|ll)| ?[0-9]+| ?[^\t-\r A-Za-z0-9]+|[\t-\r ]+(?![^\t-\r ])|[\t-\r ]+",
    ),
    "gpt4": _pattern(
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
