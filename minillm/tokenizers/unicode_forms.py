"""Unicode's four normalization forms, with the origin of each character.

Many texts can be written in several ways: `é` is one code point, or `e` and a combining accent; `ﬁ` is one, or `f` and
`i`. NFD takes characters apart, NFC takes them apart and puts them together again, NFKD and NFKC also replace
characters that differ in looks only. Combining marks on one letter are put into a fixed order.

Which characters are in the tables is a matter of Python's Unicode version (`unicodedata.unidata_version`).

Source: Unicode Standard Annex 15, "Unicode normalization forms", and the Unicode Standard, section 3.11.
"""

from __future__ import annotations

import re
from itertools import accumulate, groupby
from typing import Any, Literal
from unicodedata import combining, is_normalized, normalize

import regex

from minillm.tokenizers.aligned_text import AlignedText

# No form changes ASCII; an ASCII character can be combined with what follows it, but never with what precedes it.
_MAY_CHANGE = re.compile(r"[\x00-\x7f]?[^\x00-\x7f]+")
# Python sorts the marks of a letter by insertion, in a time that grows with the square of their number, so runs of at
# least LONG are sorted before it sees them. Among every STRIDE-th character of the text, four in a row are of such a
# run: looking there is enough for nearly all texts. The five named are no marks, but are made of marks only.
STRIDE = 16
LONG = 4 * STRIDE
_MARK = r"[\P{ccc=0}\u0f73\u0f75\u0f81\uff9e\uff9f]"
_FOUR_MARKS = regex.compile(_MARK + "{4}")
_LONG_RUN = regex.compile(f"{_MARK}{{{LONG},}}+")


class _UnicodeForm:
    """`unicodedata.normalize`, and `align`, which gives each character of the result the stretch that it comes from.

    A character that was put together comes from the whole stretch that its parts cover. Where marks change places, the
    stretches of those that did are widened until none begins or ends before the one in front of it does, so that any
    stretch of the result comes from one stretch of the original. (`tokenizers` gives a character that was put together
    the place of its first part only, and counts marks that changed places as if they had not.)
    """

    form: Literal["NFC", "NFD", "NFKC", "NFKD"]

    def __call__(self, text: str) -> str:
        if len(text) >= LONG and not text.isascii() and _FOUR_MARKS.search(text[::STRIDE]):
            text = _LONG_RUN.sub(lambda run: _with_sorted_marks(run[0], _apart(self.form)), text)
        return normalize(self.form, text)

    def align(self, text: AlignedText) -> AlignedText:
        if is_normalized(self.form, text.text):
            return text
        characters: list[str] = []
        starts: list[int] = []
        ends: list[int] = []
        done = 0
        for match in _MAY_CHANGE.finditer(text.text):
            if is_normalized(self.form, match[0]):
                continue
            start, end = match.span()
            new = self._align(text.slice(start, end))
            characters += text.text[done:start], new.text
            starts += *text.starts[done:start], *new.starts
            ends += *text.ends[done:start], *new.ends
            done = end
        characters.append(text.text[done:])
        starts += text.starts[done:]
        ends += text.ends[done:]
        return AlignedText("".join(characters), starts, ends)

    def _align(self, text: AlignedText) -> AlignedText:
        apart = _decomposed(text, _apart(self.form))
        result = self(text.text)
        places = apart if self.form.endswith("D") else _composed(result, apart)
        # Widened so that both rise: no start after a later one, no end before an earlier one.
        starts = list(accumulate((start for _, start, _ in reversed(places)), min))[::-1]
        ends = list(accumulate((end for _, _, end in places), max))
        return AlignedText(result, starts, ends)

    def to_json(self) -> dict[str, Any]:
        """Its part of a tokenizer.json."""
        return {"type": self.form}


def _apart(form: str) -> Literal["NFD", "NFKD"]:
    return "NFKD" if "K" in form else "NFD"


def _with_sorted_marks(run: str, form: Literal["NFD", "NFKD"]) -> str:
    """Characters taken apart, marks sorted by their combining class, as a stable sort.

    Those that are marks to `regex` only, whose Unicode may be newer, keep their places, as all letters do.
    """
    parts = "".join([normalize(form, character) for character in run])
    stretches = (stretch for _, stretch in groupby(parts, key=lambda part: combining(part) > 0))
    return "".join(["".join(sorted(stretch, key=combining)) for stretch in stretches])


Place = tuple[str, int, int]  # a character and the stretch it comes from


def _decomposed(text: AlignedText, form: Literal["NFD", "NFKD"]) -> list[Place]:
    """All characters taken apart, and marks between two letters sorted by their combining class, as a stable sort."""
    places: list[Place] = []
    marks_from = 0  # from here on all are marks
    for character, start, end in zip(text.text, text.starts, text.ends, strict=True):
        for part in normalize(form, character):
            if combining(part) == 0:
                places[marks_from:] = sorted(places[marks_from:], key=_combining_class)
                marks_from = len(places) + 1
            places.append((part, start, end))
    places[marks_from:] = sorted(places[marks_from:], key=_combining_class)
    return places


def _combining_class(place: Place) -> int:
    return combining(place[0])


def _composed(result: str, apart: list[Place]) -> list[Place]:
    """The stretches of the characters of `result`, which were put together from those of `apart`.

    Each character was put together from the first ones, of those that are left, that it can be taken apart into.
    """
    used = [False] * len(apart)
    first_left = 0
    places = []
    for character in result:
        start, end = apart[first_left][1:]
        i = first_left
        for wanted in normalize("NFD", character):
            while used[i] or apart[i][0] != wanted:
                i += 1
            used[i] = True
            start, end = min(start, apart[i][1]), max(end, apart[i][2])
        places.append((character, start, end))
        while first_left < len(apart) and used[first_left]:
            first_left += 1
    return places


class NFC(_UnicodeForm):
    """Composed: `e` + accent becomes `é`."""

    form = "NFC"


class NFD(_UnicodeForm):
    """Decomposed: `é` becomes `e` + accent."""

    form = "NFD"


class NFKC(_UnicodeForm):
    """Composed, characters that differ in looks only made equal: `ﬁ` becomes `fi`, `²` becomes `2`."""

    form = "NFKC"


class NFKD(_UnicodeForm):
    """Decomposed, characters that differ in looks only made equal."""

    form = "NFKD"
