"""SentencePiece models in tokenizer.json files: read as `tokenizers` reads them, and written as published ones look.

BPE is written like Llama 2's file: "Prepend" and "Replace" as normalizers, no pre-tokenizer, the merges. Where a
`.model` file has a score for each piece, this one lists which two pieces make it, for every way to split it in two, the
best piece first. For a vocabulary that BPE has learned both give the same: before a piece is merged, what stands in its
place has been cut by better pieces only, always in the same way. User-defined symbols with "▁" in them ("▁▁▁" for
indentation) have no merges: they are added tokens, looked for in the normalized text, where spaces are "▁".

Unigram is written like T5's and XLM-R's: "Precompiled" and "Metaspace". Metaspace does not put the space in front of
the text, which it would leave out before a text that begins with one.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from minillm.tokenizers.added_tokens import AddedToken
from minillm.tokenizers.character_map import CharacterMap
from minillm.tokenizers.json_file import kind
from minillm.tokenizers.json_options import read_options
from minillm.tokenizers.metaspace import SPACE, Metaspace
from minillm.tokenizers.sentencepiece_bpe import PieceMerger
from minillm.tokenizers.sentencepiece_decoding import llama_decoder
from minillm.tokenizers.sentencepiece_model import BYTE_PIECES, PieceType, SentencePieceModel
from minillm.tokenizers.sentencepiece_normalization import SentencePieceNormalizer
from minillm.tokenizers.sentencepiece_segmentation import BPESegmenter, Segmenter, Spelling
from minillm.tokenizers.sentencepiece_unigram import UnigramSegmenter
from minillm.tokenizers.unigram_lattice import UNKNOWN_PENALTY


def parts_of(model: SentencePieceModel) -> dict[str, Any]:
    """What a tokenizer.json says of a model: its added tokens, normalizer, pre-tokenizer, decoder and model."""
    symbols = model.ids_of(PieceType.USER_DEFINED)
    special = [model.unk_id, *model.ids_of(PieceType.CONTROL)]
    # Behind a symbol there must be no space in front: only Metaspace tells the first stretch of a text from others.
    metaspace_prepends = model.add_dummy_prefix and bool(symbols)
    normalizer = SentencePieceNormalizer(
        CharacterMap(model.character_map),
        add_dummy_prefix=model.add_dummy_prefix and not metaspace_prepends,
        remove_extra_whitespaces=model.remove_extra_whitespaces,
        suffix=model.treat_whitespace_as_suffix,
    )
    added = []
    for i in sorted([*special, *symbols]):
        text = model.pieces[i].text
        # Normalization must leave it as it is: if "▁" at the end of a text goes, "a▁" would be found where "a" is.
        # Unigram has the symbol's score, by which it competes with other pieces.
        in_normalized = model.algorithm == "bpe" and i in symbols and SPACE in text and normalizer(text) == text
        added.append(AddedToken(text, i, normalized=in_normalized, special=i in special))
    splits = model.algorithm == "unigram" and not any(SPACE in piece.text[1:] for piece in model.pieces)
    metaspace = Metaspace(prepend_scheme="first" if metaspace_prepends else "never", split=splits)
    return {
        "added_tokens": [token.to_json() for token in added],
        "normalizer": normalizer.to_json(),
        "pre_tokenizer": metaspace.to_json() if splits or metaspace_prepends else None,
        "decoder": llama_decoder(strip=model.add_dummy_prefix),
        "model": _bpe_part(model) if model.algorithm == "bpe" else _unigram_part(model),
    }


def _bpe_part(model: SentencePieceModel) -> dict[str, Any]:
    scores = {piece.text: piece.score for piece in model.pieces if piece.type is PieceType.NORMAL}
    best_first = sorted(scores, key=lambda piece: -scores[piece])
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.pieces[model.unk_id].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {piece.text: i for i, piece in enumerate(model.pieces)},
        "merges": [
            [piece[:at], piece[at:]]
            for piece in best_first
            for at in range(1, len(piece))
            if piece[:at] in scores and piece[at:] in scores
        ],
    }


def _unigram_part(model: SentencePieceModel) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": model.unk_id,
        "vocab": [[piece.text, piece.score] for piece in model.pieces],
        "byte_fallback": model.byte_fallback,
    }


def read_model(part: Any) -> tuple[dict[str, int], Segmenter]:
    """The vocabulary and the segmenter of the "model" of a tokenizer.json; ValueError if it is not like the above."""
    match kind(part):
        case "BPE":
            return _read_bpe(part)
        case "Unigram":
            return _read_unigram(part)
        case other:
            raise ValueError(f"model must be of type BPE or Unigram, got {other or part!r}")


def _read_bpe(part: Mapping[str, Any]) -> tuple[dict[str, int], Segmenter]:
    nothing = (type(None), str)
    options = read_options(
        part,
        vocab=(dict,),
        merges=(list,),
        unk_token=(nothing, None),
        byte_fallback=(bool, False),
        fuse_unk=(bool, False),
        dropout=((type(None), int, float), None),
        continuing_subword_prefix=(nothing, None),
        end_of_word_suffix=(nothing, None),
        ignore_merges=(bool, False),
    )
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if options[name]:
            raise ValueError(f"model.{name} must be null, false or empty, got {options[name]!r}")
    vocabulary = {token: _checked_id(token, i) for token, i in options["vocab"].items()}
    byte_ids = _byte_ids(vocabulary) if options["byte_fallback"] else None
    merges = []
    for entry in options["merges"]:
        left, right = _checked_merge(entry)
        for token in (left, right, left + right):
            if token not in vocabulary or (byte_ids and token in BYTE_PIECES):
                raise ValueError(f"merge {entry!r}: {token!r} is no token that can be merged")
        merges.append((left, right))
    unk_token = options["unk_token"]
    if unk_token is not None and unk_token not in vocabulary:
        raise ValueError(f"model.unk_token must be in the vocabulary, got {unk_token!r}")
    unk_id = None if unk_token is None else vocabulary[unk_token]
    spelling = Spelling(vocabulary, unk_id, byte_ids, fuse_unknown=options["fuse_unk"])
    # Only a merge makes a token of several characters, whatever else is in the vocabulary.
    pieces = {left + right for left, right in merges}
    return vocabulary, BPESegmenter(PieceMerger.of_merges(merges), spelling, pieces)


def _read_unigram(part: Mapping[str, Any]) -> tuple[dict[str, int], Segmenter]:
    options = read_options(part, vocab=(list,), unk_id=((int, type(None)), None), byte_fallback=(bool, False))
    scores: dict[str, float] = {}
    for entry in options["vocab"]:
        match entry:
            case [str(token), int() | float() as score] if token and token not in scores and isfinite(score):
                scores[token] = float(score)
            case _:
                raise ValueError(f"an entry of model.vocab must be a token, seen once, and its score, got {entry!r}")
    if not scores:
        raise ValueError("model.vocab must not be empty")
    if options["unk_id"] is not None and not 0 <= options["unk_id"] < len(scores):
        raise ValueError(f"model.unk_id must be one of {len(scores)} ids or null, got {options['unk_id']}")
    vocabulary = {token: i for i, token in enumerate(scores)}
    byte_ids = _byte_ids(vocabulary) if options["byte_fallback"] else None
    spelling = Spelling(vocabulary, options["unk_id"], byte_ids)
    unknown_score = min(scores.values()) - UNKNOWN_PENALTY
    return vocabulary, UnigramSegmenter(scores, unknown_score, spelling, float32=False)


def _byte_ids(vocabulary: Mapping[str, int]) -> list[int]:
    missing = [piece for piece in BYTE_PIECES if piece not in vocabulary]
    if missing:
        raise ValueError(f"with byte_fallback all 256 bytes must be in the vocabulary; missing: {', '.join(missing)}")
    return [vocabulary[piece] for piece in BYTE_PIECES]


def _checked_id(token: str, i: object) -> int:
    if not isinstance(i, int) or isinstance(i, bool):
        raise ValueError(f"the id of token {token!r} must be an integer, got {i!r}")
    return i


def _checked_merge(entry: object) -> tuple[str, str]:
    match entry.split(" ") if isinstance(entry, str) else entry:
        case [str(left), str(right)] if left and right:
            return left, right
    raise ValueError(f"a merge must be two tokens, got {entry!r}")
