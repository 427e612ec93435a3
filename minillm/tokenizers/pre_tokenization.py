"""Pre-tokenization: cutting a text into pieces that no token will reach across.

    It's 12 o'clock.  ->  Whitespace            It ' s 12 o ' clock .
                          Digits(True)          It's_ 1 2 _o'clock.           (_ stands for a space here)
                          Metaspace             ▁It's ▁12 ▁o'clock.
                          GPT-2's pattern       It 's _12 _o ' clock .

Words, numbers and punctuation kept apart make a vocabulary of parts of words, and let a tokenizer remember what it did
to a piece: pieces repeat. Each pre-tokenizer gives the pieces of the one of that name in Hugging Face's `tokenizers`,
and is written in a tokenizer.json as it is there.

Patterns of one's own are in `split`, punctuation and digits in `character_split`, BERT's way is in `bert_text`,
SentencePiece's in `metaspace` and `unicode_scripts`, those of GPT in `split_patterns`.
Classes of characters are those of the installed `regex` library, so that every Python gives the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import regex

from minillm.tokenizers.aligned_text import AlignedText
from minillm.tokenizers.bert_text import BertPreTokenizer
from minillm.tokenizers.character_split import Digits, Punctuation
from minillm.tokenizers.json_file import kind
from minillm.tokenizers.json_options import read_options, read_parts
from minillm.tokenizers.metaspace import Metaspace, metaspace_from_json
from minillm.tokenizers.piece_pattern import PiecePattern
from minillm.tokenizers.split import BEHAVIORS, Split
from minillm.tokenizers.split_patterns import SPLIT_PATTERNS
from minillm.tokenizers.text_pattern import Regex, pattern_from_json
from minillm.tokenizers.unicode_scripts import UnicodeScripts

__all__ = [
    "BertPreTokenizer",
    "Digits",
    "Metaspace",
    "PreTokenizer",
    "PreTokenizerSequence",
    "Punctuation",
    "Regex",
    "Split",
    "UnicodeScripts",
    "Whitespace",
    "WhitespaceSplit",
    "pre_tokenizer_from_json",
    "treats_start_apart",
]


REMEMBERED_PIECES = 1 << 14


class PreTokenizer(Protocol):
    """A way of cutting text into pieces."""

    def split(self, text: str, *, at_start: bool = True) -> Iterator[list[str]]:
        """Yield the pieces of `text` in order, some at a time; `at_start`: it begins where the user's text does."""

    def align(self, text: AlignedText) -> list[AlignedText]:
        """The same pieces, and where their characters come from; one that comes from 0 begins the user's text."""

    def to_json(self) -> dict[str, Any]:
        """Its part of a tokenizer.json."""


class Whitespace(PiecePattern):
    r"""Words and what stands between them: the matches of ``\w+|[^\w\s]+``."""

    def __init__(self) -> None:
        ascii_pieces = re.compile(r"[A-Za-z0-9_]+|[^A-Za-z0-9_\t-\r ]+")
        super().__init__(regex.compile(r"\w+|[^\w\s]+").findall, ascii_pieces.findall, r"[!-~](?= )")

    def to_json(self) -> dict[str, Any]:
        return {"type": "Whitespace"}


class WhitespaceSplit(PiecePattern):
    """What stands between white space."""

    def __init__(self) -> None:
        super().__init__(_split_at_white_space, _split_at_white_space, r"[!-~](?= )")

    def to_json(self) -> dict[str, Any]:
        return {"type": "WhitespaceSplit"}


_SEPARATORS = re.compile(r"[\x1c-\x1f]")  # which are white space to Python, and not to Unicode
_NO_WHITE_SPACE = regex.compile(r"\S+")


def _split_at_white_space(text: str) -> list[str]:
    return _NO_WHITE_SPACE.findall(text) if _SEPARATORS.search(text) else text.split()


class PreTokenizerSequence:
    """Several pre-tokenizers: each cuts the pieces that the one before it made."""

    def __init__(self, pre_tokenizers: Iterable[PreTokenizer]) -> None:
        self.pre_tokenizers = list(pre_tokenizers)
        # Others than the first must know where a piece begins only if they treat the begin of the text in another way.
        self._needs_places = any(treats_start_apart(step) for step in self.pre_tokenizers[1:])

    def split(self, text: str, *, at_start: bool = True) -> Iterator[list[str]]:
        if self._needs_places or not self.pre_tokenizers:
            shift = 0 if at_start else 1
            place = range(shift, len(text) + shift)
            yield [piece.text for piece in self.align(AlignedText(text, place, place))]
            return
        cut: dict[str, list[str]] = {}  # pieces repeat
        for block in self.pre_tokenizers[0].split(text, at_start=at_start):
            pieces: list[str] = []
            for piece in block:
                if piece not in cut:
                    if len(cut) == REMEMBERED_PIECES:
                        cut.clear()
                    cut[piece] = self._cut_further(piece)
                pieces += cut[piece]
            yield pieces

    def _cut_further(self, piece: str) -> list[str]:
        pieces = [piece]
        for step in self.pre_tokenizers[1:]:
            pieces = [small for piece in pieces for block in step.split(piece, at_start=False) for small in block]
        return pieces

    def align(self, text: AlignedText) -> list[AlignedText]:
        pieces = [text] if text.text else []
        for step in self.pre_tokenizers:
            pieces = [small for piece in pieces for small in step.align(piece)]
        return pieces

    def to_json(self) -> dict[str, Any]:
        return {"type": "Sequence", "pretokenizers": [step.to_json() for step in self.pre_tokenizers]}


def treats_start_apart(step: PreTokenizer) -> bool:
    """Whether pieces depend on where the user's text begins: `align` then says more than `split` can after a normalizer
    that took the first character away."""
    if isinstance(step, PreTokenizerSequence):
        return any(map(treats_start_apart, step.pre_tokenizers))
    return isinstance(step, Metaspace) and step.prepend_scheme == "first"


def pre_tokenizer_from_json(part: Any) -> PreTokenizer | None:
    """The pre-tokenizer that a part of a tokenizer.json describes; None for none.

    Raises:
        ValueError: It is of an unknown type, or has options that are unknown or have other values than they may.
    """
    if part is None:
        return None
    read = _READERS.get(kind(part) or "")
    if read is None:
        raise ValueError(f"pre_tokenizer must be one of {', '.join(_READERS)}, got {kind(part) or part!r}")
    return read(part)


def _read_plain(
    pre_tokenizer: type[Whitespace | WhitespaceSplit | BertPreTokenizer | UnicodeScripts],
) -> Callable[[Any], PreTokenizer]:
    def read(part: Mapping[str, Any]) -> PreTokenizer:
        read_options(part)
        return pre_tokenizer()

    return read


def _read_punctuation(part: Mapping[str, Any]) -> PreTokenizer:
    return Punctuation(_behavior(read_options(part, behavior=(str, "Isolated"))))


def _behavior(options: dict[str, Any]) -> str:
    names = {spelled: name for name, spelled in BEHAVIORS.items()}
    if options["behavior"] not in names:
        raise ValueError(f"behavior must be one of {', '.join(names)}, got {options['behavior']!r}")
    return names[options["behavior"]]


def _read_digits(part: Mapping[str, Any]) -> PreTokenizer:
    return Digits(**read_options(part, individual_digits=(bool, False)))


def _read_split(part: Mapping[str, Any]) -> PreTokenizer:
    options = read_options(part, pattern=(dict,), behavior=(str,), invert=(bool, False))
    pattern, behavior, invert = pattern_from_json(options["pattern"]), _behavior(options), options["invert"]
    if isinstance(pattern, Regex) and (behavior, invert) == ("isolated", False):
        for known in SPLIT_PATTERNS.values():
            if pattern.pattern == known.published:
                return known
    return Split(pattern, behavior, invert=invert)


def _read_character_split(part: Mapping[str, Any]) -> PreTokenizer:
    delimiter = read_options(part, delimiter=(str,))["delimiter"]
    if len(delimiter) != 1:
        raise ValueError(f"delimiter must be one character, got {delimiter!r}")
    return Split(delimiter, "removed")


def _read_sequence(part: Mapping[str, Any]) -> PreTokenizer:
    steps = map(pre_tokenizer_from_json, read_parts(part, "pretokenizers"))
    return PreTokenizerSequence(step for step in steps if step is not None)


_READERS: dict[str, Callable[[Any], PreTokenizer]] = {
    "Whitespace": _read_plain(Whitespace),
    "WhitespaceSplit": _read_plain(WhitespaceSplit),
    "BertPreTokenizer": _read_plain(BertPreTokenizer),
    "UnicodeScripts": _read_plain(UnicodeScripts),
    "Punctuation": _read_punctuation,
    "Digits": _read_digits,
    "Split": _read_split,
    "CharDelimiterSplit": _read_character_split,
    "Metaspace": metaspace_from_json,
    "Sequence": _read_sequence,
}
