"""Unigram segmentation of whole texts, word by word.

A word's most likely segmentation does not depend on the words around it, but for rounding: the score of the text so
far, to which those of a word's pieces are added, decides between two ways that are nearly equally likely, such as those
of "=====" into "==" and "=". What is remembered for a word is therefore also how close its decisions are, and a word
for which rounding may matter is cut again, with the score that the text so far really has.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from itertools import chain, groupby
from math import inf
from typing import NamedTuple

import numpy as np

from minillm.tokenizers.pieces import CACHE_PIECE_LENGTH, PieceCache
from minillm.tokenizers.sentencepiece_segmentation import Segmenter, Spelling
from minillm.tokenizers.unigram_lattice import Lattice

# The library takes the score of the text so far off all scores when it is further than this from 0.
RESET_SCORE = 100_000.0


class _Word(NamedTuple):
    """What is remembered of a word.

    Attributes:
        ids: Of its pieces, if `certain_up_to` allows.
        scores: Of its pieces.
        score: Their sum.
        certain_up_to: As long as the score of the text before it is less than this from 0, rounding changes nothing.
    """

    ids: list[int]
    scores: list[float]
    score: float
    certain_up_to: float


class UnigramSegmenter(Segmenter):
    """The most likely segmentation of a whole text, see `unigram_lattice`.

    Args:
        scores: piece -> logarithm of its probability.
        unknown_score: That of a character that is no piece.
        spelling: See `Segmenter`.
        float32: Add scores in single precision, taking the sum back to 0 where it leaves -100,000 .. 100,000, as
            `sentencepiece` does; else in double precision, as `tokenizers` does.
    """

    def __init__(self, scores: Mapping[str, float], unknown_score: float, spelling: Spelling, *, float32: bool) -> None:
        super().__init__(spelling, scores)
        self.lattice = Lattice(scores, unknown_score=unknown_score)
        self._scores = dict(scores)
        self._float32 = float32
        self._largest_score = max(abs(unknown_score), *map(abs, scores.values()))
        self._edges = PieceCache(self.lattice.edges)
        self._cache: PieceCache[_Word] = PieceCache(self._word)

    def encode(self, text: str) -> list[int]:
        return self._spelling.fused(self._encode(text))

    def ids(self, text: str, spans: Iterable[tuple[int, int]]) -> list[int]:
        """The ids of a segmentation of a text."""
        return self._spelling.fused(self._spelling.ids(text[start:end] for start, end in spans))

    def _encode(self, text: str) -> list[int]:
        lookup = self._cache.__getitem__
        ids: list[int] = []
        before, exactly, since = 0.0, 0.0, 0
        words = self.words(text)
        for at, word in enumerate(words):
            word_ids, _, score, certain_up_to = lookup(word)
            if -certain_up_to < before < certain_up_to:
                ids += word_ids
                before += score
            else:
                exactly = self._sum(words[since:at], exactly)
                pieces, exactly = self.cut_exactly(word, exactly)
                ids += self._spelling.ids(pieces)
                before, since = exactly, at + 1
        return ids

    def pieces(self, text: str) -> list[str]:
        out: list[str] = []
        score = 0.0
        for word in self.words(text):
            pieces, score = self.cut_exactly(word, score)
            out += pieces
        if self._float32:
            return out
        # `tokenizers` takes unknown characters in a row as one: each of their bytes has the place of all of them.
        runs = groupby(out, key=self._scores.__contains__)
        return [piece for known, run in runs for piece in (run if known else ["".join(run)])]

    def _sum(self, words: Iterable[str], score: float) -> float:
        """The score behind words whose pieces are certain, rounded after each piece."""
        scores = chain([score], chain.from_iterable(self._cache[word].scores for word in words))
        return float(np.cumsum(np.fromiter(scores, np.float32 if self._float32 else np.float64))[-1])

    def _word(self, word: str) -> _Word:
        if len(word) > CACHE_PIECE_LENGTH:
            return _Word([], [], 0.0, 0.0)  # never certain: it is cut exactly at once
        spans, score, margin = self.lattice.best_path(word)
        pieces = [word[start:end] for start, end in spans]
        # A path has at most n pieces. Adding the score of one rounds by at most half a unit of the sum, and no sum is
        # more than |score before the word| + n * the largest score; two paths differ by twice the sum of that. The
        # score before the word is itself known to about 1 % here.
        n = len(word)
        per_unit = 2.0 * n * (2.0**-24 if self._float32 else 2.0**-53)
        certain = margin if margin == inf else 0.9 * (margin / per_unit - n * self._largest_score)
        if self._float32:
            certain = min(certain, 0.99 * RESET_SCORE - 2.0 * abs(score))
        scores = [self._scores.get(piece, self.lattice.unknown_score) for piece in pieces]
        return _Word(self._spelling.ids(pieces), scores, score, certain)

    def cut_exactly(self, word: str, before: float) -> tuple[list[str], float]:
        """The pieces of a word behind a text with the score `before`, and the score behind the word."""
        n = len(word)
        kind = "f" if self._float32 else "d"
        best = array(kind, [before]) + array(kind, [-inf]) * n
        candidate = best[:1]
        starts = [0] * (n + 1)
        for start, edges in enumerate(self._edges[word]):
            if self._float32 and abs(offset := best[start]) > RESET_SCORE:
                for end in range(start, n + 1):
                    best[end] -= offset
            here = best[start]
            for end, score in edges:
                candidate[0] = here + score
                if candidate[0] > best[end]:
                    best[end] = candidate[0]
                    starts[end] = start
        pieces = []
        end = n
        while end:
            pieces.append(word[starts[end] : end])
            end = starts[end]
        return pieces[::-1], best[n]
