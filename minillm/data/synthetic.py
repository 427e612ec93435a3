"""A synthetic English of exactly known entropy: the floor under a trained model's loss.

    The quiet fox near the girls that Anna visits thinks that it hears a bird.

Sentences are drawn independently from a probabilistic grammar (`minillm.data.grammar`). Verbs agree with their subject
in number across prepositional phrases and relative clauses, and pronouns, possessives and reflexives agree with it in
gender: what stands between is of any length, so a model needs attention to come near the floor. Each sentence has
exactly one derivation, so its probability and the entropy of the language are exact.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from functools import cached_property
from typing import Protocol

from minillm.data.grammar import ProbabilisticGrammar, Rule

CLASSES = {"feminine": 0.27, "masculine": 0.27, "neuter": 0.22, "plural": 0.24}
NOUNS = {
    "feminine": "girl woman queen sister aunt mother",
    "masculine": "boy man king brother uncle father",
    "neuter": "dog cat bird horse fox robot",
    "plural": "girls boys women men dogs cats birds horses kings children",
}
NAMES = {"feminine": "Anna Mary Clara Julia", "masculine": "Ben Paul Victor Simon"}
DETERMINERS = {"singular": "the a every", "plural": "the some many"}
ADJECTIVES = "small old young happy clever quiet hungry tall brave lazy"
PREPOSITIONS = "near behind beside"
THINGS = "book hat ball coat lamp letter boat cup"
ADVERBS = "quietly today again outside"
TRANSITIVE = "see like chase hear help follow find visit"
INTRANSITIVE = "sleep sing run wait smile jump"
CLAUSAL = "say think hope"
PRONOUNS = {"feminine": "she", "masculine": "he", "neuter": "it", "plural": "they"}
POSSESSIVES = {"feminine": "her", "masculine": "his", "neuter": "its", "plural": "their"}
REFLEXIVES = {"feminine": "herself", "masculine": "himself", "neuter": "itself", "plural": "themselves"}


class _Tokenizer(Protocol):
    def encode(self, text: str) -> list[int]: ...


class SyntheticGrammar:
    """The language of one seed: the seed decides how frequent each word is among its kind (Zipf's law, shuffled).

    A sentence is its words between single spaces, the first letter a capital, then ".". A text is sentences, each
    followed by a newline. A document ends after each of its sentences with probability 1 / sentences_per_document, so
    that its length tells nothing more.
    """

    def __init__(self, seed: int = 0, *, sentences_per_document: int = 100) -> None:
        if sentences_per_document < 1:
            raise ValueError(f"sentences_per_document must be at least 1, got {sentences_per_document}")
        self.seed, self.sentences_per_document = seed, sentences_per_document
        self.grammar = ProbabilisticGrammar(_english(random.Random(seed)), "sentence")

    @property
    def words(self) -> list[str]:
        """Every word of the language, sorted, without the capital that a sentence starts with."""
        return self.grammar.words

    @property
    def entropy_per_sentence(self) -> float:
        """Entropy of a sentence in nats: the expectation of -log_probability(sentence)."""
        return self.grammar.entropy

    @cached_property
    def words_per_sentence(self) -> float:
        """Expected number of words in a sentence, the full stop not counted."""
        return math.fsum(self.grammar.expected_counts.values())

    def sample(self, n_sentences: int, seed: int = 0) -> list[str]:
        """`n_sentences` independent sentences, the same for the same seed on every machine."""
        if n_sentences < 0:
            raise ValueError(f"n_sentences must be at least 0, got {n_sentences}")
        generator = random.Random(seed)
        return [self._sentence(generator) for _ in range(n_sentences)]

    def documents(self, n_documents: int, seed: int = 0) -> Iterator[str]:
        """`n_documents` independent texts of sentences_per_document sentences in the mean, at least one each."""
        if n_documents < 0:
            raise ValueError(f"n_documents must be at least 0, got {n_documents}")
        generator = random.Random(seed)
        for _ in range(n_documents):
            sentences = [self._sentence(generator)]
            while generator.random() * self.sentences_per_document >= 1:
                sentences.append(self._sentence(generator))
            yield "\n".join(sentences) + "\n"

    def log_probability(self, sentence: str) -> float:
        """Natural logarithm of the exact probability of a sentence such as `sample` gives (a newline at its end may be
        there or not); -inf for what is no sentence of the language."""
        words = self._parse(sentence)
        return -math.inf if words is None else self.grammar.parse(words)[0]

    def n_derivations(self, sentence: str) -> int:
        """In how many ways the grammar makes this sentence: 1 for each of its sentences, 0 for anything else."""
        words = self._parse(sentence)
        return 0 if words is None else self.grammar.parse(words)[1]

    def entropy_per_token(self, tokenizer: _Tokenizer | None = None, *, end_of_text: bool = False) -> float:
        """Entropy rate of a text in nats per token: no model's mean loss on fresh text can be lower.

        H / E[n]: entropy of a sentence over its expected number of tokens, its newline included.

        Args:
            tokenizer: None counts each word, the full stop and the newline as a token. Otherwise anything with
                `encode(text) -> list of ids` that cuts before the space of each word, as GPT-2's and GPT-4's
                pre-tokenization do: then the expected count is exact, sum over words of E[count] * length.
            end_of_text: whether a separator token follows each document: one more token for sentences_per_document
                sentences, and the entropy of where documents end.

        Raises ValueError for a tokenizer whose tokens span words (found by encoding a sample).
        """
        if tokenizer is None:
            n_tokens = self.words_per_sentence + 2
        else:
            n_tokens = self._expected_tokens(tokenizer)
        entropy = self.entropy_per_sentence
        if end_of_text:
            stop = 1 / self.sentences_per_document
            entropy -= stop * math.log(stop) + ((1 - stop) * math.log1p(-stop) if stop < 1 else 0.0)
            n_tokens += stop
        return entropy / n_tokens

    def _expected_tokens(self, tokenizer: _Tokenizer) -> float:
        inner = {word: len(tokenizer.encode(f" {word}")) for word in self.words}
        first = {word: len(tokenizer.encode(_capital(word))) for word in self.words}
        end = len(tokenizer.encode(".\n"))
        for text in self.documents(3, seed=self.seed):
            words = [self._parse(sentence) or [] for sentence in text.splitlines()]
            expected = sum(first[start] + sum(inner[word] for word in rest) + end for start, *rest in words)
            if len(tokenizer.encode(text)) != expected:
                raise ValueError(
                    "tokenizer must cut text before the space of each word and after each newline, so that tokens per "
                    "word are fixed; this one does not"
                )
        begins = self.grammar.first_word_probabilities
        return end + math.fsum(
            begins[word] * first[word] + (count - begins[word]) * inner[word]
            for word, count in self.grammar.expected_counts.items()
        )

    def _sentence(self, generator: random.Random) -> str:
        return _capital(" ".join(self.grammar.sample(generator))) + "."

    def _parse(self, sentence: str) -> list[str] | None:
        """The words as the grammar spells them, or None when the outer form is not a sentence's."""
        sentence = sentence.removesuffix("\n")
        if not sentence.endswith(".") or sentence[:1] != sentence[:1].upper():
            return None
        first, *rest = sentence[:-1].split(" ")
        return [first if first in self._vocabulary else first[:1].lower() + first[1:], *rest]

    @cached_property
    def _vocabulary(self) -> frozenset[str]:
        return frozenset(self.words)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _english(generator: random.Random) -> dict[str, list[Rule]]:
    """The rules. Each symbol that must agree is there once for each class of subject. Why no sentence has two readings:
    a noun takes one modifier at most, "and" joins the two predicates of the main clause only, and every word belongs to
    one kind ("that" begins a clause after a noun or a clausal verb, which are told apart by the word before it)."""

    def choose(words: str) -> list[Rule]:
        ranked = sorted(words.split(), key=lambda _: generator.random())
        weights = [1 / (rank + 1) for rank in range(len(ranked))]
        return [(weight / math.fsum(weights), (word,)) for weight, word in zip(weights, ranked, strict=True)]

    rules: dict[str, list[Rule]] = {
        "sentence": [(p, (f"noun phrase {kind}", f"predicate {kind}")) for kind, p in CLASSES.items()],
        "anyone": [(p, (f"noun phrase {kind}",)) for kind, p in CLASSES.items()],
        "adjective": choose(ADJECTIVES),
        "preposition": choose(PREPOSITIONS),
        "thing": choose(THINGS),
        "adverb": choose(ADVERBS),
        "determiner singular": choose(DETERMINERS["singular"]),
        "determiner plural": choose(DETERMINERS["plural"]),
    }
    for verbs, kind in ((TRANSITIVE, "transitive"), (INTRANSITIVE, "intransitive"), (CLAUSAL, "clausal")):
        rules[f"{kind} plural"] = choose(verbs)
        rules[f"{kind} singular"] = [(p, (verb + "s",)) for p, (verb,) in rules[f"{kind} plural"]]
    for kind in CLASSES:
        number = "plural" if kind == "plural" else "singular"
        rules[f"noun {kind}"] = choose(NOUNS[kind])
        rules[f"plain {kind}"] = [
            (0.6, (f"determiner {number}", f"noun {kind}")),
            (0.4, (f"determiner {number}", "adjective", f"noun {kind}")),
        ]
        rules[f"described {kind}"] = [
            (0.7, (f"plain {kind}",)),
            (0.13, (f"plain {kind}", "preposition", "anyone")),
            (0.1, (f"plain {kind}", "that", f"deed {kind}")),
            *(
                (0.07 * p, (f"plain {kind}", "that", f"noun phrase {other}", f"transitive {_number(other)}"))
                for other, p in CLASSES.items()
            ),
        ]
        if kind in NAMES:
            rules[f"name {kind}"] = choose(NAMES[kind])
            rules[f"noun phrase {kind}"] = [(0.75, (f"described {kind}",)), (0.25, (f"name {kind}",))]
        else:
            rules[f"noun phrase {kind}"] = [(1.0, (f"described {kind}",))]
        rules[f"object {kind}"] = [
            (0.55, ("anyone",)),
            (0.3, (POSSESSIVES[kind], "thing")),
            (0.15, (REFLEXIVES[kind],)),
        ]
        rules[f"deed {kind}"] = [
            (0.7, (f"transitive {number}", f"object {kind}")),
            (0.3, (f"intransitive {number}",)),
        ]
        rules[f"statement {kind}"] = [
            (0.55, (f"transitive {number}", f"object {kind}")),
            (0.1, (f"intransitive {number}",)),
            (0.15, (f"intransitive {number}", "adverb")),
            (0.2, (f"clausal {number}", "that", f"clause {kind}")),
        ]
        rules[f"clause {kind}"] = [
            (0.6, (PRONOUNS[kind], f"statement {kind}")),
            *((0.4 * p, (f"noun phrase {other}", f"statement {other}")) for other, p in CLASSES.items()),
        ]
        rules[f"predicate {kind}"] = [
            (0.8, (f"statement {kind}",)),
            (0.2, (f"statement {kind}", "and", f"statement {kind}")),
        ]
    return rules


def _number(kind: str) -> str:
    return "plural" if kind == "plural" else "singular"
