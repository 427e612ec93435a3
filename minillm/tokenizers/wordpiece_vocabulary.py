"""From counted words to a WordPiece vocabulary: the first tokens, and which pairs may be merged at all.

The score of `wordpiece_training` prefers pairs whose tokens occur nowhere else, however rare they are. Left alone it
fills a vocabulary with the parts of words that occur once: on ten megabytes of Python source, 8192 tokens cover a word
with 2.77 tokens on average, where byte pair encoding needs 1.05. What helps is to merge no pair that occurs less often
than `min_frequency`, and as large a one as still fills the vocabulary: 1.08 tokens a word with 43.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import get_args

from minillm.tokenizers.arguments import checked_integer
from minillm.tokenizers.merges import MAX_VOCAB_SIZE
from minillm.tokenizers.wordpiece_training import Score, learn_wordpiece


def learn_vocabulary(
    word_counts: Mapping[str, int],
    vocab_size: int,
    *,
    score: Score = "likelihood",
    special_tokens: Sequence[str] = (),
    prefix: str = "##",
    min_frequency: int | None = None,
    initial_alphabet: Iterable[str] = (),
    limit_alphabet: int | None = None,
) -> list[str]:
    """A vocabulary in the order of its ids: special tokens, characters, prefixed characters, then merges.

    Args:
        word_counts: How often each word (a piece of normalized text) occurs.
        vocab_size: Number of tokens wanted. Fewer come out when no pair is left to merge.
        score: "likelihood" or "frequency".
        special_tokens: The first ids.
        prefix: What a token begins with that continues a word.
        min_frequency: Learn no token from a pair that occurs less often. None: 1 for "frequency"; for "likelihood"
            about the highest that fills the vocabulary, found by trying.
        initial_alphabet: Characters to have even if no word does.
        limit_alphabet: Keep only so many characters, the initial alphabet and the most frequent others.

    Raises:
        TypeError: A number is no integer.
        ValueError: No words; `vocab_size` does not hold the special tokens and the alphabet; another argument is out of
            range; special tokens repeat; the initial alphabet holds something else than characters.
    """
    if score not in get_args(Score):
        raise ValueError(f"score must be one of {', '.join(map(repr, get_args(Score)))}, got {score!r}")
    for name, value in (("min_frequency", min_frequency), ("limit_alphabet", limit_alphabet)):
        if value is not None:
            checked_integer(name, value, 1)
    initial_alphabet = list(initial_alphabet)
    for character in initial_alphabet:
        if not isinstance(character, str) or len(character) != 1:
            raise ValueError(f"initial_alphabet must hold single characters, got {character!r}")
    if len(set(special_tokens)) < len(special_tokens):
        raise ValueError(f"special_tokens must differ from each other, got {list(special_tokens)!r}")
    if not word_counts:
        raise ValueError("texts must hold at least one word to learn from, got none")
    alphabet = alphabet_of(word_counts, prefix=prefix, initial=initial_alphabet, limit=limit_alphabet)
    tokens = list(dict.fromkeys([*special_tokens, *alphabet]))
    if not len(tokens) <= checked_integer("vocab_size", vocab_size) <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be from {len(tokens)} ({len(special_tokens)} special tokens and an alphabet of "
            f"{len(tokens) - len(special_tokens)}) to {MAX_VOCAB_SIZE}, got {vocab_size}"
        )
    learn = partial(learn_wordpiece, word_counts, tokens, vocab_size, score=score, prefix=prefix)
    if score == "frequency" or min_frequency is not None:
        return learn(min_frequency=min_frequency or 1)
    if vocab_size == len(tokens):
        return tokens
    return _learn_from_frequent_pairs(learn, vocab_size, max(1, sum(word_counts.values()) // vocab_size))


def _learn_from_frequent_pairs(learn: Callable[..., list[str]], vocab_size: int, trial: int) -> list[str]:
    """The vocabulary for about the highest min_frequency that fills it; for 1 if none does. `trial` is tried first."""
    filled: list[str] = []
    fills = 0
    while len(tokens := learn(min_frequency=trial)) == vocab_size:
        filled, fills, trial = tokens, trial, 2 * trial
    while len(tokens) < vocab_size and trial > fills + 1:
        # A lower threshold gives more tokens, by something like a power law: one that takes short enough steps, but for
        # the last ones, which would be very short.
        estimate = int(0.97 * trial * (len(tokens) / vocab_size) ** 1.5)
        trial = max(fills + 1, min(trial - 1, estimate))
        tokens = learn(min_frequency=trial)
    return filled if fills and len(tokens) < vocab_size else tokens


def alphabet_of(
    word_counts: Mapping[str, int], *, prefix: str = "##", initial: Iterable[str] = (), limit: int | None = None
) -> list[str]:
    """The characters of the words, by code point; then, with the prefix, those that stand inside of a word.

    `tokenizers` has the same, but numbers the prefixed characters in the order of a randomly seeded hash map:
    differently in every run, and with them the ties between equally frequent pairs.

    Args:
        word_counts: How often each word occurs.
        prefix: What a token begins with that continues a word.
        initial: Characters to have in any case.
        limit: Keep so many characters, the initial and the most frequent; of equally frequent ones, by code point.
    """
    counts: Counter[str] = Counter()
    for word, count in word_counts.items():
        for character in word:
            counts[character] += count
    first = set(initial)
    by_frequency = sorted(
        {*first, *counts}, key=lambda character: (character not in first, -counts[character], character)
    )
    kept = sorted(by_frequency[:limit])
    inside = {character for word in word_counts for character in word[1:]}
    return kept + [prefix + character for character in kept if character in inside]
