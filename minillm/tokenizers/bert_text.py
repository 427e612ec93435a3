"""What BERT does to a text before WordPiece: clean it, take off case and accents, cut at spaces and punctuation.

Chinese is written without spaces; BERT makes each of its characters a word by putting spaces around it. Japanese kana,
Hangul and Thai are left to WordPiece, as words of another length.

Source: Devlin et al., "BERT" (2019), the released code's `BasicTokenizer`, as Hugging Face's `tokenizers` has it: code
points that Unicode has not assigned are kept, and U+2B820 to U+2B91F are not taken for Chinese.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from typing import Any

import regex

from minillm.tokenizers.aligned_text import AlignedText
from minillm.tokenizers.character_table import CharacterTable
from minillm.tokenizers.piece_pattern import BLOCK_LENGTH, PiecePattern
from minillm.tokenizers.unicode_forms import NFD

# First and last code points of the Chinese characters, flat and in order.
_CHINESE = [
    *(0x3400, 0x4DBF, 0x4E00, 0x9FFF, 0xF900, 0xFAFF),
    *(0x20000, 0x2A6DF, 0x2A700, 0x2B81F, 0x2B920, 0x2CEAF, 0x2F800, 0x2FA1F),
]
_CHINESE_BOUNDS = [code_point + i % 2 for i, code_point in enumerate(_CHINESE)]
_WHITE_SPACE = regex.compile(r"\s")
_NOT_TEXT = regex.compile(r"(?![\t\n\r])[\p{Cc}\p{Cf}\p{Co}\0\uFFFD]")
_NONSPACING_MARK = regex.compile(r"\p{Mn}")


class BertNormalizer:
    """BERT's normalization: `Héllo\\t你好` becomes `hello  你  好 `.

    Args:
        clean_text: Remove control characters, format characters, those for private use and U+FFFD; make every kind of
            white space a space.
        handle_chinese_chars: Put a space on both sides of each Chinese character.
        strip_accents: Take characters apart (NFD) and drop the nonspacing marks; None does so if `lowercase` does.
        lowercase: Make every character lower case.
    """

    def __init__(
        self,
        clean_text: bool = True,
        handle_chinese_chars: bool = True,
        strip_accents: bool | None = None,
        lowercase: bool = True,
    ) -> None:
        self.clean_text = clean_text
        self.handle_chinese_chars = handle_chinese_chars
        self.strip_accents = strip_accents
        self.lowercase = lowercase
        self._decomposes = lowercase if strip_accents is None else strip_accents
        self._cleaned = CharacterTable(self._clean)
        self._bared = CharacterTable(self._bare)
        self._ascii = {i: self._bare(self._clean(chr(i))) for i in range(128)}

    def __call__(self, text: str) -> str:
        if text.isascii():
            return text.translate(self._ascii)
        blocks = []
        start = 0
        # Cut in front of spaces: what follows one has no effect on what precedes it.
        while (end := text.find(" ", start + BLOCK_LENGTH)) > 0:
            blocks.append(self._normalize(text[start:end]))
            start = end
        blocks.append(self._normalize(text[start:]))
        return "".join(blocks)

    def _normalize(self, text: str) -> str:
        if text.isascii():
            return text.translate(self._ascii)
        cleaned = self._cleaned(text)
        return self._bared(NFD()(cleaned) if self._decomposes else cleaned)

    def align(self, text: AlignedText) -> AlignedText:
        """The same; the spaces around a Chinese character come from it."""
        if text.text.isascii():
            normalized = text.text.translate(self._ascii)
            if len(normalized) == len(text.text):
                return AlignedText(normalized, text.starts, text.ends)
        cleaned = self._cleaned.align(text)
        return self._bared.align(NFD().align(cleaned) if self._decomposes else cleaned)

    def _clean(self, character: str) -> str:
        if self.clean_text:
            if _NOT_TEXT.match(character):
                return ""
            if _WHITE_SPACE.match(character):
                return " "
        if self.handle_chinese_chars and bisect_right(_CHINESE_BOUNDS, ord(character)) % 2:
            return f" {character} "
        return character

    def _bare(self, character: str) -> str:
        if self._decomposes and _NONSPACING_MARK.match(character):
            return ""
        return character.lower() if self.lowercase else character

    def to_json(self) -> dict[str, Any]:
        """Its part of a tokenizer.json."""
        return {
            "type": "BertNormalizer",
            "clean_text": self.clean_text,
            "handle_chinese_chars": self.handle_chinese_chars,
            "strip_accents": self.strip_accents,
            "lowercase": self.lowercase,
        }


# Punctuation is what Unicode calls so, and all of ASCII that is neither letter nor digit nor control character.
ASCII_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"
PUNCTUATION_CLASS = r"\p{P}$+<=>^`|~"
_PADDED = [(mark, f" {mark} ") for mark in ASCII_PUNCTUATION]
_SEPARATORS = re.compile(r"[\x1c-\x1f]")  # which are white space to Python, and not to Unicode
_ASCII_PIECES = re.compile(rf"[^\t-\r {re.escape(ASCII_PUNCTUATION)}]+|[{re.escape(ASCII_PUNCTUATION)}]")


class BertPreTokenizer(PiecePattern):
    """Cuts at white space, which is left out, and on both sides of each punctuation character."""

    def __init__(self) -> None:
        pieces = regex.compile(rf"[^\s{PUNCTUATION_CLASS}]+|[{PUNCTUATION_CLASS}]")
        super().__init__(pieces.findall, _split_ascii, r"[!-~](?= )")

    def to_json(self) -> dict[str, Any]:
        """Its part of a tokenizer.json."""
        return {"type": "BertPreTokenizer"}


def _split_ascii(text: str) -> list[str]:
    if _SEPARATORS.search(text):
        return _ASCII_PIECES.findall(text)
    # Some thirty passes over a block at the speed of memory take half the time of one with a pattern.
    for mark, padded in _PADDED:
        if mark in text:
            text = text.replace(mark, padded)
    return text.split()
