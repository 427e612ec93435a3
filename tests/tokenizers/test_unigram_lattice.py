"""The lattice of segmentations, held against all 2^(n-1) of them, against `tokenizers` and against `sentencepiece`."""

import random
from collections import Counter
from collections.abc import Iterator
from itertools import combinations, pairwise
from math import exp, inf, log
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import models

from minillm.data import load_corpus
from minillm.tokenizers.unigram_lattice import Lattice, Spans

# "d" is in no piece: unknown. Scores that are sums of each other make ties.
texts = st.text("abcd", max_size=9)
scores = st.one_of(st.integers(-8, 1).map(float), st.floats(-20, 0))
vocabularies = st.dictionaries(st.text("abc", min_size=1, max_size=4), scores, min_size=1, max_size=12)


def segmentations(lattice: Lattice, vocabulary: dict[str, float], text: str) -> Iterator[tuple[Spans, float]]:
    """Every segmentation there is, and its score added from left to right."""
    n = len(text)
    for n_cuts in range(max(n, 1)):
        for cuts in combinations(range(1, n), n_cuts):
            bounds = [0, *cuts, n] if n else []
            spans = list(pairwise(bounds))
            score = 0.0
            for start, end in spans:
                unknown = lattice.unknown_score if end - start == 1 else -inf
                score += vocabulary.get(text[start:end], unknown)
            if score > -inf:
                yield spans, score


@given(vocabularies, texts)
def test_the_best_path_is_the_best_of_all(vocabulary: dict[str, float], text: str) -> None:
    lattice = Lattice(vocabulary)
    everything = list(segmentations(lattice, vocabulary, text))
    best = lattice.best_path(text)
    assert (best.spans, best.score) in everything
    # Adding from the left, paths through a boundary are compared before the rest is added: equal but for rounding.
    assert best.score == pytest.approx(max(score for _, score in everything), abs=1e-12)
    assert lattice.viterbi(text) == best.spans


@given(vocabularies, texts)
def test_the_margin_is_the_closest_decision_along_the_path(vocabulary: dict[str, float], text: str) -> None:
    lattice = Lattice(vocabulary)
    best = lattice.best_path(text)
    gaps = [inf]
    for _, end in best.spans:
        last = {}  # the best score for each last piece of what ends here
        for spans, score in segmentations(lattice, vocabulary, text[:end]):
            last[spans[-1]] = max(score, last.get(spans[-1], -inf))
        ranked = sorted(last.values())
        gaps += [ranked[-1] - ranked[-2]] if len(ranked) > 1 else []
    assert best.margin == pytest.approx(min(gaps), abs=1e-12)


@given(vocabularies, texts, st.integers(1, 300))
def test_the_n_best_are_the_n_best_of_all(vocabulary: dict[str, float], text: str, n: int) -> None:
    lattice = Lattice(vocabulary)
    everything = sorted(segmentations(lattice, vocabulary, text), key=lambda found: -found[1])
    found = lattice.n_best(text, n)
    assert [score for _, score in found] == pytest.approx([score for _, score in everything[:n]], abs=1e-12)
    assert all(path in everything for path in found)
    assert len({tuple(spans) for spans, _ in found}) == len(found)
    assert found[0][0] == lattice.viterbi(text)


@given(vocabularies, texts, st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0]))
def test_likelihood_and_marginals_are_sums_over_all(vocabulary: dict[str, float], text: str, alpha: float) -> None:
    lattice = Lattice(vocabulary)
    everything = list(segmentations(lattice, vocabulary, text))
    largest = max(score for _, score in everything)
    total = largest * alpha + log(sum(exp(alpha * (score - largest)) for _, score in everything))
    expected: Counter[tuple[int, int]] = Counter()
    for spans, score in everything:
        for span in spans:
            expected[span] += exp(alpha * score - total)
    log_likelihood, marginals = lattice.marginals(text, alpha=alpha)
    assert log_likelihood == pytest.approx(total, abs=1e-9)
    assert marginals == pytest.approx(dict(expected), abs=1e-9)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("numpy_generator", [False, True])
def test_samples_come_as_often_as_they_are_likely(alpha: float, numpy_generator: bool) -> None:
    vocabulary = {"a": -1.0, "b": -1.5, "ab": -2.0, "aba": -3.0, "ba": -2.2, "bab": -2.9}
    lattice = Lattice(vocabulary)
    everything = {tuple(spans): exp(alpha * score) for spans, score in segmentations(lattice, vocabulary, "ababab")}
    rng = np.random.default_rng(0) if numpy_generator else random.Random(0)
    n = 4000
    drawn = Counter(tuple(lattice.sample("ababab", rng, alpha=alpha)) for _ in range(n))
    assert set(drawn) <= set(everything)
    total = sum(everything.values())
    expected = np.array([everything[spans] / total for spans in everything])
    counts = np.array([drawn[spans] for spans in everything])
    chi_squared = ((counts - n * expected) ** 2 / (n * expected)).sum()
    assert chi_squared < len(everything) + 4 * (2 * len(everything)) ** 0.5


def test_a_large_alpha_samples_the_best_path() -> None:
    lattice = Lattice({"a": -1.0, "b": -1.5, "ab": -2.0, "aba": -3.0})
    rng = random.Random(0)
    assert all(lattice.sample("ababdab", rng, alpha=1e6) == lattice.viterbi("ababdab") for _ in range(50))


def test_long_texts_neither_overflow_nor_underflow() -> None:
    lattice = Lattice({"a": -30.0, "b": -20.0, "ab": -45.0})
    text = "abbad" * 4000
    log_likelihood, marginals = lattice.marginals(text)
    assert log_likelihood >= lattice.best_path(text).score
    covered = Counter[int]()
    for (start, end), probability in marginals.items():
        for i in range(start, end):
            covered[i] += probability  # type: ignore[assignment]
    assert set(covered) == set(range(len(text)))
    assert list(covered.values()) == pytest.approx([1.0] * len(text), abs=1e-6)
    assert lattice.sample(text, random.Random(0))[-1][1] == len(text)


def fused(vocabulary: dict[str, float], text: str, spans: Spans) -> list[str]:
    """The pieces, with neighbouring unknown characters put together, as both libraries do."""
    out: list[str] = []
    unknown = False
    for start, end in spans:
        piece = text[start:end]
        if unknown and piece not in vocabulary:
            out[-1] += piece
        else:
            out.append(piece)
        unknown = piece not in vocabulary
    return out


@given(vocabularies, st.text("abcd", max_size=40))
def test_viterbi_equals_tokenizers(vocabulary: dict[str, float], text: str) -> None:
    assume(text)
    pieces = list(vocabulary.items())
    lattice = Lattice(dict(pieces), unknown_score=min(0.0, *vocabulary.values()) - 10)
    peer = models.Unigram([("<unk>", 0.0), *pieces], unk_id=0)
    assert fused(vocabulary, text, lattice.viterbi(text)) == [token.value for token in peer.tokenize(text)]


def sentencepiece_processor(vocabulary: dict[str, float]) -> sentencepiece.SentencePieceProcessor:
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = 1
    model.normalizer_spec.add_dummy_prefix = False
    model.normalizer_spec.remove_extra_whitespaces = False
    model.normalizer_spec.escape_whitespaces = False
    model.pieces.add(piece="<unk>", score=0.0, type=2)
    for piece, score in vocabulary.items():
        model.pieces.add(piece=piece, score=score, type=1)
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


# A sum of float32s in tenths is rounded differently behind every prefix: ties are broken both ways.
tenths = st.integers(-60, -1).map(lambda tenth: float(np.float32(tenth / 10)))


@settings(max_examples=60)
@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=4), tenths, min_size=4, max_size=14),
    st.integers(0, 1 << 30),
)
def test_where_the_margin_is_large_sentencepiece_has_the_same_path(vocabulary: dict[str, float], seed: int) -> None:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcd", [9, 9, 9, 1], k=rng.randint(1, 12))) for _ in range(50)]
    # No piece reaches across an "x": what stands between two of them is a stretch that can be encoded on its own.
    vocabulary["x"] = float(np.float32(-0.7))
    lattice = Lattice(vocabulary)
    theirs = sentencepiece_processor(vocabulary).encode("".join("x" + word for word in words), out_type=str)
    largest, score = max(-lattice.unknown_score, *map(abs, vocabulary.values())), 0.0
    for word in words:
        path = lattice.best_path("x" + word)
        found = []
        while len("".join(found)) < len(word) + 1:
            found.append(theirs.pop(0))
        # Each of at most n additions, on both paths, rounds by 2^-24 of its result.
        n = len(word) + 1
        if path.margin > 2.0 * n * 2.0**-24 * (abs(score) + n * largest):
            assert fused(vocabulary, "x" + word, path.spans) == found
        score += path.score
    assert not theirs


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Lattice, sentencepiece.SentencePieceProcessor, list[str]]:
    """A Unigram model that `sentencepiece` trained on English, its lattice, and words of that English."""
    words = sorted(set("".join(next(iter(load_corpus("python-docs")))).split()))[:2000]
    folder: Path = tmp_path_factory.mktemp("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(folder / "model"),
        vocab_size=300,
        hard_vocab_limit=False,
        add_dummy_prefix=False,
        minloglevel=2,
        num_threads=1,
    )
    peer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "model.model"))
    ids = range(3, peer.vocab_size())
    return Lattice({peer.id_to_piece(i): peer.get_score(i) for i in ids}), peer, words


def test_n_best_equal_sentencepiece(
    trained: tuple[Lattice, sentencepiece.SentencePieceProcessor, list[str]],
) -> None:
    lattice, peer, words = trained
    for word in words[::20]:
        ours = lattice.n_best(word, 8)
        theirs = peer.nbest_encode_as_proto(word, nbest_size=8).nbests
        assert [path.score for path in theirs] == pytest.approx([score for _, score in ours], abs=1e-3)
        # Its scores are float32 sums: near ties may come in another order.
        score_of = {tuple(word[start:end] for start, end in spans): score for spans, score in ours}
        for path in theirs:
            pieces = tuple(piece.surface for piece in path.pieces)
            assert score_of.get(pieces, ours[-1][1]) == pytest.approx(path.score, abs=1e-3)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_sentencepiece_samples_with_our_probabilities(
    trained: tuple[Lattice, sentencepiece.SentencePieceProcessor, list[str]], alpha: float
) -> None:
    lattice, peer, words = trained
    n = 2000
    for word in [word for word in words if 4 <= len(word) <= 6][:6]:
        log_likelihood, _ = lattice.marginals(word, alpha=alpha)
        drawn = Counter(
            tuple(peer.encode(word, out_type=str, enable_sampling=True, nbest_size=-1, alpha=alpha)) for _ in range(n)
        )
        paths = lattice.n_best(word, 2 ** len(word))
        counts = np.array([drawn[tuple(word[start:end] for start, end in spans)] for spans, _ in paths])
        probabilities = np.exp(np.array([alpha * score for _, score in paths]) - log_likelihood)
        assert probabilities.sum() == pytest.approx(1.0)
        assert counts.sum() == n
        # The library keeps its generator from one test to the next: six standard deviations leave nothing to chance.
        assert (abs(counts - n * probabilities) <= 6 * (n * probabilities * (1 - probabilities)) ** 0.5 + 1).all()


def test_an_empty_text_has_one_empty_segmentation() -> None:
    lattice = Lattice({"a": -1.0})
    assert lattice.best_path("") == ([], 0.0, inf)
    assert lattice.n_best("", 5) == [([], 0.0)]
    assert lattice.sample("", random.Random(0)) == []
    assert lattice.marginals("") == (0.0, {})


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({}, "at least one piece"),
        ({"": -1.0}, "must not be empty"),
        ({"a": -inf}, "must be finite, got -inf for 'a'"),
        ({"a": float("nan")}, "must be finite"),
    ],
)
def test_unusable_vocabularies_are_refused(vocabulary: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lattice(vocabulary)


def test_arguments_out_of_range_are_refused() -> None:
    lattice = Lattice({"a": -1.0})
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        lattice.n_best("aa", 0)
    for alpha in (-0.1, inf, float("nan")):
        with pytest.raises(ValueError, match="alpha must be"):
            lattice.sample("aa", random.Random(0), alpha=alpha)
        with pytest.raises(ValueError, match="alpha must be"):
            lattice.marginals("aa", alpha=alpha)
