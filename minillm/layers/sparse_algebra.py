"""The algebra of sparse patterns: what a pattern is, and how ``a & b``, ``a | b`` and ``~a`` combine them.

A pattern is a rule over *places*, not a matrix. Keys stand at places ``0 .. key_length - 1`` and the last query stands
at the last key, so query ``i`` stands at place ``i + key_length - query_length``: with a key/value cache the same rule
goes on where it stopped (a rolling cache forgets the first keys, and then only bands keep their meaning). ``dense``
writes the rule out as a matrix; ``blocks`` finds the live tiles of that matrix without writing it out.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.layers.arguments import at_least
from minillm.layers.block_layout import BlockLayout, Extent, block_layout


class Pattern(ABC):
    """A rule that says which query may look at which key. Immutable, hashable, equal by value."""

    @abstractmethod
    def allowed(self, place: Tensor, key: Tensor, key_length: int) -> Tensor:
        """Boolean, True where the query at ``place`` may look at ``key``; integer tensors that broadcast."""

    @abstractmethod
    def bounds(self, place: Extent, key: Extent, key_length: int) -> tuple[Tensor, Tensor]:
        """What is known of whole tiles: boolean ``(some, all)`` for the extents of ``place`` (rows) and ``key``.

        ``some`` must be True where any pair is allowed, ``all`` may be True only where every pair is. Tiles between the
        two are looked at pair by pair, so a loose answer costs time, never correctness.
        """

    def dense(self, query_length: int, key_length: int, *, device: torch.device | str | None = None) -> Tensor:
        """The whole matrix: boolean (query_length, key_length), True where a query may look."""
        at_least("query_length", query_length, 0)
        at_least("key_length", key_length, 0)
        place = torch.arange(key_length - query_length, key_length, device=device)
        key = torch.arange(key_length, device=device)
        result = torch.empty(query_length, key_length, dtype=torch.bool, device=device)
        rows = max(1, 2**20 // max(1, key_length))  # a strip at a time: the integers behind it are 8 bytes a pair
        for start in range(0, query_length if key_length else 0, rows):
            result[start : start + rows] = self.allowed(place[start : start + rows, None], key, key_length)
        return result

    def blocks(self, query_length: int, key_length: int, block_size: int) -> BlockLayout:
        """The dead, partial and full tiles of the matrix, and what they cost; equal questions are answered once."""
        return block_layout(self, query_length, key_length, block_size)

    def draw(self, query_length: int, key_length: int | None = None) -> str:
        """The matrix as text: a row a query, ``■`` where it may look, ``·`` where not."""
        matrix = self.dense(query_length, query_length if key_length is None else key_length)
        return "\n".join(" ".join("■" if pair else "·" for pair in row) for row in matrix.tolist())

    def __and__(self, other: "Pattern") -> "Pattern":
        return Both(self, other) if isinstance(other, Pattern) else NotImplemented

    def __or__(self, other: "Pattern") -> "Pattern":
        return Either(self, other) if isinstance(other, Pattern) else NotImplemented

    def __invert__(self) -> "Pattern":
        return Neither(self)


@dataclass(frozen=True)
class Both(Pattern):
    """``first & second``."""

    first: Pattern
    second: Pattern

    def allowed(self, place: Tensor, key: Tensor, key_length: int) -> Tensor:
        return self.first.allowed(place, key, key_length) & self.second.allowed(place, key, key_length)

    def bounds(self, place: Extent, key: Extent, key_length: int) -> tuple[Tensor, Tensor]:
        first, second = (part.bounds(place, key, key_length) for part in (self.first, self.second))
        return first[0] & second[0], first[1] & second[1]


@dataclass(frozen=True)
class Either(Pattern):
    """``first | second``."""

    first: Pattern
    second: Pattern

    def allowed(self, place: Tensor, key: Tensor, key_length: int) -> Tensor:
        return self.first.allowed(place, key, key_length) | self.second.allowed(place, key, key_length)

    def bounds(self, place: Extent, key: Extent, key_length: int) -> tuple[Tensor, Tensor]:
        first, second = (part.bounds(place, key, key_length) for part in (self.first, self.second))
        return first[0] | second[0], first[1] | second[1]


@dataclass(frozen=True)
class Neither(Pattern):
    """``~pattern``."""

    pattern: Pattern

    def allowed(self, place: Tensor, key: Tensor, key_length: int) -> Tensor:
        return ~self.pattern.allowed(place, key, key_length)

    def bounds(self, place: Extent, key: Extent, key_length: int) -> tuple[Tensor, Tensor]:
        some, every = self.pattern.bounds(place, key, key_length)
        return ~every, ~some
