"""Grammars: closed forms against enumeration of every sentence, and the parser against the same enumeration."""

from __future__ import annotations

import collections
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data.grammar import ProbabilisticGrammar, Rule

SMALL: dict[str, list[Rule]] = {
    "S": [(0.6, ("NP", "VP")), (0.3, ("NP", "VP", "and", "VP")), (0.1, ("stop",))],
    "NP": [(0.5, ("the", "N")), (0.25, ("the", "A", "N")), (0.25, ("she",))],
    "VP": [(0.7, ("V", "NP")), (0.3, ("sleeps",))],
    "N": [(0.9, ("dog",)), (0.1, ("cat",))],
    "A": [(0.8, ("big",)), (0.2, ("old",))],
    "V": [(0.5, ("sees",)), (0.3, ("hears",)), (0.2, ("likes",))],
}


def enumerate_sentences(rules: dict[str, list[Rule]], start: str) -> dict[tuple[str, ...], list[float]]:
    """Every derivation of a grammar without recursion: for each sentence, the probabilities of its derivations."""

    def expand(item: str) -> list[tuple[float, tuple[str, ...]]]:
        if item not in rules:
            return [(1.0, (item,))]
        results = []
        for probability, right in rules[item]:
            partial: list[tuple[float, tuple[str, ...]]] = [(probability, ())]
            for part in right:
                partial = [(p * q, words + more) for p, words in partial for q, more in expand(part)]
            results += partial
        return results

    sentences = collections.defaultdict(list)
    for probability, words in expand(start):
        sentences[words].append(probability)
    return sentences


def layered_grammars() -> st.SearchStrategy[dict[str, list[Rule]]]:
    """Random grammars in which symbol i rewrites only to words and to symbols above i, ambiguity allowed."""

    def build(shapes: list[list[tuple[int, list[int]]]]) -> dict[str, list[Rule]]:
        rules: dict[str, list[Rule]] = {}
        for number, alternatives in enumerate(shapes):
            total = sum(weight for weight, _ in alternatives)
            rules[f"S{number}"] = [
                (
                    weight / total,
                    tuple(f"S{number + jump}" if number + jump < len(shapes) else f"w{jump}" for jump in right),
                )
                for weight, right in alternatives
            ]
        return rules

    right = st.lists(st.integers(1, 4), min_size=1, max_size=3)
    return st.lists(st.lists(st.tuples(st.integers(1, 9), right), min_size=1, max_size=3), min_size=1, max_size=4).map(
        build
    )


@settings(max_examples=60, deadline=None)
@given(rules=layered_grammars())
def test_closed_forms_and_parser_agree_with_enumeration(rules: dict[str, list[Rule]]) -> None:
    grammar = ProbabilisticGrammar(rules, "S0")
    sentences = enumerate_sentences(rules, "S0")
    derivations = [p for probabilities in sentences.values() for p in probabilities]
    assert math.fsum(derivations) == pytest.approx(1)
    entropy = -math.fsum(p * math.log(p) for p in derivations)
    assert grammar.entropy == pytest.approx(entropy, abs=1e-9)
    for word, count in grammar.expected_counts.items():
        expected = math.fsum(math.fsum(ps) * words.count(word) for words, ps in sentences.items())
        assert count == pytest.approx(expected, abs=1e-9)
        first = math.fsum(math.fsum(ps) for words, ps in sentences.items() if words[0] == word)
        assert grammar.first_word_probabilities[word] == pytest.approx(first, abs=1e-9)
    for words, probabilities in list(sentences.items())[:20]:
        log_probability, n_derivations = grammar.parse(words)
        assert log_probability == pytest.approx(math.log(math.fsum(probabilities)))
        assert n_derivations == len(probabilities)
    assert grammar.parse(["nonsense"]) == (-math.inf, 0)
    assert grammar.parse([]) == (-math.inf, 0)


def test_an_unambiguous_grammar_by_hand() -> None:
    grammar = ProbabilisticGrammar(SMALL, "S")
    sentences = enumerate_sentences(SMALL, "S")
    assert all(len(probabilities) == 1 for probabilities in sentences.values())
    assert math.fsum(math.exp(grammar.parse(words)[0]) for words in sentences) == pytest.approx(1)
    assert grammar.parse(["she", "sleeps", "and", "sees", "the", "big", "cat"])[0] == pytest.approx(
        math.log(0.3 * 0.25 * 0.3 * 0.7 * 0.5 * 0.25 * 0.8 * 0.1)
    )


def test_recursion_in_closed_form() -> None:
    # The number of a's is geometric: P(n) = q p^n. Its entropy, mean and first word are textbook formulas.
    p = 0.6
    grammar = ProbabilisticGrammar({"S": [(p, ("a", "S")), (1 - p, ("b",))]}, "S")
    assert grammar.entropy == pytest.approx(-(p * math.log(p) + (1 - p) * math.log(1 - p)) / (1 - p))
    assert grammar.expected_counts == pytest.approx({"a": p / (1 - p), "b": 1})
    assert grammar.first_word_probabilities == pytest.approx({"a": p, "b": 1 - p})
    assert grammar.parse(["a"] * 200 + ["b"]) == pytest.approx((200 * math.log(p) + math.log(1 - p), 1))


def test_samples_have_the_probabilities_of_the_grammar() -> None:
    grammar, generator = ProbabilisticGrammar(SMALL, "S"), random.Random(1)
    counts = collections.Counter(tuple(grammar.sample(generator)) for _ in range(20_000))
    sentences = enumerate_sentences(SMALL, "S")
    assert set(counts) <= set(sentences)
    common = [(words, probabilities[0]) for words, probabilities in sentences.items() if probabilities[0] > 0.005]
    assert len(common) > 10
    for words, probability in common:
        deviation = math.sqrt(20_000 * probability * (1 - probability))
        assert abs(counts[words] - 20_000 * probability) < 4.5 * deviation


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"T": [(1.0, ("a",))]}, "start must be one of the symbols"),
        ({"S": [(0.5, ("a",)), (0.4, ("b",))]}, "must sum to 1, they sum to 0.9"),
        ({"S": [(1.0, ("a",)), (0.0, ("b",))]}, "needs a positive probability"),
        ({"S": [(1.0, ())]}, "and a right-hand side"),
        ({"S": []}, "must sum to 1"),
        ({"S": [(0.5, ("S", "a")), (0.5, ("a",))]}, "can start with itself"),
        ({"S": [(0.5, ("T", "a")), (0.5, ("a",))], "T": [(1.0, ("S",))]}, "can start with itself"),
        ({"S": [(0.5, ("a", "S", "S")), (0.5, ("a",))]}, "not sure to end: the spectral radius of M is 1.0"),
        ({"S": [(1.0, ("a", "S"))]}, "not sure to end"),
    ],
)
def test_bad_grammars_are_refused(rules: dict[str, list[Rule]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProbabilisticGrammar(rules, "S")
