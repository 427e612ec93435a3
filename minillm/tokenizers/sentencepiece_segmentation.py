"""Cutting normalized text into the pieces of a vocabulary, word by word.

A text is cut into words that no piece can reach across, whatever their spaces and letters (see `word_pattern`); every
word is cut into pieces by itself, and its ids are remembered. This is exact for BPE. For Unigram it is exact but for
rounding: the score of the text so far, to which those of a word's pieces are added, decides between two ways that are
nearly equally likely. What is remembered for a word is therefore also how close its decisions are, and a word for which
rounding may matter is cut again, with the score that the text so far really has.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterable, Mapping
from itertools import chain, groupby, pairwise
from math import inf
from typing import NamedTuple, TypeVar

import numpy as np

from minillm.tokenizers.sentencepiece_bpe import PieceMerger
from minillm.tokenizers.unigram_lattice import Lattice

SPACE = "▁"
_SPACE_INSIDE = re.compile(f"[^{SPACE}]{SPACE}")
CACHE_WORDS = 1 << 17
CACHE_WORD_LENGTH = 128
# The library takes the score of the text so far off all scores when it is further than this from 0.
RESET_SCORE = 100_000.0


class Spelling:
    """From pieces to ids, for the pieces of a vocabulary and for characters that are none.

    Args:
        ids: piece -> id.
        unk_id: The id of the unknown piece; None if there is none, and unknown characters are left out.
        byte_ids: The ids of the 256 bytes, with which unknown characters are spelled; None without byte fallback.
        fuse_unknown: Make several unknown characters in a row one unknown piece.
    """

    def __init__(
        self, ids: Mapping[str, int], unk_id: int | None, byte_ids: list[int] | None, *, fuse_unknown: bool = True
    ) -> None:
        self._ids = dict(ids)
        self._unk_id = unk_id
        self._byte_ids = byte_ids
        self._fuses = fuse_unknown and byte_ids is None and unk_id is not None

    def ids(self, pieces: Iterable[str]) -> list[int]:
        """The ids of pieces, unknown ones not fused yet."""
        out: list[int] = []
        for piece in pieces:
            out += self._ids_of(piece)
        return out

    def fused(self, ids: list[int]) -> list[int]:
        """The same ids, several unknown ones in a row made one."""
        unk_id = self._unk_id
        if not self._fuses or ids.count(unk_id) < 2:  # type: ignore[arg-type]  # it fuses, so there is an unknown id
            return ids
        return [i for i, before in zip(ids, [None, *ids], strict=False) if i != unk_id or before != unk_id]

    def spans(self, pieces: Iterable[str]) -> list[tuple[int, int, int]]:
        """(id, start, end) for each id: the characters that it stands for. All bytes of a character have its span."""
        out: list[tuple[int, int, int]] = []
        at = 0
        for piece in pieces:
            end = at + len(piece)
            for i in self._ids_of(piece):
                if self._fuses and i == self._unk_id and out and out[-1][0] == i:
                    out[-1] = i, out[-1][1], end
                else:
                    out.append((i, at, end))
            at = end
        return out

    def _ids_of(self, piece: str) -> list[int]:
        i = self._ids.get(piece)
        if i is not None:
            return [i]
        if self._byte_ids is not None:
            return [self._byte_ids[byte] for byte in piece.encode()]
        return [] if self._unk_id is None else [self._unk_id]


class Segmenter(ABC):
    """Cuts normalized text.

    Args:
        spelling: From pieces to ids.
        pieces: All pieces that may come out, which decide where words may be cut apart.
    """

    def __init__(self, spelling: Spelling, pieces: Iterable[str]) -> None:
        self._spelling = spelling
        self.words = re.compile(word_pattern(pieces)).findall

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    @abstractmethod
    def pieces(self, text: str) -> list[str]:
        """The pieces of a text; characters that are no piece stand alone."""

    def spans(self, text: str) -> list[tuple[int, int, int]]:
        """(id, start, end) for each id of `encode(text)`."""
        return self._spelling.spans(self.pieces(text))


class BPESegmenter(Segmenter):
    """Byte pair encoding, see `sentencepiece_bpe`.

    Args:
        merger: Which pieces are merged, and how early.
        spelling, pieces: See `Segmenter`.
        atoms: Texts that are always one piece, the longest where several begin: nothing is merged with them.
    """

    def __init__(
        self, merger: PieceMerger, spelling: Spelling, pieces: Iterable[str], atoms: Iterable[str] = ()
    ) -> None:
        super().__init__(spelling, pieces)
        self._merger = merger
        longest_first = sorted(atoms, key=len, reverse=True)
        self._atoms = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None
        self._cache: _Cache[list[int]] = _Cache(self._encode_word)

    def encode(self, text: str) -> list[int]:
        lookup = self._cache.__getitem__
        if self._atoms is None:
            ids = list(chain.from_iterable(map(lookup, self.words(text))))
        else:
            ids = []
            for n, part in enumerate(self._atoms.split(text)):
                ids += self._spelling.ids([part]) if n % 2 else chain.from_iterable(map(lookup, self.words(part)))
        return self._spelling.fused(ids)

    def pieces(self, text: str) -> list[str]:
        parts = self._atoms.split(text) if self._atoms else [text]
        out: list[str] = []
        for n, part in enumerate(parts):
            out += [part] if n % 2 else chain.from_iterable(map(self._merger.merge, self.words(part)))
        return out

    def _encode_word(self, word: str) -> list[int]:
        return self._spelling.ids(self._merger.merge(word))


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
        self._edges = _Cache(self.lattice.edges)
        self._cache: _Cache[_Word] = _Cache(self._word)

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
        if len(word) > CACHE_WORD_LENGTH:
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


Value = TypeVar("Value")


class _Cache(dict[str, Value]):
    """word -> what `compute` says of it; emptied when full, long words left out: it stays small."""

    def __init__(self, compute: Callable[[str], Value]) -> None:
        self._compute = compute

    def __missing__(self, word: str) -> Value:
        value = self._compute(word)
        if len(word) <= CACHE_WORD_LENGTH:
            if len(self) >= CACHE_WORDS:
                self.clear()
            self[word] = value
        return value


def word_pattern(pieces: Iterable[str]) -> str:
    """A regular expression for words: each reaches to where no piece can go on.

    Characters that stand side by side in a piece are put into one group (and with each the groups it is in already).
    A word is a run of characters of one group: letters of one script, say, or punctuation. If "▁" stands behind no
    other character in any piece, a word may begin with it, and ends in front of it.
    """
    pieces = list(pieces)
    leads = not any(_SPACE_INSIDE.search(piece) for piece in pieces)
    group_of: dict[str, list[str]] = {}
    for piece in pieces:
        run = piece.lstrip(SPACE) if leads else piece
        for left, right in pairwise(run):
            one, other = (group_of.setdefault(character, [character]) for character in (left, right))
            if one is not other:
                small, large = sorted((one, other), key=len)
                large += small
                group_of.update(dict.fromkeys(small, large))
    groups = {id(group): group for group in group_of.values()}.values()
    # The largest first: they are tried one after the other. What is in no group is never part of a longer piece.
    runs = [f"[{re.escape(''.join(group))}]+" for group in sorted(groups, key=len, reverse=True)]
    apart = re.escape("".join(group_of)) + (SPACE if leads else "")
    runs.append(f"[^{apart}]+" if apart else "(?s:.)+")
    return f"{SPACE}*(?:{'|'.join(runs)})|{SPACE}+" if leads else "|".join(runs)
