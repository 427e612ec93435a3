"""SentencePiece's normalization: a compiled map from short texts to what replaces them.

A `.model` file carries its normalization (NFKC with changes, mostly) as a table, so that no two programs can disagree
about a version of Unicode. It has two hundred thousand rules, most of them ways to write a Hangul syllable, and is one
block of bytes:

    size of the trie in bytes (4 bytes, little-endian) | trie | replacements, each ended by a zero byte

There are two readings of such a table. SentencePiece replaces, at each place from left to right, the longest rule that
matches. The `tokenizers` library ("Precompiled" in a tokenizer.json) goes from grapheme to grapheme: one of less than
six bytes is replaced as a whole by what the *shortest* rule at its start says; without one, and of longer graphemes,
each character is replaced alone. The two differ where a rule is followed by a combining mark: "ﬁ" + acute accent is
"fí" to one and "fi" to the other.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import regex

from minillm.tokenizers.aligned_text import AlignedText
from minillm.tokenizers.double_array_trie import DoubleArrayTrie

CACHE_SIZE = 1 << 14
CACHE_LENGTH = 32
_NOTHING = r"(?!)"
# Two of the letters that flags are made of are one grapheme. Where one begins in a run of them, \X finds by counting
# back to the first, for each anew; going from grapheme to grapheme, it is enough to take two while more follow.
_GRAPHEMES = regex.compile(r"\p{RI}{2}(?=\p{RI})|\X")
# Characters that are a grapheme by themselves, unless one that is not stands beside them (or, after \r, \n).
_ALONE = r"\p{GCB=Other}\p{GCB=Control}\p{GCB=CR}\p{GCB=LF}가-힣"
_BEYOND_ASCII = re.compile(r"((?:[ -~]?[^\0-\x7f]++)++[ -~]?|\r\n)")
_JOINED = regex.compile(rf"((?:\r\n|[{_ALONE}])?(?:[^{_ALONE}]+(?:\r\n|[{_ALONE}])?)+|\r\n)")


class CharacterMap:
    """A compiled normalization, as a normalizer.

    Args:
        compiled: The block of bytes, as in a `.model` file; empty for a map that changes nothing.
        by_grapheme: Read it as `tokenizers` does rather than as SentencePiece does.
        protected: Texts that stay as they are where they occur (the longest first), before any rule is looked at:
            SentencePiece's user-defined symbols. Not for reading by grapheme.

    Raises:
        ValueError: The block is damaged.
    """

    def __init__(self, compiled: bytes, *, by_grapheme: bool = False, protected: Iterable[str] = ()) -> None:
        if by_grapheme and protected:
            raise ValueError("protected must be empty when reading by grapheme")
        self.compiled = compiled
        self.by_grapheme = by_grapheme
        self._cache: dict[str, str] = {}
        self._trie: DoubleArrayTrie | None = None
        self._replacements = b""
        if compiled:
            self._trie, self._replacements = _read(compiled)
        protected = sorted(protected, key=len, reverse=True)
        self._protected = re.compile("|".join(map(re.escape, protected)) or _NOTHING)
        # Text is cut into stretches in which only single characters are replaced, which is fast, and the rest.
        self._single = re.compile(_one_of(self._trie.single.difference(protected)) if self._trie else _NOTHING)
        self._several = re.compile(_runs(self._trie, protected))
        # Whether two spaces in a row may be the doing of one rule, or stand in a protected text.
        self.keeps_double_spaces = b"  " in self._replacements or any("  " in text for text in protected)
        self._characters = _CharacterTable(self._single, self._rules_at)

    def __call__(self, text: str) -> str:
        """The normalized text."""
        if self._trie is None:
            return text
        parts = self._parts(text)
        parts[::2] = [part.translate(self._characters) for part in parts[::2]]
        parts[1::2] = map(self._normalized, parts[1::2])
        return "".join(parts)

    def align(self, text: AlignedText) -> AlignedText:
        """The same, with the origin of each character.

        SentencePiece says that all of a replacement comes from all of what was replaced. `tokenizers` pairs the
        characters of both one by one; what is left of the replacement comes from the last one replaced. What is removed
        at the very front belongs to the first character that is kept: the text still begins where it did.
        """
        if self._trie is None:
            return text
        characters: list[str] = []
        starts: list[int] = []
        ends: list[int] = []
        for start, end, replacement, by_rule in self._steps(text.text):
            characters.append(replacement)
            if not by_rule:
                starts += text.starts[start:end]
                ends += text.ends[start:end]
            elif self.by_grapheme:
                origins = [min(start + n, end - 1) for n in range(len(replacement))]
                starts += [text.starts[origin] for origin in origins]
                ends += [text.ends[origin] for origin in origins]
            else:
                starts += [text.starts[start]] * len(replacement)
                ends += [text.ends[end - 1]] * len(replacement)
        if self.by_grapheme and starts:
            starts[0] = text.starts[0]
        return AlignedText("".join(characters), starts, ends)

    def steps(self, text: str) -> Iterator[tuple[int, str]]:
        """(start, what replaces it) of each match of a rule, each protected text and each other character, in order."""
        for start, _, replacement, by_rule in self._steps(text) if text else ():
            if by_rule:
                yield start, replacement
            else:
                yield from enumerate(replacement, start)

    def to_json(self) -> dict[str, Any]:
        """The "Precompiled" normalizer of a tokenizer.json, which is always read by grapheme."""
        return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(self.compiled).decode()}

    @classmethod
    def from_json(cls, part: Mapping[str, Any]) -> CharacterMap:
        """From the "Precompiled" normalizer of a tokenizer.json; ValueError if it is damaged."""
        encoded = part.get("precompiled_charsmap")
        if not isinstance(encoded, str):
            raise ValueError(f"normalizer Precompiled must have a string 'precompiled_charsmap', got {encoded!r:.80}")
        try:
            return cls(base64.b64decode(encoded, validate=True), by_grapheme=True)
        except binascii.Error as error:
            raise ValueError(f"normalizer Precompiled: precompiled_charsmap is not base64: {error}") from None

    def _parts(self, text: str) -> list[str]:
        """Stretches of the text; in the first, third ... of them only single characters are replaced."""
        if not self.by_grapheme:
            return self._several.split(text)
        parts = [""]
        for n, part in enumerate(_BEYOND_ASCII.split(text)):
            alone, *rest = _JOINED.split(part) if n % 2 else [part]
            parts[-1] += alone
            parts += rest
        return parts

    def _normalized(self, text: str) -> str:
        known = self._cache.get(text)
        if known is None:
            known = "".join([replacement for _, _, replacement in self._walk(text)])
            if len(text) <= CACHE_LENGTH:
                if len(self._cache) >= CACHE_SIZE:
                    self._cache.clear()
                self._cache[text] = known
        return known

    def _steps(self, text: str) -> Iterator[tuple[int, int, str, bool]]:
        """(start, end, replacement, whether there was a rule) of text[start:end], from the first character to the last.

        A text that is protected counts as replaced by itself; stretches without rules are put together.
        """
        at = 0
        for n, part in enumerate(self._parts(text)):
            if n % 2:
                for start, end, replacement in self._walk(part):
                    yield at + start, at + end, replacement, True
            else:
                done = 0
                for match in self._single.finditer(part):
                    yield at + done, at + match.start(), part[done : match.start()], False
                    yield at + match.start(), at + match.end(), match.group().translate(self._characters), True
                    done = match.end()
                yield at + done, at + len(part), part[done:], False
            at += len(part)

    def _walk(self, text: str) -> Iterator[tuple[int, int, str]]:
        return self._walk_graphemes(text) if self.by_grapheme else self._walk_longest(text)

    def _walk_longest(self, text: str) -> Iterator[tuple[int, int, str]]:
        """SentencePiece's reading: a protected text, or the longest rule, or the character itself."""
        at = 0
        while at < len(text):
            end, replacement = at + 1, text[at]
            if protected := self._protected.match(text, at):
                end, replacement = protected.end(), protected.group()
            elif rules := self._rules_at(text, at):
                end, replacement = rules[-1]
            yield at, end, replacement
            at = end

    def _walk_graphemes(self, text: str) -> Iterator[tuple[int, int, str]]:
        """The reading of `tokenizers`: a short grapheme as a whole, others character by character."""
        for match in _GRAPHEMES.finditer(text):
            at, end = match.span()
            if len(match.group().encode()) < 6 and (rules := self._rules_at(match.group())):
                yield at, end, rules[0][1]
                continue
            for n, character in enumerate(match.group(), at):
                rules = self._rules_at(character)
                yield n, n + 1, rules[0][1] if rules else character

    def _rules_at(self, text: str, start: int = 0) -> list[tuple[int, str]]:
        """(end, replacement) of the rules for `text[start:end]`, the shortest first."""
        if self._trie is None:
            return []
        return [
            (end, self._replacements[value : self._replacements.index(b"\0", value)].decode())
            for end, value in self._trie.prefixes(text, start)
        ]


class _CharacterTable(dict[int, str]):
    """For `str.translate`: code point -> what replaces it, looked up when first asked for."""

    def __init__(self, single: re.Pattern[str], rules_at: Callable[[str], list[tuple[int, str]]]) -> None:
        self._single = single
        self._rules_at = rules_at

    def __missing__(self, code: int) -> str:
        character = chr(code)
        replacement = self._rules_at(character)[0][1] if self._single.match(character) else character
        if len(self) < CACHE_SIZE:
            self[code] = replacement
        return replacement


def _read(compiled: bytes) -> tuple[DoubleArrayTrie, bytes]:
    """The trie and the replacements of a compiled map; ValueError if they do not fit together."""
    size = int.from_bytes(compiled[:4], "little")
    if not 4 <= size <= len(compiled) - 4:
        raise ValueError(f"character map: its trie must have 4 to {len(compiled) - 4} bytes, got {size}")
    replacements = compiled[4 + size :]
    try:
        replacements.decode()
        trie = DoubleArrayTrie(compiled[4 : 4 + size])
    except ValueError as error:
        raise ValueError(f"character map: {error}") from None
    for value in trie.values:
        rest = replacements[value : value + 1]
        if not rest or 0x80 <= rest[0] < 0xC0 or b"\0" not in replacements[value:]:
            raise ValueError(f"character map: there is no replacement at {value}")
    return trie, replacements


def _one_of(characters: Iterable[str]) -> str:
    """A pattern for one of the characters; one for nothing if there are none.

    Characters that follow each other are written as a range: a class of thousands of characters beyond U+FFFF, which
    `re` goes through one by one, is then short.
    """
    codes = sorted(set(map(ord, characters)))
    if not codes:
        return _NOTHING
    firsts = [code for before, code in zip([-2, *codes], codes, strict=False) if code != before + 1]
    lasts = [code for code, after in zip(codes, [*codes[1:], -2], strict=True) if after != code + 1]
    ranges = (f"{re.escape(chr(first))}-{re.escape(chr(last))}" for first, last in zip(firsts, lasts, strict=True))
    return f"[{''.join(ranges)}]"


def _runs(trie: DoubleArrayTrie | None, protected: list[str]) -> str:
    """A pattern that finds each place at which a rule for several characters or a protected text may begin, all of it.

    A text of several characters begins with one of few and goes on with some of few (combining marks, mostly). None
    reaches beyond a run of the latter, so that runs can be looked at one by one.
    """
    first = {text[0] for text in protected if len(text) > 1}
    following = {character for text in protected for character in text[1:]}
    if trie is not None:
        first |= trie.first
        following |= trie.following
    if not first or not following:
        return _NOTHING
    # What begins a long rule is any letter, what follows is rare: looking for one range first is five times as fast.
    within = f"[{re.escape(min(following))}-{re.escape(max(following))}]"
    return f"((?=(?s:.){within})(?=(?s:.){_one_of(following)}){_one_of(first)}{_one_of(following)}+)"
