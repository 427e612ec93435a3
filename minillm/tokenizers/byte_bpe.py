"""Byte-level byte pair encoding: the tokenizer of GPT-2, GPT-3, GPT-4, Llama 3 and most models since.

Text is cut into pieces (`split_patterns`), a piece becomes its UTF-8 bytes, and every byte is a token to begin with, so
that no text is out of vocabulary. Training makes frequent pairs of neighbouring tokens into new tokens until the
vocabulary is full; encoding applies these merges in the order in which they were learned (`merges`); decoding joins
bytes.

Source: Radford et al., "Language models are unsupervised multitask learners" (GPT-2, 2019), section 2.2.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from itertools import chain
from operator import index
from pathlib import Path

from minillm.tokenizers import tokenizer_json
from minillm.tokenizers.merges import MAX_VOCAB_SIZE, MergeTable, Pair, learn_merges
from minillm.tokenizers.split_patterns import split_pattern

# Pieces repeat: ten megabytes of Python source hold 2.5 million of them, but only 44 thousand different ones.
CACHE_PIECES = 1 << 17
CACHE_PIECE_LENGTH = 128


class ByteBPETokenizer:
    """A byte-level BPE tokenizer, made by `train`, `load` or `from_gpt2_files`.

    Ids of a trained one: special tokens first, then the 256 bytes in the order of GPT-2's byte alphabet, then merges.

    Args:
        vocabulary: The bytes of each token -> its id; all 256 single bytes among them.
        merges: Pairs of tokens' bytes, in the order in which they are applied.
        pattern: "gpt2" or "gpt4", see `split_patterns`.
        special_tokens: Text -> id of tokens that are never split and never merged.

    Raises:
        ValueError: A byte, or a part or the result of a merge, has no id; an id is out of range or used twice; a
            special token is empty or spelled like another token; the pattern is unknown.
    """

    def __init__(
        self,
        vocabulary: Mapping[bytes, int],
        merges: Iterable[tuple[bytes, bytes]],
        *,
        pattern: str = "gpt2",
        special_tokens: Mapping[str, int] | None = None,
    ) -> None:
        self._split = split_pattern(pattern)
        self._ids = dict(vocabulary)
        self._special_tokens = dict(special_tokens or {})
        _check_special_tokens(self._special_tokens, self._ids)
        self._bytes: dict[int, bytes] = {}
        named = [*self._ids.items(), *((text.encode(), i) for text, i in self._special_tokens.items())]
        for token, i in named:
            if not 0 <= i < MAX_VOCAB_SIZE:
                raise ValueError(f"token {token!r} has id {i}, which is not in 0 .. {MAX_VOCAB_SIZE - 1}")
            if self._bytes.setdefault(i, token) != token:
                raise ValueError(f"token {token!r} has id {i}, which belongs to another token")
        missing = [byte for byte in range(256) if bytes([byte]) not in self._ids]
        if missing:
            raise ValueError(f"vocabulary must hold all 256 single bytes; missing: {', '.join(map(hex, missing))}")
        self._byte_ids = [self._ids[bytes([byte])] for byte in range(256)]
        self._merges: dict[Pair, int] = {}
        for left, right in merges:
            for part in (left, right, left + right):
                if part not in self._ids:
                    raise ValueError(f"merge ({left!r}, {right!r}): {part!r} is not in the vocabulary")
            pair = self._ids[left], self._ids[right]
            self._merges.pop(pair, None)  # of two equal merges the later one counts
            self._merges[pair] = self._ids[left + right]
        self._merge_table = MergeTable(self._merges)
        longest_first = sorted(self._special_tokens, key=len, reverse=True)
        self._special_cuts = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self._cache = _PieceCache(self._encode_piece)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        pattern: str = "gpt2",
        special_tokens: Sequence[str] = (),
        min_frequency: int = 1,
    ) -> ByteBPETokenizer:
        """Learn a vocabulary from texts, which are read one after the other and not kept.

        Args:
            texts: Documents; no merge crosses from one into the next. A special token in them is text like any other.
            vocab_size: Number of tokens wanted, special tokens and the 256 bytes included. Fewer come out when the
                texts have no pairs left to merge.
            pattern: "gpt2" or "gpt4".
            special_tokens: Such as ["<|endoftext|>"]; they get the ids 0, 1, ...
            min_frequency: Learn no token from a pair that occurs less often.

        Raises:
            TypeError: `texts` is one string, or holds something else than strings.
            ValueError: `vocab_size` or `min_frequency` is out of range, the pattern unknown, a text has a lone
                surrogate, a special token is empty, twice there or spelled like a byte.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be an iterable of documents, got one str; for a single document pass [text]")
        split = split_pattern(pattern)
        special = {text: i for i, text in enumerate(special_tokens)}
        if len(special) < len(special_tokens):
            raise ValueError(f"special_tokens must differ from each other, got {list(special_tokens)!r}")
        _check_special_tokens(special, tokenizer_json.BYTE_ALPHABET)
        # A special token that files would spell like a learned token is that token; no merge spells the others.
        tokens = [text.encode() if tokenizer_json.spells_itself(text) else b"" for text in special]
        tokens += [byte for byte in tokenizer_json.BYTE_ALPHABET if byte not in tokens]
        if not len(tokens) <= index(vocab_size) <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must be from {len(tokens)} (256 bytes and {len(special)} special tokens) "
                f"to {MAX_VOCAB_SIZE}, got {vocab_size}"
            )
        if min_frequency < 1:
            raise ValueError(f"min_frequency must be at least 1, got {min_frequency}")
        pieces: Counter[str] = Counter()
        for text in texts:
            _check_text(text)
            for block in split.split(text):
                pieces.update(block)
        word_counts = {piece.encode(): count for piece, count in pieces.items()}
        vocabulary = {token: i for i, token in enumerate(tokens) if token}
        bytes_of = dict(enumerate(tokens))
        merges = []
        for (left, right), merged in learn_merges(word_counts, tokens, vocab_size, min_frequency).items():
            bytes_of[merged] = bytes_of[left] + bytes_of[right]
            vocabulary[bytes_of[merged]] = merged
            merges.append((bytes_of[left], bytes_of[right]))
        return cls(vocabulary, merges, pattern=pattern, special_tokens=special)

    @property
    def vocab_size(self) -> int:
        """The largest id + 1: the number of rows that an embedding needs."""
        return max(self._bytes) + 1

    @property
    def pattern(self) -> str:
        """The name of the split pattern."""
        return self._split.name

    @property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The bytes of the two tokens of each merge, in the order in which merges are applied."""
        return [(self._bytes[left], self._bytes[right]) for left, right in self._merges]

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text -> id of the special tokens."""
        return dict(self._special_tokens)

    def __repr__(self) -> str:
        special = list(self._special_tokens)
        return f"ByteBPETokenizer(vocab_size={self.vocab_size}, pattern={self.pattern!r}, special_tokens={special})"

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; ValueError for an id that no token has."""
        token = self._bytes.get(index(token_id))
        if token is None:
            raise ValueError(f"token id must be one of the {len(self._bytes)} of the vocabulary, got {token_id!r}")
        return token

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """The token ids of a text.

        Args:
            text: Any text without lone surrogates, which have no UTF-8 form.
            allow_special: Turn the text of a special token into its id (of several that begin at the same place, the
                longest). False treats it like any other text, which is what text from strangers calls for.

        Raises:
            TypeError: `text` is not a str.
            ValueError: `text` has a lone surrogate.
        """
        _check_text(text)
        if self._special_cuts is None or not allow_special:
            return self._encode_ordinary(text)
        ids: list[int] = []
        start = 0
        for match in self._special_cuts.finditer(text):
            ids += self._encode_ordinary(text[start : match.start()])
            ids.append(self._special_tokens[match.group()])
            start = match.end()
        return ids + self._encode_ordinary(text[start:])

    def encode_batch(self, texts: Iterable[str], *, allow_special: bool = True) -> list[list[int]]:
        """`encode` for each of several texts."""
        return [self.encode(text, allow_special=allow_special) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD. ValueError for an id that no token has."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def save(self, path: str | Path) -> None:
        """Write a Hugging Face tokenizer.json. It appears under its name only when it is complete and on disk."""
        parts = tokenizer_json.Parts(self._ids, self.merges, self.pattern, self._special_tokens)
        tokenizer_json.save(parts, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> ByteBPETokenizer:
        """Read a Hugging Face tokenizer.json; ValueError says what in it is not byte-level BPE as it is done here."""
        return cls._from_parts(tokenizer_json.load(Path(path)), path)

    @classmethod
    def from_gpt2_files(
        cls, vocab: str | Path, merges: str | Path, *, special_tokens: Sequence[str] = ("<|endoftext|>",)
    ) -> ByteBPETokenizer:
        """Read GPT-2's two files, vocab.json and merges.txt; special tokens that vocab.json lacks get the next ids."""
        return cls._from_parts(tokenizer_json.load_gpt2_files(Path(vocab), Path(merges), special_tokens), vocab)

    @classmethod
    def _from_parts(cls, parts: tokenizer_json.Parts, path: str | Path) -> ByteBPETokenizer:
        try:
            return cls(parts.vocabulary, parts.merges, pattern=parts.pattern, special_tokens=parts.special_tokens)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _encode_ordinary(self, text: str) -> list[int]:
        lookup = self._cache.__getitem__
        return list(chain.from_iterable(chain.from_iterable(map(lookup, block)) for block in self._split.split(text)))

    def _encode_piece(self, piece: str) -> list[int]:
        return self._merge_table.apply([self._byte_ids[byte] for byte in piece.encode()])


class _PieceCache(dict[str, list[int]]):
    """piece -> token ids, computed when first asked for; emptied when full, long pieces left out: it stays small."""

    def __init__(self, compute: Callable[[str], list[int]]) -> None:
        self._compute = compute

    def __missing__(self, piece: str) -> list[int]:
        ids = self._compute(piece)
        if len(piece) <= CACHE_PIECE_LENGTH:
            if len(self) >= CACHE_PIECES:
                self.clear()
            self[piece] = ids
        return ids


def _check_text(text: object) -> None:
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise ValueError(f"text must not contain lone surrogates, got {text[at]!r} at index {at}") from None


def _check_special_tokens(special_tokens: Iterable[str], vocabulary: Container[bytes]) -> None:
    for text in special_tokens:
        _check_text(text)
        if not text:
            raise ValueError("a special token must not be empty")
        token = tokenizer_json.unspell(text)
        if token in vocabulary and token != text.encode():
            raise ValueError(f"special token {text!r} is how a tokenizer.json spells the token {token!r}")
