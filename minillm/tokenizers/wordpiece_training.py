"""Learning a WordPiece vocabulary from counted words.

A word is spelled with its first character as it is and the others with a prefix: `hug` is `h ##u ##g`. Then, again and
again, the pair of neighbouring tokens with the highest score becomes a token, `h ##u` becomes `hu`, until the
vocabulary is full. There are two scores, where freq counts occurrences in the words as they are spelled so far:

    likelihood   freq(ab) / (freq(a) freq(b))
    frequency    freq(ab)

The first is WordPiece's own. In a unigram model of N tokens, an occurrence of a and b has the likelihood
freq(a)/N freq(b)/N, and once it is one token, freq(ab)/N: the score is, up to N, the factor that each merged occurrence
gains. (Its logarithm is the pointwise mutual information of a and b.) It says nothing of how many occurrences there
are: tokens that are rare but always neighbours come first, and `min_frequency` decides how rare they may be.

The second is byte pair encoding, and it is what the WordPieceTrainer of the Hugging Face `tokenizers` library computes:
it trains BPE with the prefix and keeps the tokens without the merges. (Google's own learner was not published; the one
that came with TensorFlow Text counts substrings, from long to short, instead of merging.) From the same first tokens,
"frequency" gives the vocabulary of `tokenizers`, id for id.

`learn_wordpiece_plain` says what is computed; `learn_wordpiece` computes the same, quickly.

Sources: Schuster and Nakajima, "Japanese and Korean voice search" (2012), section 3; Wu et al., "Google's neural
machine translation system" (2016), section 4.1.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from minillm.tokenizers.merges import Pair, merge_in_words, merge_pair

Score = Literal["likelihood", "frequency"]


def learn_wordpiece_plain(
    word_counts: Mapping[str, int],
    tokens: Sequence[str],
    vocab_size: int,
    *,
    score: Score = "likelihood",
    prefix: str = "##",
    min_frequency: int = 1,
) -> list[str]:
    """Merge the pair with the highest score until there are `vocab_size` tokens, counting everything anew each time.

    Of the pairs that occur at least `min_frequency` times, the one with the highest score wins; of equal scores, the
    more frequent pair; of equally frequent ones, that with the smaller left id, then the smaller right id. In a run
    such as "aaa", every neighbouring pair counts, and merging goes from left to right. A merge that spells a token that
    there is already (a special token, say) becomes that token.

    Args:
        word_counts: How often each word occurs.
        tokens: The tokens to begin with, in the order of their ids. A character that is not among them (and inside of a
            word, with the prefix as well) is passed over, as in `tokenizers`.
        vocab_size: Stop when there are so many tokens, or no pair left.
        score: "likelihood" or "frequency".
        prefix: What a token begins with that continues a word.
        min_frequency: Merge no pair that occurs less often.

    Returns:
        The tokens in the order of their ids, `tokens` first.
    """
    tokens = list(tokens)
    id_of = {token: i for i, token in enumerate(tokens)}
    words = {word: _spell(word, id_of, prefix) for word in word_counts}
    while len(tokens) < vocab_size:
        token_counts: Counter[int] = Counter()
        pair_counts: Counter[Pair] = Counter()
        for word, ids in words.items():
            for i in ids:
                token_counts[i] += word_counts[word]
            for pair in pairwise(ids):
                pair_counts[pair] += word_counts[word]
        scores = {
            (a, b): Fraction(count, token_counts[a] * token_counts[b]) if score == "likelihood" else Fraction(count)
            for (a, b), count in pair_counts.items()
            if count >= min_frequency
        }
        if not scores:
            break
        best = min(scores, key=lambda pair: (-scores[pair], -pair_counts[pair], pair))
        token = _joined(tokens[best[0]], tokens[best[1]], prefix)
        if token not in id_of:
            id_of[token] = len(tokens)
            tokens.append(token)
        words = {word: merge_pair(ids, best, id_of[token]) for word, ids in words.items()}
    return tokens


def learn_wordpiece(
    word_counts: Mapping[str, int],
    tokens: Sequence[str],
    vocab_size: int,
    *,
    score: Score = "likelihood",
    prefix: str = "##",
    min_frequency: int = 1,
) -> list[str]:
    """The same as `learn_wordpiece_plain`, without counting anew or looking at every word for every merge.

    As in `merges.learn_merges`, a word is held as a `str` whose characters are token ids, and the counts are corrected
    around each merge. A merge makes its two tokens rarer, which raises the score of every pair that one of them is part
    of: scores are therefore computed for all pairs, by numpy (see `_PairTable`).
    """
    tokens = list(tokens)
    id_of = {token: i for i, token in enumerate(tokens)}
    words = ["".join(map(chr, _spell(word, id_of, prefix))) for word in word_counts]
    counts = list(word_counts.values())
    token_counts = np.zeros(max(vocab_size, len(tokens)), dtype=np.int64)
    pair_counts: dict[str, int] = defaultdict(int)
    found_in: dict[str, list[int]] = defaultdict(list)
    for i, word in enumerate(words):
        for character in word:
            token_counts[ord(character)] += counts[i]
        for left, right in pairwise(word):
            pair_counts[left + right] += counts[i]
            found_in[left + right].append(i)
    table = _PairTable(token_counts, score, min_frequency)
    table.update(pair_counts, pair_counts)
    while len(tokens) < vocab_size and (pair := table.best()):
        left, right = pair[0], pair[1]
        token = _joined(tokens[ord(left)], tokens[ord(right)], prefix)
        if token not in id_of:
            id_of[token] = len(tokens)
            tokens.append(token)
        merged = chr(id_of[token])
        changes: dict[str, int] = defaultdict(int)
        new_pairs, n_merged = merge_in_words(pair, merged, found_in.pop(pair), words, counts, changes)
        for new_pair, places in new_pairs.items():
            found_in[new_pair] += places
        changes[pair] -= n_merged
        for character, change in ((left, -n_merged), (right, -n_merged), (merged, n_merged)):
            token_counts[ord(character)] += change
        for changed, change in changes.items():
            pair_counts[changed] += change
        table.update(changes, pair_counts)
    return tokens


class _PairTable:
    """The pairs that may be merged, in arrays without gaps, and which of them is best.

    Args:
        token_counts: How often each token occurs, by id; whoever owns it keeps it up to date.
        score: "likelihood" or "frequency".
        min_frequency: Pairs that occur less often are not kept.
    """

    def __init__(self, token_counts: npt.NDArray[np.int64], score: Score, min_frequency: int) -> None:
        self._token_counts, self._score, self._min_frequency = token_counts, score, min_frequency
        self._pairs: list[str] = []
        self._row: dict[str, int] = {}
        self._table = np.zeros((3, 1024), dtype=np.int64)  # left id, right id, count

    def update(self, changed: Iterable[str], pair_counts: Mapping[str, int]) -> None:
        """Enter the counts of the pairs that changed."""
        for pair in changed:
            row = self._row.get(pair)
            if (count := pair_counts[pair]) >= self._min_frequency:
                if row is None:
                    row = self._row[pair] = len(self._pairs)
                    self._pairs.append(pair)
                    if row == self._table.shape[1]:
                        self._table = np.concatenate([self._table, np.zeros_like(self._table)], axis=1)
                    self._table[:, row] = ord(pair[0]), ord(pair[1]), count
                else:
                    self._table[2, row] = count
            elif row is not None:
                last = self._pairs.pop()
                if last != pair:
                    self._pairs[row], self._row[last] = last, row
                    self._table[:, row] = self._table[:, len(self._pairs)]
                del self._row[pair]

    def best(self) -> str:
        """The pair with the highest score, by the rule of `learn_wordpiece_plain`; an empty string if there is none.

        Floating point finds the few that may be best, with a margin above its rounding; integers decide, so that no tie
        is made or broken by rounding. Two different fractions with denominators below 2^126 are more than 2^-252 apart:
        multiplied by 2^256, their integer parts differ.
        """
        if not self._pairs:
            return ""
        lefts, rights, counts = self._table[:, : len(self._pairs)]
        if self._score == "frequency":
            near = np.flatnonzero(counts == counts.max())
        else:
            frequency = self._token_counts.astype(np.float64)
            scores = counts / (frequency[lefts] * frequency[rights])
            near = np.flatnonzero(scores >= scores.max() * (1 - 2.0**-48))
        candidates = zip(near.tolist(), *self._table[:, near].tolist(), strict=True)
        keys = [
            (-self._exact_score(left, right, count), -count, left, right, row) for row, left, right, count in candidates
        ]
        best_row: int = min(keys)[-1]
        return self._pairs[best_row]

    def _exact_score(self, left: int, right: int, count: int) -> int:
        if self._score == "frequency":
            return count
        return (count << 256) // (int(self._token_counts[left]) * int(self._token_counts[right]))


def _joined(left: str, right: str, prefix: str) -> str:
    """How the token is spelled that two neighbours become: `h` and `##u` make `hu`, `##u` and `##g` make `##ug`."""
    return left + right.removeprefix(prefix)


def _spell(word: str, id_of: Mapping[str, int], prefix: str) -> list[int]:
    spelled = [(character, prefix + character if at > 0 else character) for at, character in enumerate(word)]
    return [id_of[token] for character, token in spelled if character in id_of and token in id_of]
