"""Cutting normalized text into the pieces of a vocabulary, word by word.

A text is cut into words that no piece can reach across, whatever their spaces and letters (see `word_pattern`); every
word is cut into pieces by itself, and its ids are remembered. This is exact for BPE; for Unigram, nearly (see
`sentencepiece_unigram`).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from itertools import chain, pairwise

from minillm.tokenizers.metaspace import SPACE
from minillm.tokenizers.pieces import PieceCache
from minillm.tokenizers.sentencepiece_bpe import PieceMerger

_SPACE_INSIDE = re.compile(f"[^{SPACE}]{SPACE}")


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
        self._cache: PieceCache[list[int]] = PieceCache(self._encode_word)

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
