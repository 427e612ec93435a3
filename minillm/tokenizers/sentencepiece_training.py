"""Learning a SentencePiece model from texts: which pieces are given, which are learned, in which order they stand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from minillm.tokenizers.arguments import checked_flag, checked_integer
from minillm.tokenizers.character_map import CharacterMap
from minillm.tokenizers.metaspace import SPACE
from minillm.tokenizers.pieces import check_names, check_text
from minillm.tokenizers.sentencepiece_bpe import learn_pieces
from minillm.tokenizers.sentencepiece_model import BYTE_PIECES, Piece, PieceType, SentencePieceModel
from minillm.tokenizers.sentencepiece_normalization import SentencePieceNormalizer
from minillm.tokenizers.sentencepiece_words import PieceShape, count_words
from minillm.tokenizers.tokenizer import MAX_VOCAB_SIZE
from minillm.tokenizers.unigram_training import train_unigram


def train_model(
    texts: Iterable[str],
    vocab_size: int,
    *,
    algorithm: str,
    byte_fallback: bool,
    character_coverage: float,
    character_map: bytes,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    shape: PieceShape,
    special_tokens: Sequence[str],
    user_defined_symbols: Sequence[str],
) -> SentencePieceModel:
    """A model learned from texts; for arguments and errors see `SentencePieceTokenizer.train`."""
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of documents, got one str; for a single document pass [text]")
    if algorithm not in ("unigram", "bpe"):
        raise ValueError(f"model must be 'unigram' or 'bpe', got {algorithm!r}")
    if not 0.0 < character_coverage <= 1.0:
        raise ValueError(f"character_coverage must be more than 0 and at most 1, got {character_coverage}")
    checked_integer("max_piece_length", shape.max_length, 1, 255)
    checked_flag("byte_fallback", byte_fallback)
    checked_flag("add_dummy_prefix", add_dummy_prefix)
    checked_flag("remove_extra_whitespaces", remove_extra_whitespaces)
    reserved = _reserved_pieces(special_tokens, user_defined_symbols, byte_fallback)
    normalize = SentencePieceNormalizer(
        CharacterMap(character_map, protected=user_defined_symbols),
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=remove_extra_whitespaces,
    )
    counts = count_words(
        (normalize(_checked(text)) for text in texts),
        coverage=character_coverage,
        reserved=[piece.text for piece in reserved],
    )
    if not counts.words:
        raise ValueError("texts must hold at least one character: nothing can be learned from an empty corpus")
    n_learned = checked_integer("vocab_size", vocab_size) - len(reserved)
    if not len(counts.alphabet) <= n_learned <= MAX_VOCAB_SIZE - len(reserved):
        raise ValueError(
            f"vocab_size must be from {len(reserved) + len(counts.alphabet)} ({len(counts.alphabet)} characters, "
            f"{len(reserved)} special tokens, symbols and bytes) to {MAX_VOCAB_SIZE}, got {vocab_size}"
        )
    words = shape.cut(counts.words)
    if algorithm == "bpe":
        merged = learn_pieces(words, n_learned - len(counts.alphabet), shape)
        learned = [Piece(text, -float(n)) for n, text in enumerate([*merged, *counts.alphabet])]
    else:
        scores = train_unigram(words, n_learned, max_piece_length=shape.max_length)
        learned = [Piece(text, float(np.float32(score))) for text, score in scores.items()]
    return SentencePieceModel(
        (*reserved, *learned),
        algorithm=algorithm,
        byte_fallback=byte_fallback,
        add_dummy_prefix=add_dummy_prefix,
        remove_extra_whitespaces=remove_extra_whitespaces,
        character_map=character_map,
        normalizer_name="user_defined" if character_map else "identity",
    )


def _checked(text: str) -> str:
    check_text(text)
    return text


def _reserved_pieces(special_tokens: Sequence[str], symbols: Sequence[str], byte_fallback: bool) -> list[Piece]:
    """The pieces that are not learned.

    Raises:
        TypeError: The special tokens or the symbols are one str.
        ValueError: Two of them are spelled alike; there is no unknown piece; a symbol has a space, which no normalized
            text has.
    """
    check_names(special_tokens)
    if isinstance(symbols, str):
        raise TypeError(f"user_defined_symbols must be a sequence of texts, got one str; pass [{symbols!r}]")
    if not special_tokens:
        raise ValueError("special_tokens must begin with the unknown piece, got none")
    kinds = [PieceType.UNKNOWN] + [PieceType.CONTROL] * (len(special_tokens) - 1)
    pieces = [Piece(text, 0.0, kind) for text, kind in zip(special_tokens, kinds, strict=True)]
    pieces += [Piece(text, 0.0, PieceType.USER_DEFINED) for text in symbols]
    pieces += [Piece(text, 0.0, PieceType.BYTE) for text in BYTE_PIECES if byte_fallback]
    spelled: set[str] = set()
    for text, _, _ in pieces:
        check_text(text)
        if not text or "\0" in text or text in spelled:
            raise ValueError(
                "special_tokens and user_defined_symbols must differ from each other and from bytes, have no zero "
                f"character and not be empty, got {text!r}"
            )
        spelled.add(text)
    for text in symbols:
        if " " in text:
            raise ValueError(f"user_defined_symbols must have {SPACE!r} where the text has a space, got {text!r}")
    return pieces
