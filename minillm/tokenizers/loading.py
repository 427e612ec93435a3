"""Every kind of tokenizer by name: training one, and reading a tokenizer.json whose kind is not known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from minillm.tokenizers.byte_bpe import ByteBPETokenizer
from minillm.tokenizers.character import CharacterTokenizer
from minillm.tokenizers.json_file import kind as kind_of
from minillm.tokenizers.json_file import read_object
from minillm.tokenizers.sentencepiece import SentencePieceTokenizer
from minillm.tokenizers.tokenizer import Tokenizer
from minillm.tokenizers.unigram import UnigramTokenizer
from minillm.tokenizers.word import WordTokenizer
from minillm.tokenizers.wordpiece import WordPieceTokenizer

# The name of each kind -> what trains it: (texts, vocab_size, **options of its own) -> tokenizer.
KINDS: dict[str, Callable[..., Tokenizer]] = {
    "byte-bpe": ByteBPETokenizer.train,
    "wordpiece": WordPieceTokenizer.train,
    "unigram": UnigramTokenizer.train,
    "sentencepiece-bpe": partial(SentencePieceTokenizer.train, model="bpe"),
    "sentencepiece-unigram": partial(SentencePieceTokenizer.train, model="unigram"),
    "word": WordTokenizer.train,
    "character": CharacterTokenizer.train,
}


def train_tokenizer(kind: str, texts: Iterable[str], vocab_size: int, **options: Any) -> Tokenizer:
    """Train a tokenizer of a kind: `KINDS[kind](texts, vocab_size, **options)`.

    Raises:
        ValueError: There is no such kind; what the `train` of its class refuses.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind](texts, vocab_size, **options)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a Hugging Face tokenizer.json of any kind: the class that its model calls for. Or SentencePiece's `.model`.

    A BPE model is byte-level if its pre-tokenizer is, and SentencePiece's otherwise. Whole words or characters are told
    apart by the decoder: it puts spaces between words, and nothing between characters.

    Raises:
        ValueError: No such kind, or the class says what in the file it cannot do.
    """
    if Path(path).suffix == ".model":
        return SentencePieceTokenizer.from_model_file(path)
    content = read_object(Path(path))
    return _class_of(content, path)._from_content(content, path)


def _class_of(content: dict[str, Any], path: str | Path) -> type[Tokenizer]:
    model, pre_tokenizer = content.get("model"), content.get("pre_tokenizer")
    model_kind = "BPE" if isinstance(model, dict) and "type" not in model else kind_of(model)
    if model_kind == "BPE":
        return ByteBPETokenizer if "ByteLevel" in _kinds(pre_tokenizer) else SentencePieceTokenizer
    if model_kind == "WordLevel":
        return CharacterTokenizer if kind_of(content.get("decoder")) == "Fuse" else WordTokenizer
    if model_kind == "WordPiece":
        return WordPieceTokenizer
    if model_kind == "Unigram":
        return UnigramTokenizer
    raise ValueError(f"{path}: model must be of type BPE, WordPiece, Unigram or WordLevel, got {model_kind}")


def _kinds(pre_tokenizer: Any) -> list[str | None]:
    steps = pre_tokenizer.get("pretokenizers") if kind_of(pre_tokenizer) == "Sequence" else [pre_tokenizer]
    return [kind_of(step) for step in steps] if isinstance(steps, list) else []
