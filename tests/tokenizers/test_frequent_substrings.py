"""Frequent substrings: the quick way gives what counting all substrings gives."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.data import load_corpus
from minillm.tokenizers.frequent_substrings import frequent_substrings, frequent_substrings_plain

words = st.dictionaries(
    st.one_of(st.text("ab", min_size=1, max_size=12), st.text("aé中👩", min_size=1, max_size=6)),
    st.integers(1, 5),
    max_size=12,
)


@given(words, st.integers(0, 60), st.integers(1, 8), st.integers(1, 6))
def test_both_ways_agree(word_counts: dict[str, int], limit: int, max_length: int, min_count: int) -> None:
    plain = frequent_substrings_plain(word_counts, limit, max_length=max_length, min_count=min_count)
    quick = frequent_substrings(word_counts, limit, max_length=max_length, min_count=min_count)
    assert list(quick.items()) == list(plain.items())


def test_both_ways_agree_on_real_text() -> None:
    word_counts = Counter("".join(next(iter(load_corpus("python-docs"))))[:20_000].split())
    for limit in (100, 10**6):
        plain = frequent_substrings_plain(word_counts, limit)
        assert list(frequent_substrings(word_counts, limit).items()) == list(plain.items())


@given(words, st.integers(1, 6))
def test_counts_are_right_and_every_repeat_is_inside_one_that_is_there(
    word_counts: dict[str, int], max_length: int
) -> None:
    found = frequent_substrings(word_counts, 10**6, max_length=max_length)
    assert set("".join(word_counts)) <= set(found)

    def occurrences(text: str) -> int:
        return sum(
            count * sum(word.startswith(text, start) for start in range(len(word)))
            for word, count in word_counts.items()
        )

    assert all(occurrences(text) == count for text, count in found.items())
    for word in word_counts:
        for start in range(len(word)):
            for end in range(start + 2, min(start + max_length, len(word)) + 1):
                text = word[start:end]
                if occurrences(text) >= 2:
                    assert any(text in other and found[other] == occurrences(text) for other in found)


def test_only_maximal_repeats_are_kept() -> None:
    assert frequent_substrings({"xquick": 2, "yquick": 1, "z": 1}, 100) == {
        **{"c": 3, "i": 3, "k": 3, "q": 3, "u": 3, "x": 2, "y": 1, "z": 1},
        **{"quick": 3, "xquick": 2},
    }
    # Longer ones than max_length are not there to stand for it.
    assert frequent_substrings({"abc": 2}, 100, max_length=2) == {"a": 2, "b": 2, "c": 2, "ab": 2, "bc": 2}


@pytest.mark.parametrize("function", [frequent_substrings, frequent_substrings_plain])
def test_no_words_have_no_substrings(function: object) -> None:
    assert callable(function)
    assert function({}, 10) == {}
