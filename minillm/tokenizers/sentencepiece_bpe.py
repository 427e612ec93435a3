"""Byte pair encoding as SentencePiece does it: over characters, with a score for each piece, not a list of merges.

Training makes the most frequent pair of neighbouring pieces one piece, again and again; the n-th gets the score -n. A
text is encoded by merging, again and again, the two neighbours whose concatenation has the highest score: which two
pieces it was once made of does not matter. `learn_pieces_plain` and `merge_plain` say what is computed; `learn_pieces`
and `PieceMerger` compute the same, quickly.

Every detail of training is that of version 0.2.3 of the `sentencepiece` library, so that both learn the same pieces
from the same words; up to 0.2.1 it looked for the best pair only among the 5 % that were most frequent a hundred merges
before, and vocabularies differ in their last entries.

Sources: Sennrich, Haddow and Birch, "Neural machine translation of rare words with subword units" (2016); Kudo and
Richardson, "SentencePiece" (2018), sections 3.1 and 3.2.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise

from minillm.tokenizers.merges import merge_in_words

# In a word shorter than this, scanning a list for the best pair is faster than keeping a heap of pairs.
SHORT_WORD = 128


def merge_plain(symbols: Sequence[str], scores: Mapping[str, float]) -> list[str]:
    """Merge neighbours until no concatenation is a piece: each time the one with the highest score, leftmost.

    Args:
        symbols: The characters of a word, at first.
        scores: piece -> score.
    """
    symbols = list(symbols)
    while candidates := [
        (-scores[left + right], at) for at, (left, right) in enumerate(pairwise(symbols)) if left + right in scores
    ]:
        _, at = min(candidates)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols


class PieceMerger:
    """The pieces of a model, indexed for merging.

    Args:
        ranks: What may be merged -> how early; lower first, equal ones from left to right. Keys are concatenations of
            two symbols, with `joint` between them.
        joint: "" if any two symbols that spell a piece are merged, as SentencePiece does. A character that occurs in no
            piece makes a key tell which two, as a list of merges does.
        unused: Pieces that merging goes through but which must not remain: they are taken apart again.
    """

    def __init__(self, ranks: Mapping[str, int], *, joint: str = "", unused: Iterable[str] = ()) -> None:
        self._ranks = dict(ranks)
        self._joint = joint
        self._none = max(self._ranks.values(), default=0) + 1
        self._unused = frozenset(unused)

    @classmethod
    def of_scores(cls, scores: Mapping[str, float], *, unused: Iterable[str] = ()) -> PieceMerger:
        """For merging by score, as `merge_plain` does."""
        order = {score: rank for rank, score in enumerate(sorted(set(scores.values()), reverse=True))}
        return cls({piece: order[score] for piece, score in scores.items() if len(piece) > 1}, unused=unused)

    @classmethod
    def of_merges(cls, merges: Iterable[tuple[str, str]]) -> PieceMerger:
        """For merging pairs in a given order, as `tokenizers` does: of two equal merges the later one counts."""
        joint = "\ud800"  # occurs in no text
        return cls({left + joint + right: rank for rank, (left, right) in enumerate(merges)}, joint=joint)

    def merge(self, word: str) -> list[str]:
        """The pieces of one word: O(n^2) with a tiny constant if it is short, else O(n log n)."""
        parts: dict[str, tuple[str, str]] = {}
        pieces = self._merge_short(word, parts) if len(word) < SHORT_WORD else self._merge_long(word, parts)
        return self._take_apart(pieces, parts) if self._unused else pieces

    def _merge_short(self, word: str, parts: dict[str, tuple[str, str]]) -> list[str]:
        symbols = list(word)
        ranks = [self._rank(left, right, parts) for left, right in pairwise(symbols)]
        none = self._none
        while (best := min(ranks, default=none)) < none:
            at = ranks.index(best)
            symbols[at] += symbols[at + 1]
            del symbols[at + 1], ranks[at]
            if at > 0:
                ranks[at - 1] = self._rank(symbols[at - 1], symbols[at], parts)
            if at < len(ranks):
                ranks[at] = self._rank(symbols[at], symbols[at + 1], parts)
        return symbols

    def _merge_long(self, word: str, parts: dict[str, tuple[str, str]]) -> list[str]:
        """Candidate pairs wait in a heap; the symbols are a doubly linked list."""
        symbols, end = list(word), len(word)
        following, previous = list(range(1, end + 1)), list(range(-1, end - 1))
        none = self._none
        heap = [(rank, at) for at, pair in enumerate(pairwise(symbols)) if (rank := self._rank(*pair, parts)) < none]
        heapify(heap)
        while heap:
            best, at = heappop(heap)
            second = following[at]
            if second == end or not symbols[at] or self._rank(symbols[at], symbols[second], parts) != best:
                continue  # since this pair was found, one of the two has been merged with its other neighbour
            symbols[at] += symbols[second]
            symbols[second] = ""
            third = following[at] = following[second]
            if third < end:
                previous[third] = at
            for left, right in ((previous[at], at), (at, third)):
                if left >= 0 and right < end and (rank := self._rank(symbols[left], symbols[right], parts)) < none:
                    heappush(heap, (rank, left))
        return [symbol for symbol in symbols if symbol]

    def _rank(self, left: str, right: str, parts: dict[str, tuple[str, str]]) -> int:
        if self._unused and left + right in self._unused:
            parts[left + right] = left, right
        return self._ranks.get(left + self._joint + right, self._none)

    def _take_apart(self, pieces: list[str], parts: Mapping[str, tuple[str, str]]) -> list[str]:
        out: list[str] = []
        pending = pieces[::-1]
        while pending:
            piece = pending.pop()
            if piece in self._unused and piece in parts:
                pending += parts[piece][::-1]
            else:
                out.append(piece)
        return out


def learn_pieces_plain(word_counts: Mapping[str, int], n_pieces: int, is_piece: Callable[[str], bool]) -> list[str]:
    """Learn pieces of two or more characters: again and again, make the most frequent pair of neighbours one piece.

    Of equally frequent pairs, the shortest is taken, of these the first in the order of code points, and of two that
    spell the same, the one with the shorter left part. A pair that `is_piece` refuses is never merged, nor is one that
    spells a piece which another pair has made. In a run such as "aaa", every neighbouring pair counts, and merging goes
    from left to right.

    Args:
        word_counts: How often each word occurs.
        n_pieces: Stop when there are so many, or when no pair is left.
        is_piece: Whether a text may be a piece.
    """
    words = {word: list(word) for word in word_counts}
    made: dict[str, tuple[str, str]] = {}
    while len(made) < n_pieces:
        counts: Counter[tuple[str, str]] = Counter()
        for word, symbols in words.items():
            for pair in pairwise(symbols):
                counts[pair] += word_counts[word]
        new = [pair for pair in counts if "".join(pair) not in made and is_piece("".join(pair))]
        if not new:
            break
        best = min(new, key=lambda pair: (-counts[pair], len(pair[0] + pair[1]), pair[0] + pair[1], len(pair[0])))
        made["".join(best)] = best
        for symbols in words.values():
            at = 0
            while at < len(symbols) - 1:
                if (symbols[at], symbols[at + 1]) == best:
                    symbols[at : at + 2] = ["".join(best)]
                at += 1
    return list(made)


def learn_pieces(word_counts: Mapping[str, int], n_pieces: int, is_piece: Callable[[str], bool]) -> list[str]:
    """The same as `learn_pieces_plain`, without counting anew or looking at every word for every piece.

    As in `merges.learn_merges`, words are strings with a character for each symbol, pairs wait in buckets by count, and
    the buckets are emptied from the highest count down. A symbol that is not a character of the text gets one from the
    code points that the text does not use.
    """
    words = list(word_counts)
    counts = list(word_counts.values())
    used = set().union(*words)
    free = (chr(code) for code in range(0x110000) if chr(code) not in used)
    spelling: dict[str, str] = {character: character for character in used}
    pair_counts: dict[str, int] = defaultdict(int)
    found_in: dict[str, list[int]] = defaultdict(list)
    for i, word in enumerate(words):
        for left, right in pairwise(word):
            pair_counts[left + right] += counts[i]
            found_in[left + right].append(i)
    buckets: dict[int, list[str]] = defaultdict(list)
    for pair, count in pair_counts.items():
        buckets[count].append(pair)
    made: dict[str, None] = {}
    while buckets and (highest := max(buckets)) > 0:
        queue = [_in_order(pair, spelling) for pair in buckets.pop(highest)]
        heapify(queue)
        while queue:
            if len(made) >= n_pieces:
                return list(made)
            _, piece, _, pair = heappop(queue)
            if (count := pair_counts[pair]) < highest:
                buckets[count].append(pair)
                continue
            if piece in made or not is_piece(piece):
                continue
            merged = next(free)
            made[piece] = None
            spelling[merged] = piece
            new_pairs, _ = merge_in_words(pair, merged, found_in.pop(pair), words, counts, pair_counts)
            found_in.update(new_pairs)
            for new_pair in new_pairs:
                if (count := pair_counts[new_pair]) == highest:
                    heappush(queue, _in_order(new_pair, spelling))
                else:
                    buckets[count].append(new_pair)
    return list(made)


def _in_order(pair: str, spelling: Mapping[str, str]) -> tuple[int, str, int, str]:
    """Among equally frequent pairs, the smallest of these is taken first."""
    left = spelling[pair[0]]
    piece = left + spelling[pair[1]]
    return len(piece), piece, len(left), pair
