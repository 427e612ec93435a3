"""What SentencePiece counts before it learns a vocabulary, and which texts may become a piece of it.

The text is normalized, spaces become "▁", and it is cut in front of each "▁": a piece has a space in front or none.
Characters so rare that the others cover the wished share of the text are left out; they fall to the unknown piece, or
to bytes. So do texts that are to stay one piece, such as "<mask>": what is left and right of them is counted apart.

Source: Kudo and Richardson, "SentencePiece" (2018), and the library's trainer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import regex

from minillm.tokenizers.arguments import checked_flag
from minillm.tokenizers.metaspace import SPACE
from minillm.tokenizers.unicode_scripts import SCRIPTS


@dataclass(frozen=True)
class PieceShape:
    """Which texts may be a piece.

    Attributes:
        max_length: In characters, "▁" included.
        split_by_script: A piece must not mix scripts: "1." and "ab" are pieces, "b1" and "aб" are not. Chinese
            characters, hiragana and katakana count as one script, digits and punctuation as another ("Common").
        split_by_number: Digits are of that script; False lets them stand beside letters.
        split_digits: A digit 0-9 is always a piece of its own.
        split_by_whitespace: "▁" stands only at the start of a piece; False allows it inside, not at the end.

    Raises:
        TypeError: One of the last four is no bool.
    """

    max_length: int = 16
    split_by_script: bool = True
    split_by_number: bool = True
    split_digits: bool = False
    split_by_whitespace: bool = True

    def __post_init__(self) -> None:
        for name in ("split_by_script", "split_by_number", "split_digits", "split_by_whitespace"):
            checked_flag(name, getattr(self, name))

    def __call__(self, text: str) -> bool:
        """Whether `text` may be a piece."""
        if not 0 < len(text) <= self.max_length or "\0" in text:
            return False
        if SPACE in text[1:] and (self.split_by_whitespace or text[-1] == SPACE):
            return False
        if self.split_digits and len(text) > 1 and _DIGIT.search(text):
            return False
        return not self.split_by_script or self._one_script(text)

    def cut(self, words: Mapping[str, int]) -> dict[str, int]:
        """Counted words in stretches that no piece reaches across: there are fewer different ones of these."""
        out: Counter[str] = Counter()
        for word, count in words.items():
            for stretch in self._stretches(word):
                out[stretch] += count
        return dict(out)

    def _stretches(self, word: str) -> list[str]:
        stretches = [part for part in _DIGIT_APART.split(word) if part] if self.split_digits else [word]
        if not self.split_by_script or not self.split_by_number:
            return stretches
        out: list[str] = []
        for stretch in stretches:
            if stretch.removeprefix(SPACE).isascii():
                out += _LETTERS_APART.findall(stretch)
                continue
            start, before = 0, _INHERITED
            for at, character in enumerate(stretch):
                script = _INHERITED if character == SPACE else _script(character)
                if _INHERITED not in (before, script) and before != script:
                    out.append(stretch[start:at])
                    start = at
                before = script
            out.append(stretch[start:])
        return out

    def _one_script(self, text: str) -> bool:
        before = _ANY
        for character in text:
            if character == SPACE:
                continue
            script = _script(character)
            if script == _INHERITED:
                script = before
            if not self.split_by_number and _DIGIT.match(character):
                script = _ANY
            if _ANY not in (before, script) and before != script:
                return False
            before = script
        return True


# Only these digits, narrow and wide, are digits to SentencePiece.
_DIGIT = re.compile("[0-9０-９]")
# Of ASCII, behind a space or none: all that are not letters are of one script.
_LETTERS_APART = re.compile("▁?(?:[A-Za-z]+|[^A-Za-z▁]+)|▁")
_DIGIT_APART = re.compile("([0-9０-９])")
_ANY = -1
_OTHER_SCRIPTS = [script for script in SCRIPTS if script != "Inherited"]
_SCRIPT = regex.compile(
    "|".join(
        [r"(\p{Script=Han}|\p{Script=Hiragana}|\p{Script=Katakana}|\u30FC)", r"(\p{Script=Inherited})"]
        + [rf"(\p{{Script={script}}})" for script in _OTHER_SCRIPTS]
    )
)
_INHERITED = 2


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> int:
    """A number for each script; 0 for Common, and for characters that have none."""
    match = _SCRIPT.match(character)
    return match.lastindex or 0 if match else 0


class Counts(NamedTuple):
    """What is learned from.

    Attributes:
        words: How often each word occurs. Only characters of the alphabet are in it.
        alphabet: How often each character occurs that is to be a piece; the most frequent first.
    """

    words: dict[str, int]
    alphabet: dict[str, int]


def split_words(text: str) -> list[str]:
    """A text in which spaces are "▁", cut in front of each of them; may begin with an empty word."""
    return text.replace(SPACE, " " + SPACE).split(" ")


def count_words(
    texts: Iterable[str], *, coverage: float, reserved: Iterable[str] = (), split_by_whitespace: bool = True
) -> Counts:
    """Count the words of normalized texts, which are read one after the other and not kept.

    Args:
        texts: In which spaces are "▁".
        coverage: The share of all characters that the alphabet is to cover, from the most frequent character down.
        reserved: Texts that are pieces already. Words end at them.
        split_by_whitespace: Cut in front of each "▁"; False takes each text as one word.
    """
    longest_first = sorted(reserved, key=len, reverse=True)
    cuts = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
    counted: Counter[str] = Counter()
    n_reserved = 0
    for text in texts:
        parts = cuts.split(text)
        n_reserved += len(parts) - 1
        for part in parts:
            counted.update(split_words(part) if split_by_whitespace else [part])
    counted.pop("", None)
    characters: Counter[str] = Counter()
    for word, count in counted.items():
        for character in word:
            characters[character] += count
    characters.pop("\0", None)
    # As to the library, each reserved text is one character of those that are to be covered.
    alphabet = _covering(characters | {"": n_reserved}, coverage)
    alphabet.pop("", None)
    rare = characters.keys() - alphabet.keys() | {"\0"}
    apart = re.compile(f"[{re.escape(''.join(sorted(rare)))}]+")
    words: Counter[str] = Counter()
    for word, count in counted.items():
        if rare.isdisjoint(word):
            words[word] += count
        else:
            for part in filter(None, apart.split(word)):
                words[part] += count
    return Counts(dict(words), alphabet)


def _covering(characters: Mapping[str, int], coverage: float) -> dict[str, int]:
    """The most frequent characters until they cover the share; of equally frequent ones, smaller code points first."""
    total = sum(characters.values())
    covered = 0
    alphabet: dict[str, int] = {}
    for character, count in sorted(characters.items(), key=lambda item: (-item[1], item[0])):
        if covered >= coverage * total:
            break
        covered += count
        alphabet[character] = count
    return alphabet
