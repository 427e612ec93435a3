"""Byte-level byte pair encoding: the tokenizer of GPT-2, GPT-3, GPT-4, Llama 3 and most models since.

Text is cut into pieces (`split_patterns`), a piece becomes its UTF-8 bytes, and every byte is a token to begin with, so
that no text is out of vocabulary. Training makes frequent pairs of neighbouring tokens into new tokens until the
vocabulary is full; encoding applies these merges in the order in which they were learned (`merges`); decoding joins
bytes.

Source: Radford et al., "Language models are unsupervised multitask learners" (GPT-2, 2019), section 2.2.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from operator import index
from pathlib import Path
from typing import Any, Self

from minillm.tokenizers.added_tokens import AddedToken
from minillm.tokenizers.byte_alphabet import BYTE_ALPHABET, spell, spells_itself, unspell
from minillm.tokenizers.byte_bpe_files import decoder_json, model_json, pre_tokenizer_json, read_gpt2_files, read_parts
from minillm.tokenizers.merges import MAX_VOCAB_SIZE, MergeTable, Pair, learn_merges
from minillm.tokenizers.normalization import Normalizer
from minillm.tokenizers.padding import Padding
from minillm.tokenizers.pieces import check_names, check_text, count_pieces
from minillm.tokenizers.split_patterns import split_pattern
from minillm.tokenizers.template import Template
from minillm.tokenizers.tokenizer import Tokenizer
from minillm.tokenizers.truncation import Truncation


class ByteBPETokenizer(Tokenizer):
    """A byte-level BPE tokenizer, made by `train`, `load` or `from_gpt2_files`.

    Ids of a trained one: special tokens first, then the 256 bytes in the order of GPT-2's byte alphabet, then merges.

    Args:
        vocabulary: The bytes of each token -> its id; all 256 single bytes among them.
        merges: Pairs of tokens' bytes, in the order in which they are applied.
        pattern: "gpt2" or "gpt4", see `split_patterns`.
        special_tokens: Text -> id of tokens that are never split and never merged, or `AddedToken`s.
        ignore_merges: A piece that is a token as a whole is that token, even if no merges lead to it (Llama 3).
        normalizer, template, truncation, padding: As for every `Tokenizer`; GPT models have none of them.

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
        special_tokens: Mapping[str, int] | Iterable[AddedToken] = (),
        ignore_merges: bool = False,
        normalizer: Normalizer | None = None,
        template: Template | None = None,
        truncation: Truncation | None = None,
        padding: Padding | None = None,
    ) -> None:
        self._split = split_pattern(pattern)
        for token in vocabulary:
            if not isinstance(token, bytes):
                raise TypeError(f"a token must be bytes, got {token!r}")
        super().__init__(
            {spell(token): i for token, i in vocabulary.items()},
            normalizer=normalizer,
            pre_tokenizer=self._split,
            special_tokens=special_tokens,
            template=template,
            truncation=truncation,
            padding=padding,
        )
        self._ids = dict(vocabulary)
        self._ignore_merges = ignore_merges
        _check_special_tokens([added.text for added in self._added], self._ids)
        self._bytes = {i: token for token, i in self._ids.items()}
        self._bytes |= {added.id: added.text.encode() for added in self._added}
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

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        pattern: str = "gpt2",
        special_tokens: Sequence[str] = (),
        min_frequency: int = 1,
        normalizer: Normalizer | None = None,
    ) -> Self:
        """Learn a vocabulary from texts, which are read one after the other and not kept.

        Args:
            texts: Documents; no merge crosses from one into the next. A special token in them is text like any other.
            vocab_size: Number of tokens wanted, special tokens and the 256 bytes included. Fewer come out when the
                texts have no pairs left to merge.
            pattern: "gpt2" or "gpt4".
            special_tokens: Such as ["<|endoftext|>"]; they get the ids 0, 1, ...
            min_frequency: Learn no token from a pair that occurs less often.
            normalizer: Changes each text first.

        Raises:
            TypeError: `texts` is one string, or holds something else than strings.
            ValueError: `vocab_size` or `min_frequency` is out of range, the pattern unknown, a text has a lone
                surrogate, a special token is empty, twice there or spelled like a byte.
        """
        split = split_pattern(pattern)
        check_names(special_tokens)
        special = {text: i for i, text in enumerate(special_tokens)}
        if len(special) < len(special_tokens):
            raise ValueError(f"special_tokens must differ from each other, got {list(special_tokens)!r}")
        _check_special_tokens(special, BYTE_ALPHABET)
        # A special token that files would spell like a learned token is that token; no merge spells the others.
        tokens = [text.encode() if spells_itself(text) else b"" for text in special]
        tokens += [byte for byte in BYTE_ALPHABET if byte not in tokens]
        if not len(tokens) <= index(vocab_size) <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must be from {len(tokens)} (256 bytes and {len(special)} special tokens) "
                f"to {MAX_VOCAB_SIZE}, got {vocab_size}"
            )
        if min_frequency < 1:
            raise ValueError(f"min_frequency must be at least 1, got {min_frequency}")
        pieces = count_pieces(texts, normalizer, split)
        word_counts = {piece.encode(): count for piece, count in pieces.items()}
        vocabulary = {token: i for i, token in enumerate(tokens) if token}
        bytes_of = dict(enumerate(tokens))
        merges = []
        for (left, right), merged in learn_merges(word_counts, tokens, vocab_size, min_frequency).items():
            bytes_of[merged] = bytes_of[left] + bytes_of[right]
            vocabulary[bytes_of[merged]] = merged
            merges.append((bytes_of[left], bytes_of[right]))
        return cls(vocabulary, merges, pattern=pattern, special_tokens=special, normalizer=normalizer)

    @classmethod
    def from_gpt2_files(
        cls, vocab: str | Path, merges: str | Path, *, special_tokens: Sequence[str] = ("<|endoftext|>",)
    ) -> Self:
        """Read GPT-2's two files, vocab.json and merges.txt; special tokens that vocab.json lacks get the next ids."""
        parts, special = read_gpt2_files(Path(vocab), Path(merges), special_tokens)
        try:
            return cls(parts.vocabulary, parts.merges, special_tokens=special)
        except ValueError as error:
            raise ValueError(f"{vocab}: {error}") from None

    @property
    def pattern(self) -> str:
        """The name of the split pattern."""
        return self._split.name

    @property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The bytes of the two tokens of each merge, in the order in which merges are applied."""
        return [(self._bytes[left], self._bytes[right]) for left, right in self._merges]

    def __repr__(self) -> str:
        special = list(self.special_tokens)
        return f"ByteBPETokenizer(vocab_size={self.vocab_size}, pattern={self.pattern!r}, special_tokens={special})"

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; ValueError for an id that no token has."""
        self.id_to_token(token_id)
        return self._bytes[index(token_id)]

    def _encode_piece(self, piece: str) -> list[int]:
        encoded = piece.encode()
        if self._ignore_merges and (whole := self._ids.get(encoded)) is not None:
            return [whole]
        return self._merge_table.apply([self._byte_ids[byte] for byte in encoded])

    def _piece_spans(self, piece: str) -> list[tuple[int, int]]:
        # A token that holds only a part of a character stands for all of it.
        character_of = [at for at, character in enumerate(piece) for _ in character.encode()]
        ends = accumulate((len(self._bytes[i]) for i in self._cache[piece]), initial=0)
        return [(character_of[start], character_of[end - 1] + 1) for start, end in pairwise(ends)]

    def _join(self, ids: list[int]) -> str:
        """The text of the tokens' bytes; what is not UTF-8 becomes U+FFFD."""
        return b"".join(map(self._bytes.__getitem__, ids)).decode("utf-8", errors="replace")

    def _model_json(self) -> dict[str, Any]:
        return model_json(self._vocabulary, self.merges, self._ignore_merges)

    def _decoder_json(self) -> dict[str, Any]:
        return decoder_json()

    def _pre_tokenizer_json(self) -> dict[str, Any]:
        return pre_tokenizer_json(self.pattern)

    @classmethod
    def _common_parts(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        # The pre-tokenizer is read with the model: in files it is what spells text as bytes.
        return super()._common_parts({**content, "pre_tokenizer": None})

    @classmethod
    def _from_json(cls, content: Mapping[str, Any], common: dict[str, Any]) -> Self:
        del common["pre_tokenizer"]
        special = {added.text: added.id for added in common["special_tokens"]}
        parts = read_parts(content, special)
        return cls(parts.vocabulary, parts.merges, pattern=parts.pattern, ignore_merges=parts.ignore_merges, **common)


def _check_special_tokens(special_tokens: Iterable[str], vocabulary: Container[bytes]) -> None:
    for text in special_tokens:
        check_text(text)
        if not text:
            raise ValueError("a special token must not be empty")
        token = unspell(text)
        if token in vocabulary and token != text.encode():
            raise ValueError(f"special token {text!r} is how a tokenizer.json spells the token {token!r}")
