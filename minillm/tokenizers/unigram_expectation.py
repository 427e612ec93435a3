"""The lattices of many words at once: the E-step of Unigram training as walks over arrays.

What `Lattice.marginals` computes edge by edge is computed here position by position: one numpy operation takes all
edges that end at the same position of their words. Words are taken in chunks, so that what is needed for the walk stays
small; what is kept of a chunk is two numbers an edge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
CompactIntegers = npt.NDArray[np.int32]

# Path sums are held relative to the best path, so they are at most the number of paths, 2^(n-1): a float64.
MAX_WORD_LENGTH = 512
CHUNK_CHARACTERS = 1 << 17
N_CODE_POINTS = 0x110000


@dataclass
class _Chunk:
    """Words of a chunk, longest first, so that those that have a position p are the first ones.

    The node of position p in word w (the boundary after p characters) is `node_offsets[p] + w`; edges are grouped by
    the node at which they end.
    """

    counts: Floats  # (words,) how often each occurs
    ends: Integers  # (words,) its last node
    node_offsets: Integers  # (positions + 1,) where the nodes of each position begin
    n_edges: npt.NDArray[np.uint8]  # (nodes,) how many end there
    pieces: CompactIntegers  # (edges,) the number of the piece
    starts: CompactIntegers  # (edges,) the node where it starts


class WordLattices:
    """The lattices of counted words over numbered pieces.

    Args:
        word_counts: How often each word occurs; none is empty or longer than MAX_WORD_LENGTH.
        pieces: All characters of the words are among them.
        whole_words: False takes away the edge over a whole word of several characters: what remains is how the words
            are spelled by other pieces.

    Raises:
        ValueError: A word is empty or too long; a character is not a piece.
    """

    def __init__(self, word_counts: Mapping[str, int], pieces: Sequence[str], *, whole_words: bool = True) -> None:
        words = sorted(word_counts, key=len, reverse=True)
        if words and not 1 <= len(words[-1]) <= len(words[0]) <= MAX_WORD_LENGTH:
            raise ValueError(f"words must have 1 to {MAX_WORD_LENGTH} characters, got {words[0]!r} and {words[-1]!r}")
        missing = set().union(*words).difference(pieces)
        if missing:
            raise ValueError(f"every character must be a piece; missing: {sorted(missing)[:10]}")
        self._words = words
        self._n_pieces = len(pieces)
        trie = list(_trie_levels(pieces))
        self._chunks = []
        start = 0
        while start < len(words):
            end = start + max(1, CHUNK_CHARACTERS // len(words[start]))
            counts = np.fromiter(map(word_counts.__getitem__, words[start:end]), np.float64)
            self._chunks.append(_chunk(words[start:end], counts, trie, whole_words))
            start = end

    def expected_counts(self, scores: Floats) -> tuple[float, Floats]:
        """The log likelihood of the words, and how often each piece is expected in their segmentations.

        Forward: the score of the best path to each node, and the sum over all paths relative to it. Backward: the sums
        from each node to the end. An edge's probability is the product of both sums and its own weight, divided by the
        sum over all paths of its word; everything is times the count of the word.
        """
        log_likelihood = 0.0
        expected = np.zeros(self._n_pieces)
        for chunk in self._chunks:
            best, sums, weights = _forward(chunk, scores)
            log_likelihood += float(chunk.counts @ (best[chunk.ends] + np.log(sums[chunk.ends])))
            to_the_end = np.zeros_like(sums)
            to_the_end[chunk.ends] = chunk.counts / sums[chunk.ends]
            for nodes, edges in _positions(chunk, backwards=True):
                starts = chunk.starts[edges]
                weights[edges] *= np.repeat(to_the_end[nodes], chunk.n_edges[nodes])
                np.add.at(to_the_end, starts, weights[edges])
            weights *= sums[chunk.starts]
            expected += np.bincount(chunk.pieces, weights, self._n_pieces)
        return log_likelihood, expected

    def best_paths(self, scores: Floats) -> dict[str, list[int]]:
        """The numbers of the pieces of each word's best segmentation, last piece first."""
        found = []
        for chunk in self._chunks:
            _, _, weights = _forward(chunk, scores)
            ends = np.repeat(np.arange(len(chunk.n_edges)), chunk.n_edges)
            best = np.flatnonzero(weights == 1.0)  # exp(0): on the best path to its end; of several, the first is taken
            edge_to = np.zeros(len(chunk.n_edges), np.int64)
            edge_to[ends[best[::-1]]] = best[::-1]
            pieces, starts = chunk.pieces[edge_to].tolist(), chunk.starts[edge_to].tolist()
            for node in chunk.ends.tolist():
                path = []
                while node >= len(chunk.ends):
                    path.append(pieces[node])
                    node = starts[node]
                found.append(path)
        return dict(zip(self._words, found, strict=True))

    def keep(self, kept: npt.NDArray[np.bool_]) -> None:
        """Take pieces away: only those marked in `kept` remain, numbered anew in the same order."""
        numbers = (np.cumsum(kept) - 1).astype(np.int32)
        for chunk in self._chunks:
            edges = kept[chunk.pieces]
            ends = np.repeat(np.arange(len(chunk.n_edges)), chunk.n_edges)
            chunk.n_edges = np.bincount(ends[edges], minlength=len(chunk.n_edges)).astype(np.uint8)
            chunk.pieces = numbers[chunk.pieces[edges]]
            chunk.starts = chunk.starts[edges]
        self._n_pieces = int(kept.sum())


def _forward(chunk: _Chunk, scores: Floats) -> tuple[Floats, Floats, Floats]:
    """Of each node: the best score, and the sum over all paths to it / the best one; of each edge: its weight.

    An edge's weight is exp(score to its end over it - best score to its end), at most 1.
    """
    n_nodes = chunk.node_offsets[-1]
    best, sums, weights = np.zeros(n_nodes), np.ones(n_nodes), np.empty(len(chunk.pieces))
    for nodes, edges in _positions(chunk):
        n_edges = chunk.n_edges[nodes]
        first = np.cumsum(n_edges, dtype=np.int64) - n_edges
        starts = chunk.starts[edges]
        score = scores[chunk.pieces[edges]]
        score += best[starts]
        best[nodes] = np.maximum.reduceat(score, first)
        score -= np.repeat(best[nodes], n_edges)
        np.exp(score, out=score)
        weights[edges] = score
        sums[nodes] = np.add.reduceat(score * sums[starts], first)
    return best, sums, weights


def _positions(chunk: _Chunk, backwards: bool = False) -> Iterator[tuple[slice, slice]]:
    """For each position of the words but the first: its nodes, and the edges that end there."""
    edge_offsets = np.concatenate([[0], np.cumsum(chunk.n_edges, dtype=np.int64)])
    positions = range(1, len(chunk.node_offsets) - 1)
    for position in reversed(positions) if backwards else positions:
        first, last = chunk.node_offsets[position], chunk.node_offsets[position + 1]
        yield slice(first, last), slice(edge_offsets[first], edge_offsets[last])


def _trie_levels(pieces: Sequence[str]) -> Iterator[tuple[Integers, CompactIntegers]]:
    """The trie of the pieces, level by level.

    Yields, for each length: the sorted keys (node of the level above) * N_CODE_POINTS + (next code point) of its nodes,
    and the number of the piece that each node spells, or -1. A node is the place of its key.
    """
    codes = _code_points("".join(pieces))
    lengths = np.fromiter(map(len, pieces), np.int64, len(pieces))
    at = np.cumsum(lengths) - lengths
    numbers = np.arange(len(pieces))
    nodes = np.zeros(len(pieces), np.int64)
    length = 0
    while len(numbers):
        length += 1
        keys, nodes = np.unique(nodes * N_CODE_POINTS + codes[at[numbers] + length - 1], return_inverse=True)
        spelled = np.full(len(keys), -1, np.int32)
        complete = lengths[numbers] == length
        spelled[nodes[complete]] = numbers[complete]
        yield keys, spelled
        numbers, nodes = numbers[~complete], nodes[~complete]


def _chunk(words: list[str], counts: Floats, trie: list[tuple[Integers, CompactIntegers]], whole_words: bool) -> _Chunk:
    """Find all edges: every position walks down the trie, as long as there is a child for its next character."""
    codes = _code_points("".join(words))
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    # Words are sorted: how many have a position p is how many are not shorter.
    alive = len(words) - np.searchsorted(lengths[::-1], np.arange(lengths[0] + 1))
    node_offsets = np.concatenate([[0], np.cumsum(alive)])
    word = np.repeat(np.arange(len(words)), lengths)
    position = np.arange(len(codes)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    left = lengths[word] - position
    at = np.arange(len(codes))
    nodes = np.zeros(len(codes), np.int64)
    found = []
    for length, (keys, spelled) in enumerate(trie, start=1):
        enough = left[at] >= length
        at, nodes = at[enough], nodes[enough]
        wanted = nodes * N_CODE_POINTS + codes[at + length - 1]
        nodes = np.searchsorted(keys, wanted)
        nodes[nodes == len(keys)] = 0
        there = keys[nodes] == wanted
        at, nodes = at[there], nodes[there]
        edges = spelled[nodes] >= 0
        if not whole_words and length > 1:
            edges &= lengths[word[at]] > length
        begin = at[edges]
        ends = node_offsets[position[begin] + length] + word[begin]
        starts = node_offsets[position[begin]] + word[begin]
        found.append((ends.astype(np.int32), starts.astype(np.int32), spelled[nodes[edges]]))
    ends, starts, pieces = (np.concatenate(parts) for parts in zip(*found, strict=True))
    by_end = np.argsort(ends, kind="stable")
    return _Chunk(
        counts=counts,
        ends=node_offsets[lengths] + np.arange(len(words)),
        node_offsets=node_offsets,
        n_edges=np.bincount(ends, minlength=node_offsets[-1]).astype(np.uint8),
        pieces=pieces[by_end],
        starts=starts[by_end],
    )


def _code_points(text: str) -> Integers:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
