r"""What to look for in a text: a string as it is, or a regular expression.

Files of Hugging Face's `tokenizers` hold regular expressions as Oniguruma, Ruby's engine, reads them. The `regex`
library reads most of them in the same way, given some care: `^` and `$` match at the begin and end of every line, `&&`
and brackets within brackets make classes out of classes, and the search goes on in another way after an empty match.
What it would read differently is refused. A difference remains in eight characters: `\w` and `\b` take ¹²³¼½¾ for parts
of words there, here U+200C and U+200D.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import regex

# (?m: is there what (?s: is here, \h is a hexadecimal digit, \Z may have a line end behind it.
_READ_DIFFERENTLY = re.compile(r"(?<!\\)(?:\\\\)*(\(\?[a-z]*[ms][a-z]*[-:)]|\\[hHRZ])")
# A class inside of a class, other than [:alpha:] and the like, or an intersection: version 1 of `regex` reads these.
_NESTED_CLASS = re.compile(r"&&|(?<!\\)(?:\\\\)*\[\^?\]?(?:[^\]\\\[]|\\.|\[:)*\[(?!:)", re.DOTALL)


@dataclass(frozen=True)
class Regex:
    """A regular expression.

    Attributes:
        pattern: In the syntax that the `regex` library and Oniguruma have in common.

    Raises:
        TypeError: `pattern` is not a str.
        ValueError: It is no regular expression, or one that the two engines read differently.
    """

    pattern: str
    compiled: regex.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise TypeError(f"pattern must be a str, got {type(self.pattern).__name__}")
        if found := _READ_DIFFERENTLY.search(self.pattern):
            raise ValueError(f"pattern {self.pattern!r} must not use {found[1]!r}: engines read it differently")
        try:
            flags = regex.MULTILINE | (regex.VERSION1 if _NESTED_CLASS.search(self.pattern) else regex.VERSION0)
            object.__setattr__(self, "compiled", regex.compile(self.pattern, flags))
        except regex.error as error:
            raise ValueError(f"pattern {self.pattern!r} is not a regular expression: {error}") from None


def compile_pattern(pattern: str | Regex) -> re.Pattern[str] | regex.Pattern[str]:
    """Something with `search` and `finditer`; TypeError if `pattern` is neither a str nor a `Regex`."""
    if isinstance(pattern, Regex):
        return pattern.compiled
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a str or a Regex, got {type(pattern).__name__}")
    return re.compile(re.escape(pattern))


def find_matches(compiled: re.Pattern[str] | regex.Pattern[str], text: str) -> Iterator[tuple[int, int]]:
    """(start, end) of all matches, from left to right; none in an empty text.

    No match is empty right behind another match: in its stead, the search goes on one character further (`finditer`
    would let it pass and then try for a longer one at the same place).
    """
    if not text:
        return
    position = 0
    for match in compiled.finditer(text):
        start, end = match.span()
        if start == end:
            break
        yield start, end
        position = end
    else:
        return
    last_end = position or None
    while position <= len(text) and (match := compiled.search(text, position)):
        start, end = match.span()
        if start == end == last_end:
            position += 1
            continue
        yield start, end
        position = last_end = end


def pattern_to_json(pattern: str | Regex) -> dict[str, str]:
    """{"String": ...} or {"Regex": ...}."""
    return {"Regex": pattern.pattern} if isinstance(pattern, Regex) else {"String": pattern}


def pattern_from_json(part: Mapping[str, Any]) -> str | Regex:
    """The reverse of `pattern_to_json`; ValueError for anything else."""
    match part:
        case {"String": str(text), **others} if not others:
            return text
        case {"Regex": str(text), **others} if not others:
            return Regex(text)
    raise ValueError(f"a pattern must be {{'String': text}} or {{'Regex': text}}, got {part!r}")
