"""The synthetic English: one reading a sentence, exact probabilities, exact entropy for any tokenizer."""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
from collections import Counter

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from minillm.data import SyntheticGrammar
from minillm.tokenizers import ByteBPETokenizer


@pytest.fixture(scope="module")
def grammar() -> SyntheticGrammar:
    return SyntheticGrammar()


@pytest.fixture(scope="module")
def sentences(grammar: SyntheticGrammar) -> list[str]:
    return grammar.sample(1500, seed=11)


def within_error(values: list[float], expected: float, n_errors: float = 4.0) -> bool:
    return abs(statistics.fmean(values) - expected) < n_errors * statistics.stdev(values) / math.sqrt(len(values))


def test_entropy_is_the_mean_of_minus_log_probability(grammar: SyntheticGrammar, sentences: list[str]) -> None:
    surprise = [-grammar.log_probability(sentence) for sentence in sentences]
    assert within_error(surprise, grammar.entropy_per_sentence)
    assert 0.95 < grammar.entropy_per_sentence / statistics.fmean(surprise) < 1.05


def test_each_sentence_has_one_derivation(grammar: SyntheticGrammar, sentences: list[str]) -> None:
    assert {grammar.n_derivations(sentence) for sentence in sentences[:300]} == {1}


def test_probabilities_are_frequencies(grammar: SyntheticGrammar) -> None:
    sample = grammar.sample(20_000, seed=5)
    counts = Counter(sample)
    for sentence, count in counts.most_common(30):
        expected = 20_000 * math.exp(grammar.log_probability(sentence))
        assert abs(count - expected) < 5 * math.sqrt(expected)


def test_short_sentences_hold_the_probability_that_sampling_says(grammar: SyntheticGrammar) -> None:
    """All two-word sentences there could be, parsed: their probabilities add up to the share of them in a sample."""
    pairs = itertools.product(["Anna", "Ben", "Clara", "Julia", "Mary", "Paul", "Simon", "Victor"], grammar.words)
    total = math.fsum(math.exp(grammar.log_probability(f"{name} {word}.")) for name, word in pairs)
    n = 20_000
    seen = sum(len(sentence.split()) == 2 for sentence in grammar.sample(n, seed=6))
    assert abs(seen - n * total) < 4 * math.sqrt(n * total * (1 - total))


@pytest.mark.parametrize(
    "sentence",
    [
        "The dog chase the cat.",  # number
        "The dogs chases the cat.",
        "The dog near the girls chase the cat.",  # the attractor decides
        "The girl that the boys see wait.",
        "Anna likes his book.",  # gender
        "The boy near Anna likes her book.",
        "The boy that Anna likes helps herself.",
        "The king says that she sleeps.",
        "a dog sleeps.",
        "The dog sleeps",
        "The dog  sleeps.",
        "",
        ".",
    ],
)
def test_what_is_no_sentence_has_probability_zero(grammar: SyntheticGrammar, sentence: str) -> None:
    assert grammar.log_probability(sentence) == -math.inf
    assert grammar.n_derivations(sentence) == 0


@pytest.mark.parametrize(
    "sentence",
    [
        "The dog near the girls chases the cat.",
        "Anna likes her book and sleeps.",
        "The boy that Anna likes helps himself.\n",
        "The king says that he hopes that many horses that the queen sees wait outside.",
    ],
)
def test_what_is_a_sentence(grammar: SyntheticGrammar, sentence: str) -> None:
    assert -60 < grammar.log_probability(sentence) < -5
    assert grammar.log_probability(sentence.rstrip()) == grammar.log_probability(sentence.rstrip() + "\n")


def test_words_per_sentence(grammar: SyntheticGrammar, sentences: list[str]) -> None:
    assert within_error([len(sentence.split()) for sentence in sentences], grammar.words_per_sentence)
    assert grammar.entropy_per_token() == grammar.entropy_per_sentence / (grammar.words_per_sentence + 2)


def check_tokenizer(grammar: SyntheticGrammar, tokenizer: object, encode: object, sentences: list[str]) -> None:
    per_sentence = grammar.entropy_per_sentence / grammar.entropy_per_token(tokenizer)  # type: ignore[arg-type]
    text = "".join(sentence + "\n" for sentence in sentences)
    assert within_error([len(encode(sentence + "\n")) for sentence in sentences], per_sentence)  # type: ignore[operator]
    assert len(encode(text)) == sum(len(encode(sentence + "\n")) for sentence in sentences)  # type: ignore[operator]


@pytest.mark.parametrize("pattern", ["gpt2", "gpt4"])
@pytest.mark.parametrize("vocab_size", [256, 300, 600])
def test_entropy_per_token_of_byte_bpe(
    grammar: SyntheticGrammar, sentences: list[str], pattern: str, vocab_size: int
) -> None:
    tokenizer = ByteBPETokenizer.train(grammar.documents(5, seed=3), vocab_size, pattern=pattern)
    check_tokenizer(grammar, tokenizer, tokenizer.encode, sentences)


def test_entropy_per_token_of_another_library(grammar: SyntheticGrammar, sentences: list[str]) -> None:
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    library.train_from_iterator(grammar.documents(5, seed=3), trainer)

    class Wrapped:
        def encode(self, text: str) -> list[int]:
            return list(library.encode(text).ids)

    check_tokenizer(grammar, Wrapped(), Wrapped().encode, sentences)


def test_a_tokenizer_that_merges_words_is_refused(grammar: SyntheticGrammar) -> None:
    class Phrases:
        def encode(self, text: str) -> list[int]:
            return [0] * len(text.replace("likes the", "@"))

    with pytest.raises(ValueError, match="tokenizer must cut text before the space of each word"):
        grammar.entropy_per_token(Phrases())


def test_document_ends_are_counted() -> None:
    grammar = SyntheticGrammar(sentences_per_document=4)
    lengths = [text.count("\n") for text in grammar.documents(3000, seed=2)]
    assert min(lengths) == 1
    assert within_error([float(length) for length in lengths], 4.0)
    # By the document: 4 sentences and a geometric length, whose entropy a textbook gives, over 4 sentences and a token.
    stop = 1 / 4
    length_entropy = -(stop * math.log(stop) + (1 - stop) * math.log(1 - stop)) / stop
    n_tokens = 4 * (grammar.words_per_sentence + 2) + 1
    expected = (4 * grammar.entropy_per_sentence + length_entropy) / n_tokens
    assert grammar.entropy_per_token(end_of_text=True) == pytest.approx(expected)
    certain = SyntheticGrammar(sentences_per_document=1)
    assert certain.entropy_per_token(end_of_text=True) == pytest.approx(
        certain.entropy_per_sentence / (certain.words_per_sentence + 3)
    )


def test_the_seed_is_the_language_and_the_sample() -> None:
    one, again, two = SyntheticGrammar(1), SyntheticGrammar(1), SyntheticGrammar(2)
    assert one.sample(50, seed=3) == again.sample(50, seed=3)
    assert one.sample(50, seed=3) != one.sample(50, seed=4)
    assert one.sample(50, seed=3) != two.sample(50, seed=3)
    assert one.words == two.words
    assert one.log_probability("The dog sleeps.") != two.log_probability("The dog sleeps.")
    assert list(one.documents(3, seed=1)) == list(again.documents(3, seed=1))


def test_the_text_never_changes_between_versions(grammar: SyntheticGrammar) -> None:
    digest = hashlib.sha256("".join(grammar.documents(20, seed=0)).encode()).hexdigest()
    assert digest[:16] == "241a63670de386c5"
    assert grammar.entropy_per_sentence == pytest.approx(19.810818913980338, rel=1e-9)


def test_bad_arguments_are_refused(grammar: SyntheticGrammar) -> None:
    with pytest.raises(ValueError, match="n_sentences must be at least 0"):
        grammar.sample(-1)
    with pytest.raises(ValueError, match="n_documents must be at least 0"):
        next(grammar.documents(-1))
    with pytest.raises(ValueError, match="sentences_per_document must be at least 1"):
        SyntheticGrammar(sentences_per_document=0)
    assert grammar.sample(0) == []
