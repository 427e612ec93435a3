"""Learning and applying merges, held against the trainer and the BPE model of the `tokenizers` library."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from minillm.tokenizers.byte_alphabet import BYTE_ALPHABET
from minillm.tokenizers.merges import (
    SHORT_WORD,
    MergeTable,
    Pair,
    apply_merges_plain,
    learn_merges,
    learn_merges_plain,
)

# Few letters: many ties, many runs of one letter, many pairs that overlap.
words = st.one_of(*(st.text(alphabet, min_size=1, max_size=16) for alphabet in ("a", "ab", "abc", "abcdef")))
word_counts = st.dictionaries(words, st.integers(1, 9), min_size=1, max_size=12)


def peer_merges(counts: dict[str, int], vocab_size: int, min_frequency: int) -> tuple[list[list[str]], dict[str, int]]:
    tokenizer = Tokenizer(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join([word] * count) for word, count in counts.items()], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["merges"], model["vocab"]


def by_name(merges: dict[Pair, int]) -> tuple[list[list[str]], dict[str, int]]:
    token = dict(enumerate(BYTE_ALPHABET))
    for (left, right), merged in merges.items():
        token[merged] = token[left] + token[right]
    named = [[token[left].decode(), token[right].decode()] for left, right in merges]
    return named, {spelling: i for i, spelling in enumerate(token.values())}


@given(word_counts, st.integers(0, 60), st.integers(1, 3))
def test_learned_merges_are_those_of_the_tokenizers_trainer(
    counts: dict[str, int], n_merges: int, min_frequency: int
) -> None:
    encoded = {word.encode(): count for word, count in counts.items()}
    fast = learn_merges(encoded, BYTE_ALPHABET, 256 + n_merges, min_frequency)
    plain = learn_merges_plain(encoded, BYTE_ALPHABET, 256 + n_merges, min_frequency)
    assert list(fast.items()) == list(plain.items())
    expected_merges, expected_vocabulary = peer_merges(counts, 256 + n_merges, min_frequency)
    names, ids = by_name(fast)
    assert names == expected_merges
    learned = {spelling.decode("latin-1"): i for spelling, i in ids.items() if i >= 256}
    assert learned == {spelling: i for spelling, i in expected_vocabulary.items() if i >= 256}


def test_ties_go_to_the_smaller_left_id_and_then_to_the_smaller_right_id() -> None:
    merges = learn_merges({b"cd": 1, b"ab": 1, b"ac": 1}, BYTE_ALPHABET, 259)
    assert by_name(merges)[0] == [["a", "b"], ["a", "c"], ["c", "d"]]


def test_a_merge_that_spells_an_existing_token_gets_its_id() -> None:
    tokens = [b"ab", *BYTE_ALPHABET]
    for learn in (learn_merges, learn_merges_plain):
        merges = learn({b"abc": 2}, tokens, 258)
        assert list(merges.values()) == [0, 257]


def test_a_run_of_one_letter_merges_from_left_to_right() -> None:
    a = BYTE_ALPHABET.index(b"a")
    assert learn_merges({b"aaa": 1}, BYTE_ALPHABET, 300) == {(a, a): 256, (256, a): 257}


@st.composite
def merge_lists(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Merges in any order, also one in which no trainer would learn them."""
    tokens = ["a", "b", "c"]
    merges: list[tuple[str, str]] = []
    for _ in range(draw(st.integers(0, 12))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if pair not in merges and len(pair[0] + pair[1]) <= 8:
            merges.append(pair)
            tokens.append(pair[0] + pair[1])
    return draw(st.permutations(merges))


@given(merge_lists(), st.lists(st.text("abc", min_size=1, max_size=30), min_size=1, max_size=5))
def test_applied_merges_are_those_of_the_tokenizers_model(merges: list[tuple[str, str]], texts: list[str]) -> None:
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(["a", "b", "c", *(a + b for a, b in merges)]))}
    by_id = {(vocabulary[a], vocabulary[b]): vocabulary[a + b] for a, b in merges}
    table = MergeTable(by_id)
    peer = Tokenizer(models.BPE(vocabulary, merges))
    for text in texts:
        ids = [vocabulary[letter] for letter in text]
        expected = peer.encode(text).ids
        assert apply_merges_plain(ids, by_id) == expected
        assert table._apply_to_short(ids) == expected
        assert table._apply_to_long(ids) == expected


@pytest.mark.parametrize("length", [0, 1, 2, SHORT_WORD - 1, SHORT_WORD, SHORT_WORD + 1, 500])
def test_short_and_long_words_agree(length: int) -> None:
    rng = random.Random(length)
    word = [rng.randrange(3) for _ in range(length)]
    merges = {(0, 0): 3, (1, 2): 4, (3, 3): 5, (0, 4): 6, (4, 4): 7, (5, 1): 8}
    assert MergeTable(merges).apply(word) == apply_merges_plain(word, merges)


def test_a_word_of_a_hundred_thousand_letters_is_encoded() -> None:
    merges = learn_merges({b"a" * 1024: 1}, BYTE_ALPHABET, 266)  # a token each for 2, 4, ... 1024 letters
    ids = MergeTable(merges).apply([BYTE_ALPHABET.index(b"a")] * 100_000)
    assert ids == [265] * 97 + [264, 262, 260]
