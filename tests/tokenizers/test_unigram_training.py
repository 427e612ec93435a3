"""Training of Unigram models: against brute force, its own plain version, and the trainers of both libraries."""

import io
import json
import math
from collections import Counter
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from minillm.data import load_corpus
from minillm.tokenizers.unigram_expectation import WordLattices
from minillm.tokenizers.unigram_lattice import Lattice
from minillm.tokenizers.unigram_pruning import prune
from minillm.tokenizers.unigram_training import LONGEST_WORD, ScriptCutter, em_step, em_step_plain, train_unigram

words = st.dictionaries(st.text("abc", min_size=1, max_size=9), st.integers(1, 9), min_size=1, max_size=8)
extra_pieces = st.sets(st.text("abc", min_size=2, max_size=5), max_size=12)


def equal_scores(pieces: list[str]) -> dict[str, float]:
    return dict.fromkeys(pieces, -math.log(len(pieces)))


@given(words, extra_pieces, st.integers(0, 1 << 20))
def test_both_em_steps_agree(word_counts: dict[str, int], extra: set[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = {piece: float(score) for piece, score in zip([*"abcd", *extra], rng.uniform(-30, 0, 99), strict=False)}
    plain, plain_likelihood = em_step_plain(word_counts, scores)
    quick, quick_likelihood = em_step(word_counts, scores)
    assert quick_likelihood == pytest.approx(plain_likelihood, rel=1e-12)
    assert list(quick) == list(plain)
    # A probability that is nearly 0 may be 0 in one of them: what counts is then cut off.
    assert {k: max(v, -200) for k, v in quick.items()} == pytest.approx({k: max(v, -200) for k, v in plain.items()})


@settings(max_examples=50)
@given(words, extra_pieces)
def test_the_likelihood_never_falls(word_counts: dict[str, int], extra: set[str]) -> None:
    scores = equal_scores([*"abc", *sorted(extra)])
    likelihoods = []
    for _ in range(8):
        scores, log_likelihood = em_step(word_counts, scores)
        likelihoods.append(log_likelihood)
    assert all(later >= earlier - 1e-9 * abs(earlier) for earlier, later in pairwise(likelihoods))
    assert sum(map(math.exp, scores.values())) == pytest.approx(1.0)


def test_em_finds_the_probabilities_that_are_best() -> None:
    # "ab" always, "a" never alone: the piece "ab" gets everything.
    scores = equal_scores(["a", "b", "ab"])
    for _ in range(60):
        scores, log_likelihood = em_step({"ab": 5, "abab": 2}, scores)
    assert math.exp(scores["ab"]) == pytest.approx(1.0)
    assert log_likelihood == pytest.approx(0.0, abs=1e-9)


@given(words, extra_pieces)
def test_taking_pieces_away_equals_starting_without_them(word_counts: dict[str, int], extra: set[str]) -> None:
    pieces = [*"abc", *sorted(extra)]
    lattices = WordLattices(word_counts, pieces)
    kept = np.array([i < 3 or i % 2 == 0 for i in range(len(pieces))])
    lattices.keep(kept)
    remaining = [piece for piece, keep in zip(pieces, kept, strict=True) if keep]
    scores = np.linspace(-1.0, -3.0, len(remaining))
    found, expected = lattices.expected_counts(scores), WordLattices(word_counts, remaining).expected_counts(scores)
    assert found[0] == pytest.approx(expected[0])
    assert found[1] == pytest.approx(expected[1])


@given(words, extra_pieces)
def test_best_paths_of_all_words_are_best(word_counts: dict[str, int], extra: set[str]) -> None:
    pieces = [*"abc", *sorted(extra)]
    scores = dict(zip(pieces, np.linspace(-1.0, -3.7, len(pieces)).tolist(), strict=True))
    lattice = Lattice(scores)
    for word, path in WordLattices(word_counts, pieces).best_paths(np.array(list(scores.values()))).items():
        assert "".join(pieces[piece] for piece in path[::-1]) == word
        assert sum(scores[pieces[piece]] for piece in path) == pytest.approx(lattice.best_path(word).score)
    alternatives = WordLattices(dict.fromkeys(pieces, 1), pieces, whole_words=False)
    for word, path in alternatives.best_paths(np.array(list(scores.values()))).items():
        without = Lattice({piece: score for piece, score in scores.items() if piece != word or len(word) == 1})
        assert sum(scores[pieces[piece]] for piece in path) == pytest.approx(without.best_path(word).score)


def test_long_words_of_likely_and_unlikely_pieces_stay_finite() -> None:
    word_counts = {"ab" * 250: 3, "a" * 512: 1, "zq" * 100: 2}
    scores = {"a": -0.1, "b": -50.0, "ab": -700.0, "z": -300.0, "q": -1.0, "aa": -0.1}
    plain, plain_likelihood = em_step_plain(word_counts, scores)
    quick, quick_likelihood = em_step(word_counts, scores)
    assert quick_likelihood == pytest.approx(plain_likelihood, rel=1e-12)
    assert math.isfinite(quick_likelihood)
    assert quick == pytest.approx(plain, rel=1e-6)


def test_the_piece_whose_loss_is_smallest_goes_first() -> None:
    pieces = ["a", "b", "c", "ab", "bc", "abc"]
    counts = np.array([5.0, 5.0, 5.0, 40.0, 1.0, 30.0])
    scores = np.log(counts / counts.sum())
    kept, left = prune(pieces, counts, scores, 5)
    assert [piece for piece, keep in zip(pieces, kept, strict=True) if not keep] == ["bc"]
    assert left.tolist() == [5.0, 6.0, 6.0, 40.0, 30.0]
    # Its parts get the occurrences of a piece: "abc" is then "ab" and "c".
    kept, left = prune(pieces, counts, scores, 4)
    assert [piece for piece, keep in zip(pieces, kept, strict=True) if keep] == ["a", "b", "c", "ab"]
    assert left.tolist() == [5.0, 6.0, 36.0, 70.0]
    kept, _ = prune(pieces, counts, scores, 0, {"bc"})
    assert [piece for piece, keep in zip(pieces, kept, strict=True) if keep] == ["a", "b", "c", "bc"]


@settings(max_examples=50)
@given(words, st.integers(3, 20), st.booleans())
def test_training_gives_what_was_asked_for(word_counts: dict[str, int], vocab_size: int, split: bool) -> None:
    scores = train_unigram(word_counts, vocab_size, split_by_script=split)
    assert len(scores) <= vocab_size
    assert set("".join(word_counts)) <= set(scores)
    assert sum(map(math.exp, scores.values())) == pytest.approx(1.0)
    assert list(scores.values()) == sorted(scores.values(), reverse=True)


def test_training_gives_exactly_as_many_pieces_and_the_required_ones() -> None:
    word_counts = english_words()
    for vocab_size in (150, 600):
        scores = train_unigram(word_counts, vocab_size, required_pieces=["▁quux", "中文"])
        assert len(scores) == vocab_size
        assert {"▁quux", "中文", "中", "x"} <= set(scores)
        assert max(map(len, scores)) <= 16
    assert max(map(len, train_unigram(word_counts, 300, max_piece_length=3))) == 3


def test_long_words_are_cut() -> None:
    scores = train_unigram({"ab" * 5000: 1, "x" + "中" * LONGEST_WORD: 2}, 20)
    assert {"a", "b", "x", "中"} <= set(scores)


def test_cutting_at_scripts() -> None:
    cut = ScriptCutter()
    assert cut("▁hello,world42") == ["▁hello", ",", "world", "42"]
    assert cut("▁(naïve)▁▁▁x▁▁") == ["▁(", "naïve", ")", "▁▁", "▁x", "▁▁"]
    assert cut("日本語とカタカナー,кот") == ["日本語とカタカナー", ",", "кот"]
    assert cut("e\u0301te\u0301 ▁") == ["e\u0301te\u0301", " ", "▁"]
    assert cut("Ａ١٢") == ["Ａ", "١٢"]
    assert cut("") == []
    scores = train_unigram({"▁ab12": 9, "▁ab,cd": 9, "12ab": 9}, 40, split_by_script=True)
    assert all(len(cut(piece)) == 1 for piece in scores)


@cache
def english_words() -> Counter[str]:
    text = "".join(load_corpus("python-docs"))
    return Counter("▁" + word for word in text[:70_000].split())


@cache
def other_words() -> Counter[str]:
    """Held out: what follows, as far as its characters are known."""
    text = "".join(load_corpus("python-docs"))
    known = set("".join(english_words()))
    return Counter("▁" + word for word in text[70_000:110_000].split() if known.issuperset(word))


def bits_per_byte(scores: dict[str, float], word_counts: Counter[str]) -> float:
    """Of the best segmentations; a space marker is the one byte that it stands for."""
    lattice = Lattice(scores)
    bits = -sum(count * lattice.best_path(word).score for word, count in word_counts.items()) / math.log(2)
    return bits / sum(count * len(word[1:].encode() + b" ") for word, count in word_counts.items())


def test_the_vocabulary_is_as_good_as_those_of_both_libraries() -> None:
    vocab_size = 600
    word_counts = english_words()
    text = [word for word, count in word_counts.items() for _ in range(count)]
    ours = train_unigram(word_counts, vocab_size)
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.UnigramTrainer(vocab_size=vocab_size + 1, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(text, trainer)
    peer = {token: score for token, score in iter_pieces(tokenizer) if token != "<unk>"}
    assert len(ours) == len(peer) == vocab_size
    assert len(set(ours) & set(peer)) / vocab_size > 0.6
    for sample in (word_counts, other_words()):
        assert bits_per_byte(ours, sample) < bits_per_byte(peer, sample)

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(" ".join(word[1:] for word in text[i : i + 20]) for i in range(0, len(text), 20)),
        model_writer=file,
        vocab_size=vocab_size + 3,
        character_coverage=1.0,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    peer = {processor.id_to_piece(i): processor.get_score(i) for i in range(3, vocab_size + 3)}
    ours = train_unigram(word_counts, vocab_size, split_by_script=True)
    assert len(set(ours) & set(peer)) / vocab_size > 0.6
    for sample in (word_counts, other_words()):
        assert bits_per_byte(ours, sample) < bits_per_byte(peer, sample)


def iter_pieces(tokenizer: Tokenizer) -> list[tuple[str, float]]:
    return [(token, score) for token, score in json.loads(tokenizer.to_str())["model"]["vocab"]]


@pytest.mark.parametrize(
    ("word_counts", "options", "message"),
    [
        ({}, {}, "at least one word"),
        ({"": 3}, {}, "at least one word"),
        ({"ab": 0}, {}, "counts must be at least 1, got 0"),
        ({"abc": 1}, {"vocab_size": 2}, "at least 3 \\(3 different characters and 0 longer required pieces\\), got 2"),
        ({"ab": 1}, {"vocab_size": 3, "required_pieces": ["xy"]}, "at least 5 .*got 3"),
        ({"ab": 1}, {"required_pieces": [""]}, "required piece must not be empty"),
        ({"ab": 1}, {"seed_size": 0}, "seed_size"),
        ({"ab": 1}, {"n_sub_iterations": 0}, "n_sub_iterations"),
        ({"ab": 1}, {"max_piece_length": 0}, "max_piece_length must be from 1 to 255, got 0"),
        ({"ab": 1}, {"shrinking_factor": 1.0}, "shrinking_factor must be between 0 and 1, got 1.0"),
    ],
)
def test_bad_arguments_are_refused(word_counts: dict[str, int], options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_unigram(word_counts, **{"vocab_size": 10, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("vocab_size", 9.0),
        ("seed_size", 2.5),
        ("seed_size", True),
        ("n_sub_iterations", 1.5),
        ("max_piece_length", "16"),
    ],
)
def test_numbers_must_be_integers(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name} must be an integer, got {value!r}"):
        train_unigram({"ab": 2}, **({"vocab_size": 9} | {name: value}))  # type: ignore[arg-type]


def test_flags_must_be_flags() -> None:
    with pytest.raises(TypeError, match="split_by_script must be True or False, got 1"):
        train_unigram({"ab": 2}, 9, split_by_script=1)  # type: ignore[arg-type]


def test_words_that_cannot_be_spelled_are_refused() -> None:
    with pytest.raises(ValueError, match="missing: \\['b'\\]"):
        WordLattices({"ab": 1}, ["a", "ab"])
    with pytest.raises(ValueError, match="1 to 512 characters"):
        WordLattices({"a" * 513: 1}, ["a"])
