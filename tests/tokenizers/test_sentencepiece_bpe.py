"""BPE over characters: the plain and the fast versions agree, and training gives what `sentencepiece`'s gives."""

import io
from collections.abc import Callable, Iterable
from itertools import pairwise
from pydoc_data.topics import topics
from typing import Any

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from minillm.tokenizers.sentencepiece_bpe import PieceMerger, learn_pieces, learn_pieces_plain, merge_plain
from minillm.tokenizers.sentencepiece_words import PieceShape, count_words, split_words

LINES = [line for name in sorted(topics)[:40] for line in topics[name].split("\n") if line]
LINES += [
    "中文字符的测试，日本語のテキストとカタカナー",
    "Привет мир, как дела? x1y2 b\u0301e3",
    "１２３ 4५६ नमस्ते שלום",
] * 5
words = st.dictionaries(st.text("ab▁", min_size=1, max_size=8), st.integers(1, 4), min_size=1, max_size=8)
pieces = st.dictionaries(st.text("abc", min_size=2, max_size=4), st.sampled_from([-3.0, -2.0, -1.0, 0.0, 1.5]))


def anything(_: str) -> bool:
    return True


@given(words, st.integers(0, 12), st.sampled_from([anything, PieceShape(3), PieceShape(split_by_whitespace=False)]))
def test_the_fast_trainer_equals_the_plain_one(
    word_counts: dict[str, int], n_pieces: int, is_piece: Callable[[str], bool]
) -> None:
    assert learn_pieces(word_counts, n_pieces, is_piece) == learn_pieces_plain(word_counts, n_pieces, is_piece)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, PieceShape()),
        ({"split_digits": True, "max_sentencepiece_length": 5}, PieceShape(5, split_digits=True)),
        ({"split_by_number": False}, PieceShape(split_by_number=False)),
        ({"split_by_unicode_script": False}, PieceShape(split_by_script=False)),
        ({"split_by_whitespace": False}, PieceShape(split_by_whitespace=False)),
        ({"character_coverage": 0.98, "user_defined_symbols": ["the", "<x>"]}, PieceShape()),
    ],
)
def test_training_learns_what_sentencepiece_learns(options: dict[str, Any], shape: PieceShape) -> None:
    vocab_size = 900
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES),
        model_writer=file,
        vocab_size=vocab_size,
        model_type="bpe",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    reserved = ["<unk>", "<s>", "</s>", *options.get("user_defined_symbols", [])]
    counts = count_words(
        ("▁" + line.replace(" ", "▁") for line in LINES),
        coverage=options.get("character_coverage", 0.9995),
        reserved=reserved,
        split_by_whitespace=shape.split_by_whitespace,
    )
    merged = learn_pieces(shape.cut(counts.words), vocab_size - len(reserved) - len(counts.alphabet), shape)
    assert [*reserved, *merged, *counts.alphabet] == [theirs.id_to_piece(i) for i in range(vocab_size)]


@given(st.text("abcd", max_size=30), pieces)
def test_merging_by_score_equals_the_plain_reading(word: str, scores: dict[str, float]) -> None:
    merger = PieceMerger.of_scores(scores)
    plain = merge_plain(list(word), scores)
    assert merger.merge(word) == plain
    assert merger._merge_long(word, {}) == plain


@given(st.text("abc", min_size=1, max_size=6), st.integers(20, 60), pieces)
def test_long_words_are_merged_like_short_ones(part: str, repeats: int, scores: dict[str, float]) -> None:
    merger = PieceMerger.of_scores(scores)
    assert merger.merge(part * repeats) == merger._merge_short(part * repeats, {})


@given(st.text("abc", max_size=12), st.lists(st.tuples(st.text("abc", min_size=1, max_size=2), st.sampled_from("abc"))))
def test_merging_by_a_list_of_merges(word: str, merges: list[tuple[str, str]]) -> None:
    symbols = list(word)
    rank = {pair: n for n, pair in enumerate(merges)}
    while found := [(rank[pair], at) for at, pair in enumerate(pairwise(symbols)) if pair in rank]:
        _, at = min(found)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    merger = PieceMerger.of_merges(merges)
    assert merger.merge(word) == merger._merge_long(word, {}) == symbols


def test_a_very_long_word_takes_no_quadratic_time() -> None:
    merger = PieceMerger.of_scores({"a" * 2**n: -n for n in range(1, 9)})
    assert merger.merge("a" * 100_000) == ["a" * 256] * 390 + ["a" * 128, "a" * 32]


def test_unused_pieces_are_taken_apart() -> None:
    scores = {"ab": -1.0, "abc": -2.0, "abcd": -3.0}
    assert PieceMerger.of_scores(scores, unused=["ab", "abcd"]).merge("abcdabab") == ["abc", "d", "a", "b", "a", "b"]
    assert PieceMerger.of_scores(scores, unused=["ab"]).merge("ab" * 100) == ["a", "b"] * 100


@pytest.mark.parametrize(
    ("shape", "allowed", "refused"),
    [
        (
            PieceShape(),
            ["▁ab", "12.", "日本ノの", "b\u0301", "▁", "\u0301б"],
            ["a1", "aб", "▁▁", "a▁", "日a", "a" * 17, ""],
        ),
        (PieceShape(split_by_number=False), ["a1", "1日"], ["a.", "a\0"]),
        (PieceShape(split_digits=True), ["1", "५६", "▁a"], ["12", "▁1", "１."]),
        (PieceShape(2, split_by_script=False), ["a1", "a."], ["abc", "▁▁"]),
        (PieceShape(split_by_whitespace=False), ["▁a▁b", "a▁b"], ["a▁", "▁▁"]),
    ],
)
def test_which_texts_may_be_pieces(shape: PieceShape, allowed: Iterable[str], refused: Iterable[str]) -> None:
    assert [text for text in allowed if not shape(text)] == []
    assert [text for text in refused if shape(text)] == []


def test_counting_words() -> None:
    counts = count_words(["▁ab▁ab▁c", "▁ab<x>ab\0z"], coverage=0.9, reserved=["<x>", "<"])
    assert counts.words == {"▁ab": 3, "▁c": 1, "ab": 1}
    assert counts.alphabet == {"a": 4, "b": 4, "▁": 4, "c": 1}
    assert split_words("▁a▁▁b") == ["", "▁a", "▁", "▁b"]


def test_words_are_cut_where_no_piece_can_be() -> None:
    words = {"▁ab12.": 2, "▁1": 3, "日本のab́б": 1, "▁": 1}
    assert PieceShape().cut(words) == {"▁ab": 2, "12.": 2, "▁1": 3, "日本の": 1, "ab́б": 1, "▁": 1}
    assert PieceShape(split_digits=True).cut({"▁ab12.": 2}) == {"▁ab": 2, "1": 2, "2": 2, ".": 2}
    assert PieceShape(split_by_number=False).cut(words) == PieceShape(split_by_script=False).cut(words) == words
    assert PieceShape(split_by_whitespace=False).cut({"▁a▁b.é▁é1": 1}) == {"▁a▁b": 1, ".": 1, "é▁é": 1, "1": 1}
