"""The split patterns, held against the `tokenizers` library's, which runs them in another regex engine."""

import sys

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from minillm.tokenizers.split_patterns import SPLIT_PATTERNS, split_pattern

# What the patterns look at: letters, digits, punctuation, quotes and contractions in both cases, all kinds of space,
# separators that only some engines call space, and characters that fold to ASCII letters.
tricky = st.one_of(
    st.sampled_from(" \t\n\r\v\f\x1c\x1f\x85\xa0\u2028\u3000\u200baZ07._'!éß\u0301\u017f\u212aⅧ½٣中😀"),
    st.sampled_from(
        ["'s", "'S", "'ll", "'Ll", "'re", "'x", "'\u017f", "👩\u200d💻", "\r\n", "  ", "foo bar", "12345", "..\n"]
    ),
)
tricky_text = st.lists(tricky, max_size=30).map("".join)
ascii_text = st.one_of(
    st.text(st.characters(max_codepoint=127), max_size=40),
    tricky_text.filter(str.isascii),
    st.text(" \n'sS.1", max_size=12),
)
names = pytest.mark.parametrize("name", list(SPLIT_PATTERNS))


def peer_split(name: str, text: str) -> list[str]:
    pattern = SPLIT_PATTERNS[name].published
    return [piece for piece, _ in pre_tokenizers.Split(Regex(pattern), "isolated").pre_tokenize_str(text)]


def split(name: str, text: str, block_length: int = 4096) -> list[str]:
    return [piece for block in SPLIT_PATTERNS[name].split(text, block_length) for piece in block]


@names
@given(text=ascii_text)
def test_the_ascii_form_splits_as_the_published_one(name: str, text: str) -> None:
    pattern = SPLIT_PATTERNS[name]
    assert pattern.split_ascii(text) == pattern.split_unicode(text)


@names
@given(text=tricky_text)
def test_pieces_are_those_of_tokenizers(name: str, text: str) -> None:
    assert split(name, text) == peer_split(name, text)


@names
@given(text=tricky_text, block_length=st.integers(0, 20))
def test_cutting_into_blocks_changes_nothing(name: str, text: str, block_length: int) -> None:
    assert split(name, text, block_length) == regex.findall(SPLIT_PATTERNS[name].published, text)


@pytest.fixture(scope="module")
def known_to_both() -> list[str]:
    """The characters that both engines have (less those for private use): their Unicode versions need not be equal."""
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, sys.maxunicode + 1)]))
    ours = regex.sub(r"[\p{Cn}\p{Co}]+", "", every)
    left = pre_tokenizers.Split(Regex(r"\p{Cn}+"), "removed").pre_tokenize_str(ours)
    characters = [c for piece, _ in left for c in piece]
    assert len(characters) > 140_000
    return characters


@names
def test_every_character_that_both_engines_know_is_split_as_in_tokenizers(name: str, known_to_both: list[str]) -> None:
    for start in range(0, len(known_to_both), 512):
        # A letter, a digit, a space and anything else each cut this line in another way.
        text = "".join(f"a{c}{c}1\n" for c in known_to_both[start : start + 512])
        assert SPLIT_PATTERNS[name].split_unicode(text) == peer_split(name, text)


@names
def test_nothing_is_lost(name: str) -> None:
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x30000)]))
    assert "".join(split(name, text)) == text


def test_known_splits() -> None:
    text = "We'll meet at 12345,\n\n  won't we?  "
    assert split("gpt2", text) == ["We", "'ll", " meet", " at", " 12345", ",", "\n\n ", " won", "'t", " we", "?", "  "]
    assert split("gpt4", text)[3:8] == [" at", " ", "123", "45", ",\n\n"]


def test_an_unknown_pattern_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"pattern must be one of 'gpt2', 'gpt4', got 'gpt3'"):
        split_pattern("gpt3")
