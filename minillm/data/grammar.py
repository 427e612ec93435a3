"""Probabilistic context-free grammars whose entropy is known exactly.

A grammar rewrites its start symbol, choosing each rule with its probability, until only words are left. The choices
are independent, so for a grammar without ambiguity (one derivation for a sentence) with

    M[a, b] = expected number of b in one rewriting of a         h[a] = - sum_r p(r) ln p(r) over the rules of a

the expected number of times that each symbol is rewritten is the row N = e_start (I - M)^-1, and

    entropy of a sentence   = N h          nats
    expected count of word w = N W[:, w]    W[a, w] = expected number of w in one rewriting of a

Source: Grenander, "Syntax-controlled probabilities", 1967; Chi, "Statistical properties of probabilistic context-free
grammars", Computational Linguistics 25(1), 1999, section 4 (the entropy of a derivation).
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

Rule = tuple[float, tuple[str, ...]]


class ProbabilisticGrammar:
    """Rules `{symbol: [(probability, (symbol or word, ...)), ...]}`; whatever is no key of `rules` is a word.

    Raises ValueError when probabilities are not positive or do not sum to 1, a right-hand side is empty, a symbol can
    start with itself (left recursion: the parser here reads left to right), or derivations are not sure to end with a
    finite expected length (spectral radius of M not below 1).
    """

    def __init__(self, rules: Mapping[str, Sequence[Rule]], start: str) -> None:
        if start not in rules:
            raise ValueError(f"start must be one of the symbols {sorted(rules)}, got {start!r}")
        for symbol, alternatives in rules.items():
            if not all(probability > 0 and right for probability, right in alternatives):
                raise ValueError(f"every rule of {symbol!r} needs a positive probability and a right-hand side")
            total = math.fsum(probability for probability, _ in alternatives)
            if abs(total - 1) > 1e-9:
                raise ValueError(f"the probabilities of the rules of {symbol!r} must sum to 1, they sum to {total}")
        self.rules, self.start = {symbol: list(rules[symbol]) for symbol in rules}, start
        self.symbols = list(self.rules)
        self.words = sorted(
            {item for rights in self.rules.values() for _, right in rights for item in right} - set(rules)
        )
        self._number = {symbol: number for number, symbol in enumerate(self.symbols)}
        self._word_number = {word: number for number, word in enumerate(self.words)}
        self._cumulative = {
            symbol: list(itertools.accumulate(probability for probability, _ in alternatives))
            for symbol, alternatives in self.rules.items()
        }
        self._reversed = {symbol: [right[::-1] for _, right in rights] for symbol, rights in self.rules.items()}
        self._refuse_left_recursion()
        radius = max(abs(np.linalg.eigvals(self._expansions(self.symbols, self._number))))
        if radius >= 1 - 1e-9:
            raise ValueError(
                f"derivations of this grammar are not sure to end: the spectral radius of M is {radius:.4f}"
            )

    @cached_property
    def entropy(self) -> float:
        """Entropy of one derivation, in nats; of one sentence, where the grammar has no ambiguity."""
        per_symbol = np.array(
            [-math.fsum(p * math.log(p) for p, _ in self.rules[symbol]) for symbol in self.symbols], dtype=np.float64
        )
        return float(self._rewritings @ per_symbol)

    @cached_property
    def expected_counts(self) -> dict[str, float]:
        """Expected number of times that each word occurs in a sentence. They sum to the expected length."""
        counts = self._rewritings @ self._expansions(self.words, self._word_number)
        return dict(zip(self.words, counts.tolist(), strict=True))

    @cached_property
    def first_word_probabilities(self) -> dict[str, float]:
        """Probability that a sentence starts with each word."""
        n = len(self.symbols)
        steps, stops = np.zeros((n, n)), np.zeros((n, len(self.words)))
        for symbol, row in self._number.items():
            for probability, (first, *_) in self.rules[symbol]:
                if first in self._number:
                    steps[row, self._number[first]] += probability
                else:
                    stops[row, self._word_number[first]] += probability
        visits = np.linalg.solve((np.eye(n) - steps).T, np.eye(n)[self._number[self.start]])
        return dict(zip(self.words, (visits @ stops).tolist(), strict=True))

    def sample(self, generator: random.Random) -> list[str]:
        """The words of one sentence. `random.Random(seed)` gives the same sentences on every machine."""
        words: list[str] = []
        stack = [self.start]
        while stack:
            item = stack.pop()
            cumulative = self._cumulative.get(item)
            if cumulative is None:
                words.append(item)
            else:
                choice = min(bisect.bisect_right(cumulative, generator.random()), len(cumulative) - 1)
                stack.extend(self._reversed[item][choice])
        return words

    def parse(self, words: Sequence[str]) -> tuple[float, int]:
        """(natural log of the sentence's probability, number of its derivations); (-inf, 0) for no sentence.

        Sums over all derivations (the inside algorithm, top down with a table), so it is exact with ambiguity too.
        """
        table: dict[tuple[str, int], dict[int, tuple[float, int]]] = {}

        def inside(item: str, at: int) -> dict[int, tuple[float, int]]:
            """For each place where `item`, begun at `at`, can end: (log probability, derivations)."""
            if item not in self.rules:
                return {at + 1: (0.0, 1)} if at < len(words) and words[at] == item else {}
            if (item, at) not in table:
                ends: dict[int, tuple[float, int]] = {}
                for probability, right in self.rules[item]:
                    reached = {at: (math.log(probability), 1)}
                    for part in right:
                        reached = _extend(reached, part)
                        if not reached:
                            break
                    for end, value in reached.items():
                        ends[end] = _add(ends.get(end), value)
                table[item, at] = ends
            return table[item, at]

        def _extend(reached: dict[int, tuple[float, int]], part: str) -> dict[int, tuple[float, int]]:
            further: dict[int, tuple[float, int]] = {}
            for middle, (log_left, n_left) in reached.items():
                for end, (log_right, n_right) in inside(part, middle).items():
                    further[end] = _add(further.get(end), (log_left + log_right, n_left * n_right))
            return further

        return inside(self.start, 0).get(len(words), (-math.inf, 0))

    @cached_property
    def _rewritings(self) -> npt.NDArray[np.float64]:
        """N: how often each symbol is rewritten in a sentence, in expectation."""
        n = len(self.symbols)
        expansions = self._expansions(self.symbols, self._number)
        return np.asarray(np.linalg.solve((np.eye(n) - expansions).T, np.eye(n)[self._number[self.start]]))

    def _expansions(self, items: Sequence[str], number: Mapping[str, int]) -> npt.NDArray[np.float64]:
        """[symbol, item]: how often the item stands in one rewriting of the symbol, in expectation."""
        matrix = np.zeros((len(self.symbols), len(items)))
        for symbol, row in self._number.items():
            for probability, right in self.rules[symbol]:
                for item in right:
                    if item in number:
                        matrix[row, number[item]] += probability
        return matrix

    def _refuse_left_recursion(self) -> None:
        firsts = {symbol: {right[0] for _, right in rights} & set(self.rules) for symbol, rights in self.rules.items()}
        for symbol in self.symbols:
            reached, frontier = set[str](), set(firsts[symbol])
            while frontier:
                reached |= frontier
                frontier = set[str]().union(*(firsts[item] for item in frontier)) - reached
            if symbol in reached:
                raise ValueError(f"the symbol {symbol!r} can start with itself: left recursion is not supported")


def _add(old: tuple[float, int] | None, new: tuple[float, int]) -> tuple[float, int]:
    return new if old is None else (float(np.logaddexp(old[0], new[0])), old[1] + new[1])
