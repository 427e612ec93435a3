"""A trie in an array: finding which of many texts a text begins with, in a few steps a byte.

It is a "double array" as the library Darts-clone lays it out: 32-bit units, each a state. From state s, byte b leads to
t = s xor offset(s) xor b if the unit at t is labelled b; a state in which a text ends has its value at s xor offset(s).
SentencePiece's compiled normalizations are such arrays (see `character_map`).

Source: Aoe, "An efficient digital search algorithm by using a double-array structure" (1989).
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator

MAX_STEPS = 1 << 20  # those of SentencePiece's nmt_nfkc_cf are some ten thousand
_ROOT = 0
_LABEL = 0x800000FF  # of a value, the highest bit is set: it is nobody's label
_ENDS = 0x100
_VALUE = 0x7FFFFFFF


class DoubleArrayTrie:
    """The trie of a compiled map: from a text, by its UTF-8 bytes, to a number.

    Args:
        units: Its states and values, four bytes each.

    Raises:
        ValueError: The size is not a multiple of 4, a value lies outside, a text in it is not UTF-8, or it is too big.
    """

    def __init__(self, units: bytes) -> None:
        if not units or len(units) % 4:
            raise ValueError(f"a trie must have a multiple of 4 bytes, got {len(units)}")
        self._units = struct.unpack(f"<{len(units) // 4}I", units)
        # What leads from a state with base = s xor offset(s) by byte b is at base xor b: whoever is labelled b knows
        # its base. No text in a trie has a zero byte.
        self._leading_from: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for state, unit in enumerate(self._units):
            if 0 < (byte := unit & _LABEL) < 256:
                self._leading_from[state ^ byte].append((byte, state))
        self.single: set[str] = set()
        self.first: set[str] = set()
        self.following: set[str] = set()
        self.values: set[int] = set()
        self._read_alphabet()

    def prefixes(self, text: str, start: int = 0) -> Iterator[tuple[int, int]]:
        """(end, value) of each text of the trie that is `text[start:end]`, the shortest first.

        No more of the text is looked at than the trie has steps for, however long it is.
        """
        units = self._units
        state = _ROOT
        for at in range(start, len(text)):
            for byte in text[at].encode():
                state ^= _offset(units[state]) ^ byte
                # Units that nobody uses may be labelled zero: no text of the trie has such a byte.
                if state >= len(units) or units[state] & _LABEL != byte or not byte:
                    return
            if units[state] & _ENDS:
                yield at + 1, units[state ^ _offset(units[state])] & _VALUE

    def _read_alphabet(self) -> None:
        """Find the characters that are a text, that begin a longer one, and that follow in one."""
        pending = [_ROOT]
        seen = {_ROOT}  # like ends of texts are stored once: several ways may lead to one state
        steps = 0
        while pending:
            state = pending.pop()
            for character, after in self._characters_from(state, b""):
                if (steps := steps + 1) > MAX_STEPS:
                    raise ValueError(f"a trie must have at most {MAX_STEPS} steps from character to character")
                if state != _ROOT:
                    self.following.add(character)
                elif self._units[after] & _ENDS:
                    self.single.add(character)
                if state == _ROOT and self._leading_from.get(after ^ _offset(self._units[after])):
                    self.first.add(character)
                if after not in seen:
                    seen.add(after)
                    pending.append(after)

    def _characters_from(self, state: int, begun: bytes) -> Iterator[tuple[str, int]]:
        for byte, after in self._leading_from.get(state ^ _offset(self._units[state]), ()):
            character = begun + bytes([byte])
            unit = self._units[after]
            try:
                whole = character.decode()
            except UnicodeDecodeError as error:
                if error.reason != "unexpected end of data" or unit & _ENDS:
                    raise ValueError(f"a text of the trie has {character!r}, which is not UTF-8") from None
                yield from self._characters_from(after, character)
                continue
            if unit & _ENDS:
                if (at := after ^ _offset(unit)) >= len(self._units):
                    raise ValueError("a value lies outside the trie")
                self.values.add(self._units[at] & _VALUE)
            yield whole, after


def _offset(unit: int) -> int:
    """Bits 10 to 31 of a unit; if bit 9 is set, times 256."""
    return (unit >> 10) << ((unit & 0x200) >> 6)
