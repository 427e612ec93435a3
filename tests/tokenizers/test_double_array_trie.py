"""The trie in an array, held against looking at every text; the arrays are built here, by the plainest method."""

import struct
from typing import SupportsIndex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.tokenizers.double_array_trie import DoubleArrayTrie


def built(values: dict[str, int]) -> bytes:
    """The array of a trie: each state takes the first base that is nobody's and at which its places are free."""
    bases: set[int] = set()
    children: dict[bytes, set[int]] = {b"": set()}
    for text in values:
        data = text.encode()
        for n in range(len(data)):
            children.setdefault(data[:n], set()).add(data[n])
            children.setdefault(data[: n + 1], set())
    units = {0: 0}
    states = {b"": 0}
    encoded = {text.encode(): value for text, value in values.items()}
    for prefix in sorted(children):
        state, ends = states[prefix], prefix in encoded
        wanted = children[prefix] | ({0} if ends else set())
        free = (base for base in range(1, 1 << 16) if not any(base ^ byte in units for byte in wanted))
        base = next(base for base in free if base not in bases)
        bases.add(base)
        units[state] |= (state ^ base) << 10 | ends << 8
        if ends:
            units[base] = 0x80000000 | encoded[prefix]
        for byte in children[prefix]:
            units[base ^ byte] = byte
            states[prefix + bytes([byte])] = base ^ byte
    return struct.pack(f"<{max(units) + 1}I", *(units.get(at, 0) for at in range(max(units) + 1)))


alphabet = st.text("ab\u00e9\u4e2d\U0001f44d", min_size=1, max_size=4)


@given(st.dictionaries(alphabet, st.integers(0, 1000), min_size=1, max_size=12), st.text("ab\u00e9\u4e2d\U0001f44d\0"))
def test_all_texts_with_which_a_text_begins_are_found(values: dict[str, int], text: str) -> None:
    trie = DoubleArrayTrie(built(values))
    for start in range(len(text) + 1):
        found = [(start + len(known), value) for known, value in values.items() if text.startswith(known, start)]
        assert list(trie.prefixes(text, start)) == sorted(found)
    assert trie.single == {known for known in values if len(known) == 1}
    assert trie.first == {known[0] for known in values if len(known) > 1}
    assert trie.following == {character for known in values for character in known[1:]}
    assert trie.values == set(values.values())


def test_no_more_of_a_text_is_looked_at_than_the_trie_is_deep() -> None:
    class Counted(str):
        n_characters = 0

        def __getitem__(self, at: SupportsIndex | slice) -> str:
            found = super().__getitem__(at)
            self.n_characters += len(found)
            return found

    trie = DoubleArrayTrie(built({"ab": 1, "abbb": 2}))
    text = Counted("a" + "b" * 10_000)
    assert list(trie.prefixes(text)) == [(2, 1), (4, 2)]
    assert text.n_characters == 5


def test_damaged_arrays_are_refused() -> None:
    for units, message in (
        (b"", "multiple of 4 bytes, got 0"),
        (b"12345", "multiple of 4 bytes, got 5"),
        # "a" leads to a state in which a text ends, whose value lies beyond the array.
        (
            struct.pack(
                "<128I", 1 << 10, *[0x100 | 0xFF << 20 | ord("a") if i == 1 ^ ord("a") else 0 for i in range(1, 128)]
            ),
            "outside",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            DoubleArrayTrie(units)
