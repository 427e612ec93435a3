"""Which substrings of counted words are frequent: the pieces from which training a Unigram model starts.

`frequent_substrings_plain` says what is computed; `frequent_substrings` computes the same, quickly, by naming
substrings with numbers.

Source of the naming: Karp, Miller and Rosenberg, "Rapid identification of repeated patterns in strings, trees and
arrays" (1972); of the maximal repeats: Gusfield, "Algorithms on strings, trees, and sequences" (1997), section 7.12.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]


def frequent_substrings_plain(
    word_counts: Mapping[str, int], limit: int, *, max_length: int = 16, min_count: int = 2
) -> dict[str, int]:
    """The most useful substrings of counted words, and how often each occurs.

    A substring that occurs `count` times covers count * length characters: this is what ranks it. One that always
    occurs inside the same longer one (of at most `max_length` characters) is of no use beside it, and is left out: what
    remains are the maximal repeats. All single characters are there, whatever their rank.

    Args:
        word_counts: How often each word occurs.
        limit: How many longer substrings to return, the highest ranked ones; equal ones in code point order.
        max_length: The length in characters of the longest ones.
        min_count: Leave out those that occur less often. Occurrences may overlap.

    Returns:
        substring -> count: first the characters, most frequent first, then the others by rank.
    """
    counts: Counter[str] = Counter()
    for word, count in word_counts.items():
        for start in range(len(word)):
            for end in range(start + 1, min(start + max_length, len(word)) + 1):
                counts[word[start:end]] += count
    inside = {part for text, count in counts.items() for part in (text[1:], text[:-1]) if counts[part] == count}
    characters = {text: count for text, count in counts.items() if len(text) == 1}
    longer = {
        text: count for text, count in counts.items() if len(text) > 1 and count >= min_count and text not in inside
    }
    return _ranked(characters, longer, limit)


def frequent_substrings(
    word_counts: Mapping[str, int], limit: int, *, max_length: int = 16, min_count: int = 2
) -> dict[str, int]:
    """The same as `frequent_substrings_plain`, for all words at once, length by length.

    Each position in the words has the number ("name") of the substring of the present length that begins there. Two
    substrings of length n + 1 are equal if their first n characters have the same name, and their last n too: sorting
    these pairs of names gives the names for the next length. Where a substring is too rare to be counted, so is every
    longer one that holds it, and the position is passed over from then on.
    """
    text = "".join(word_counts)
    lengths = np.fromiter(map(len, word_counts), np.int64, len(word_counts))
    # Per position: how often its word occurs, and how many characters of the word are left.
    weights = np.repeat(np.fromiter(word_counts.values(), np.float64, len(word_counts)), lengths)
    left = (np.repeat(np.cumsum(lengths), lengths) - np.arange(len(text))).astype(np.int32)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    alphabet, first, names = np.unique(codes, return_index=True, return_inverse=True)
    counts = np.bincount(names, weights).astype(np.int64)
    characters = dict(zip(map(chr, alphabet.tolist()), counts.tolist(), strict=True))
    names = np.where(counts >= min_count, np.arange(len(counts)), -1)[names].astype(np.int32)

    found: list[tuple[int, Array, Array]] = []  # (length, where one occurrence begins, count)
    for length in range(2, max_length + 2):
        at = np.flatnonzero((left[:-1] >= length) & (names[:-1] >= 0) & (names[1:] >= 0)).astype(np.int32)
        n_shorter = len(counts)
        pairs, where, inverse = np.unique(
            names[at].astype(np.int64) * n_shorter + names[at + 1], return_index=True, return_inverse=True
        )
        shorter_counts, counts = counts, np.bincount(inverse, weights[at], len(pairs)).astype(np.int64)
        if length > 2:
            maximal = shorter_counts >= min_count
            if length <= max_length:
                for part in (pairs // n_shorter, pairs % n_shorter):
                    maximal[part[counts == shorter_counts[part]]] = False
            found.append((length - 1, first[maximal], shorter_counts[maximal]))
        names = np.full(len(text), -1, np.int32)
        frequent = counts >= min_count
        renamed = np.where(frequent, np.cumsum(frequent) - 1, -1).astype(np.int32)
        names[at] = renamed[inverse]
        counts, first = counts[frequent], at[where[frequent]].astype(np.int64)

    threshold = 0
    coverage = np.concatenate([length * counts for length, _, counts in found] or [np.zeros(0, np.int64)])
    if 0 < limit < len(coverage):
        threshold = int(np.partition(coverage, len(coverage) - limit)[len(coverage) - limit])
    longer = {}
    for length, starts, counts in found:
        enough = length * counts >= threshold
        for start, count in zip(starts[enough].tolist(), counts[enough].tolist(), strict=True):
            longer[text[start : start + length]] = count
    return _ranked(characters, longer, limit)


def _ranked(characters: dict[str, int], longer: dict[str, int], limit: int) -> dict[str, int]:
    by_count = sorted(characters, key=lambda text: (-characters[text], text))
    by_coverage = sorted(longer, key=lambda text: (-longer[text] * len(text), text))
    return {text: characters[text] for text in by_count} | {text: longer[text] for text in by_coverage[:limit]}
