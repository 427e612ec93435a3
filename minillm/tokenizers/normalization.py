r"""Normalization: what is done to a text before it is cut into pieces, so that what reads the same is the same.

    Café, CAFE\u0301, ｃａｆé  ->  NFKC, Lowercase, StripAccents ...  ->  cafe

What is lost here no decoder brings back: the tokenizers of today's generating models leave the text as it is, or take
no more than NFC or NFKC; BERT's, made for understanding, drops case and accents. Normalizers can be put one after the
other (`NormalizerSequence`), remember where each character came from (`align`), and are written in a tokenizer.json as
Hugging Face's `tokenizers` does, whose results they give.

Unicode's normal forms are in `unicode_forms`, what replaces, adds and takes away in `replacement`, BERT's rules in
`bert_text`, SentencePiece's table in `character_map`.
Classes of characters are those of the installed `regex` library, so that every Python gives the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import regex

from minillm.tokenizers.aligned_text import AlignedText
from minillm.tokenizers.bert_text import BertNormalizer
from minillm.tokenizers.character_table import CharacterTable
from minillm.tokenizers.json_file import kind
from minillm.tokenizers.json_options import read_options, read_parts
from minillm.tokenizers.replacement import Prepend, Replace, Strip, collapse_white_space, remove_control_characters
from minillm.tokenizers.text_pattern import Regex, pattern_from_json
from minillm.tokenizers.unicode_forms import NFC, NFD, NFKC, NFKD

__all__ = [
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "BertNormalizer",
    "Lowercase",
    "Nmt",
    "Normalizer",
    "NormalizerSequence",
    "Prepend",
    "Regex",
    "Replace",
    "Strip",
    "StripAccents",
    "collapse_white_space",
    "normalizer_from_json",
    "remove_control_characters",
]

_MARK = regex.compile(r"\p{M}")
_MARKS = regex.compile(r"\p{M}+")


class Normalizer(Protocol):
    """A step of normalization."""

    def __call__(self, text: str) -> str:
        """The normalized text."""

    def align(self, text: AlignedText) -> AlignedText:
        """The same text, and where its characters come from."""

    def to_json(self) -> dict[str, Any]:
        """Its part of a tokenizer.json."""


class Lowercase:
    """Every character in lower case, whatever stands around it: a final sigma becomes σ, not ς."""

    def __init__(self) -> None:
        self._table = CharacterTable(str.lower)

    def __call__(self, text: str) -> str:
        return text.replace("Σ", "σ").lower()

    def align(self, text: AlignedText) -> AlignedText:
        if text.text.isascii():
            return AlignedText(text.text.lower(), text.starts, text.ends)
        return self._table.align(text)

    def to_json(self) -> dict[str, Any]:
        return {"type": "Lowercase"}


class StripAccents:
    """Without combining marks. Accents on precomposed letters stay: put `NFD` or `NFKD` in front."""

    def __init__(self) -> None:
        self._table = CharacterTable(_nothing_if_mark)

    def __call__(self, text: str) -> str:
        return text if text.isascii() else _MARKS.sub("", text)

    def align(self, text: AlignedText) -> AlignedText:
        return text if text.text.isascii() else self._table.align(text)

    def to_json(self) -> dict[str, Any]:
        return {"type": "StripAccents"}


def _nothing_if_mark(character: str) -> str:
    return "" if _MARK.match(character) else character


class Nmt:
    """Control characters removed, and spaces of all kinds made plain ones, as SentencePiece's `nmt` rules do it."""

    def __call__(self, text: str) -> str:
        return text.translate(_NMT)

    def align(self, text: AlignedText) -> AlignedText:
        return CharacterTable(self).align(text)

    def to_json(self) -> dict[str, Any]:
        return {"type": "Nmt"}


# \t, \n, \f and \r become spaces, all else below the space goes.
_NMT = dict.fromkeys([*range(1, 32), 0x7F, 0x8F, 0x9F], "") | dict.fromkeys(
    [9, 10, 12, 13, 0x1680, *range(0x200B, 0x2010), 0x2028, 0x2029, 0x2581, 0xFEFF, 0xFFFD], " "
)


class NormalizerSequence:
    """Several normalizers, one after the other."""

    def __init__(self, normalizers: Iterable[Normalizer]) -> None:
        self.normalizers = list(normalizers)

    def __call__(self, text: str) -> str:
        for normalizer in self.normalizers:
            text = normalizer(text)
        return text

    def align(self, text: AlignedText) -> AlignedText:
        for normalizer in self.normalizers:
            text = normalizer.align(text)
        return text

    def to_json(self) -> dict[str, Any]:
        return {"type": "Sequence", "normalizers": [normalizer.to_json() for normalizer in self.normalizers]}


def normalizer_from_json(part: Any) -> Normalizer | None:
    """The normalizer that a part of a tokenizer.json describes; None for none.

    Raises:
        ValueError: It is of an unknown type, or has options that are unknown or have other values than they may.
    """
    if part is None:
        return None
    read = _READERS.get(kind(part) or "")
    if read is None:
        raise ValueError(f"normalizer must be one of {', '.join(_READERS)}, got {kind(part) or part!r}")
    return read(part)


def _read_plain(
    normalizer: type[NFC | NFD | NFKC | NFKD | Lowercase | StripAccents | Nmt],
) -> Callable[[Any], Normalizer]:
    def read(part: Mapping[str, Any]) -> Normalizer:
        read_options(part)
        return normalizer()

    return read


def _read_strip(part: Mapping[str, Any]) -> Normalizer:
    options = read_options(part, strip_left=(bool,), strip_right=(bool,))
    return Strip(options["strip_left"], options["strip_right"])


def _read_replace(part: Mapping[str, Any]) -> Normalizer:
    options = read_options(part, pattern=(dict,), content=(str,))
    return Replace(pattern_from_json(options["pattern"]), options["content"])


def _read_prepend(part: Mapping[str, Any]) -> Normalizer:
    return Prepend(read_options(part, prepend=(str,))["prepend"])


def _read_bert(part: Mapping[str, Any]) -> Normalizer:
    flag = (bool, True)
    allowed = {"clean_text": flag, "handle_chinese_chars": flag, "strip_accents": ((bool, type(None)), None)}
    return BertNormalizer(**read_options(part, **allowed, lowercase=flag))


def _read_character_map(part: Mapping[str, Any]) -> Normalizer:
    from minillm.tokenizers.character_map import CharacterMap

    return CharacterMap.from_json(part)


def _read_sequence(part: Mapping[str, Any]) -> Normalizer:
    steps = map(normalizer_from_json, read_parts(part, "normalizers"))
    return NormalizerSequence(step for step in steps if step is not None)


_READERS: dict[str, Callable[[Any], Normalizer]] = {
    "NFC": _read_plain(NFC),
    "NFD": _read_plain(NFD),
    "NFKC": _read_plain(NFKC),
    "NFKD": _read_plain(NFKD),
    "Lowercase": _read_plain(Lowercase),
    "StripAccents": _read_plain(StripAccents),
    "Nmt": _read_plain(Nmt),
    "Strip": _read_strip,
    "Replace": _read_replace,
    "Prepend": _read_prepend,
    "BertNormalizer": _read_bert,
    "Precompiled": _read_character_map,
    "Sequence": _read_sequence,
}
