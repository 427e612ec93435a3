"""All segmentations of a text into pieces with probabilities: the best one, the n best, a random one, averages of all.

A unigram language model gives each piece x a probability p(x) and a segmentation x_1 ... x_m the product of theirs. A
text of n characters has up to 2^(n-1) segmentations, but they share their parts: in the lattice, a character boundary
is a node and a piece is an edge, and each of the questions here is answered by one or two walks over the edges, in log
space, however long the text is.

Sources: Kudo, "Subword regularization: improving neural network translation models with multiple subword candidates"
(2018), sections 3.2 and 3.3; n best paths: Huang and Chiang, "Better k-best parsing" (2005), algorithm 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from heapq import merge
from itertools import islice
from math import exp, inf, isfinite, log
from operator import index
from typing import Any, NamedTuple, Protocol

# What an unknown character costs, compared with the least likely piece: as in `sentencepiece` and `tokenizers`.
UNKNOWN_PENALTY = 10.0

Spans = list[tuple[int, int]]


class RandomSource(Protocol):
    """A `random.Random` or a `numpy.random.Generator`."""

    def random(self) -> float: ...


class BestPath(NamedTuple):
    """The most likely segmentation of a text.

    Attributes:
        spans: (start, end) of its pieces; one character each for unknown ones.
        score: The sum of their log probabilities.
        margin: By how much, at the closest decision along the path, the winner beats the runner-up; inf when nothing
            was to be decided. Where it is large, rounding cannot change the path.
    """

    spans: Spans
    score: float
    margin: float


class Lattice:
    """The segmentations of texts into pieces.

    Args:
        scores: piece -> natural logarithm of its probability. (Any finite number is taken: models in use have pieces
            with a score of 0, or more, so that they always win.)
        unknown_score: The score of a character that is no piece; by default UNKNOWN_PENALTY less than the lowest score.

    Raises:
        ValueError: There are no pieces, one is empty, or a score is not finite.
    """

    def __init__(self, scores: Mapping[str, float], *, unknown_score: float | None = None) -> None:
        if not scores:
            raise ValueError("scores must hold at least one piece")
        # next character -> [score of the piece that ends with it, or None; what may follow in a longer one, or None]
        self._trie: dict[str, list[Any]] = {}
        for piece, score in scores.items():
            if not piece:
                raise ValueError("a piece must not be empty")
            if not isfinite(score):
                raise ValueError(f"scores must be finite, got {score} for {piece!r}")
            children = self._trie
            for character in piece[:-1]:
                node = children.setdefault(character, [None, None])
                children = node[1] = node[1] or {}
            children.setdefault(piece[-1], [None, None])[0] = float(score)
        if unknown_score is None:
            unknown_score = min(scores.values()) - UNKNOWN_PENALTY
        self.unknown_score = float(unknown_score)
        self._longest = max(map(len, scores))

    def edges(self, text: str) -> list[list[tuple[int, float]]]:
        """For each start in `text`, shortest first: (end, score) of the pieces there, or of the unknown character."""
        out = []
        for start in range(len(text)):
            here = []
            children: dict[str, list[Any]] | None = self._trie
            end = start
            while children is not None and end < len(text) and (node := children.get(text[end])):
                score, children = node
                end += 1
                if score is not None:
                    here.append((end, score))
            if not here or here[0][0] != start + 1:
                here.insert(0, (start + 1, self.unknown_score))
            out.append(here)
        return out

    def viterbi(self, text: str) -> Spans:
        """The spans of the most likely segmentation; of several, the one whose last piece is longest, and so on."""
        return self.best_path(text).spans

    def best_path(self, text: str) -> BestPath:
        """The most likely segmentation, its score and its margin (Viterbi's algorithm).

        Scores are added from left to right, and a path replaces the best one so far to the same boundary only if it is
        strictly better; longer last pieces come first. This gives the segmentation that `tokenizers` gives, also where
        two are equal but for rounding.
        """
        n = len(text)
        best = [0.0] + [-inf] * n
        runner_up = [-inf] * (n + 1)
        starts = [0] * (n + 1)
        trie = self._trie
        for start in range(n):
            here = best[start]
            children: dict[str, list[Any]] | None = trie
            end = start
            for character in text[start : start + self._longest]:
                if children is None or (node := children.get(character)) is None:
                    break
                score, children = node
                end += 1
                if score is not None:
                    score += here
                    if score > best[end]:
                        runner_up[end] = best[end]
                        best[end] = score
                        starts[end] = start
                    elif score > runner_up[end]:
                        runner_up[end] = score
            first = trie.get(text[start])
            if first is None or first[0] is None:
                score = here + self.unknown_score
                if score > best[start + 1]:
                    runner_up[start + 1] = best[start + 1]
                    best[start + 1] = score
                    starts[start + 1] = start
                elif score > runner_up[start + 1]:
                    runner_up[start + 1] = score
        spans = []
        margin = inf
        end = n
        while end:
            start = starts[end]
            spans.append((start, end))
            if (gap := best[end] - runner_up[end]) < margin:
                margin = gap
            end = start
        spans.reverse()
        return BestPath(spans, best[n], margin)

    def n_best(self, text: str, n: int) -> list[tuple[Spans, float]]:
        """The n most likely segmentations (all, if there are fewer) with their scores, best first.

        For each boundary, the n best paths that end there are merged from those that end one piece earlier. The first
        is that of `viterbi`.

        Raises:
            ValueError: `n` is not positive.
        """
        if index(n) < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        incoming = self._incoming(text)
        # For each boundary: (score, start of the last piece, which of the paths to there), best first.
        paths: list[list[tuple[float, int, int]]] = [[(0.0, 0, 0)]]
        for end in range(1, len(text) + 1):
            extended = [
                [(path[0] + score, start, rank) for rank, path in enumerate(paths[start])]
                for start, score in incoming[end]
            ]
            paths.append(list(islice(merge(*extended, key=lambda path: -path[0]), n)))
        out = []
        for rank, (score, _, _) in enumerate(paths[-1]):
            spans = []
            end = len(text)
            while end:
                _, start, rank = paths[end][rank]
                spans.append((start, end))
                end = start
            out.append((spans[::-1], score))
        return out

    def sample(self, text: str, rng: RandomSource, *, alpha: float = 1.0) -> Spans:
        """A random segmentation, drawn with a probability proportional to P(segmentation)^alpha.

        Forward filtering, backward sampling: with the sums over all paths to each boundary at hand, the last piece is
        drawn, then the one before it, and so on. With alpha = 0 all segmentations are equally likely; a large alpha
        gives the best one nearly always.

        Raises:
            ValueError: `alpha` is negative or not finite.
        """
        incoming = self._incoming(text)
        forward = _path_sums(incoming, _checked(alpha))
        spans = []
        end = len(text)
        while end:
            threshold = rng.random()
            # Rounding may leave the sum of the probabilities a little below 1: then it is the last of them.
            for start, score in incoming[end]:
                threshold -= exp(forward[start] + alpha * score - forward[end])
                if threshold < 0.0:
                    break
            spans.append((start, end))
            end = start
        return spans[::-1]

    def marginals(self, text: str, *, alpha: float = 1.0) -> tuple[float, dict[tuple[int, int], float]]:
        """The log likelihood of a text, and the probability that a span is a piece of its segmentation.

            log Z = log sum over segmentations P(x)^alpha,      p(span) = sum over those with the span P(x)^alpha / Z

        computed by the forward-backward algorithm. The sum of p over the spans that spell a piece is the number of its
        occurrences that is expected: the E-step of training.

        Raises:
            ValueError: `alpha` is negative or not finite.
        """
        incoming = self._incoming(text)
        forward = _path_sums(incoming, _checked(alpha))
        n = len(text)
        mirrored: list[list[tuple[int, float]]] = [[] for _ in range(n + 1)]
        for end in range(n, 0, -1):
            for start, score in incoming[end]:
                mirrored[n - start].append((n - end, score))
        backward = _path_sums(mirrored, alpha)[::-1]
        return forward[n], {
            (start, end): exp(forward[start] + alpha * score + backward[end] - forward[n])
            for end in range(1, n + 1)
            for start, score in incoming[end]
        }

    def _incoming(self, text: str) -> list[list[tuple[int, float]]]:
        """For each boundary of `text`: (start, score) of the pieces that end there, longest first."""
        incoming: list[list[tuple[int, float]]] = [[] for _ in range(len(text) + 1)]
        for start, edges in enumerate(self.edges(text)):
            for end, score in edges:
                incoming[end].append((start, score))
        return incoming


def _checked(alpha: float) -> float:
    if not 0.0 <= alpha < inf:
        raise ValueError(f"alpha must be a finite number of at least 0, got {alpha}")
    return alpha


def _path_sums(incoming: list[list[tuple[int, float]]], alpha: float) -> list[float]:
    """For each boundary, the logarithm of the sum over all paths to it of exp(alpha * score)."""
    sums = [0.0]
    for edges in incoming[1:]:
        terms = [sums[start] + alpha * score for start, score in edges]
        largest = max(terms)
        sums.append(largest + log(sum(exp(term - largest) for term in terms)))
    return sums
