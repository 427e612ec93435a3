"""One token a piece: what word and character tokenizers have in common.

The pre-tokenizer cuts a text into pieces, words or characters; the most frequent ones of a corpus are the vocabulary,
and every other is unknown. How much of a text is lost in this way is the out-of-vocabulary rate, `unknown_rate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from minillm.tokenizers.added_tokens import AddedToken
from minillm.tokenizers.arguments import checked_integer
from minillm.tokenizers.json_file import kind
from minillm.tokenizers.json_options import read_options
from minillm.tokenizers.normalization import Normalizer
from minillm.tokenizers.padding import Padding
from minillm.tokenizers.pieces import count_pieces
from minillm.tokenizers.pre_tokenization import PreTokenizer
from minillm.tokenizers.template import Template
from minillm.tokenizers.tokenizer import MAX_VOCAB_SIZE, Tokenizer
from minillm.tokenizers.truncation import Truncation
from minillm.tokenizers.vocabulary_json import vocabulary_from_json, vocabulary_to_json


class WordLevelTokenizer(Tokenizer):
    """A tokenizer with one token for each piece: the model "WordLevel" of a tokenizer.json.

    Args:
        vocabulary: Piece -> id, the unknown token among them.
        unknown_token: What every other piece becomes.
        separator: What `decode` puts between two pieces, a space or nothing.
        normalizer, pre_tokenizer, special_tokens, template, truncation, padding: See `Tokenizer`.

    Raises:
        ValueError: The unknown token is not in the vocabulary; what `Tokenizer` refuses.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        *,
        unknown_token: str = "[UNK]",
        separator: str = " ",
        normalizer: Normalizer | None = None,
        pre_tokenizer: PreTokenizer | None = None,
        special_tokens: Mapping[str, int] | Iterable[AddedToken] = (),
        template: Template | None = None,
        truncation: Truncation | None = None,
        padding: Padding | None = None,
    ) -> None:
        super().__init__(
            vocabulary,
            normalizer=normalizer,
            pre_tokenizer=pre_tokenizer,
            special_tokens=special_tokens,
            template=template,
            truncation=truncation,
            padding=padding,
        )
        if unknown_token not in self._vocabulary:
            raise ValueError(f"vocabulary must hold the unknown token {unknown_token!r}")
        if separator not in ("", " "):
            raise ValueError(f"separator must be ' ' or '', got {separator!r}")
        self.unknown_token = unknown_token
        self.separator = separator

    def unknown_rate(self, texts: Iterable[str]) -> float:
        """The share of the texts' pieces that are unknown, every occurrence counted.

            unknown_rate = sum of n(w) over pieces w outside of the vocabulary / sum of n(w) over all pieces

        Args:
            texts: Documents; n(w) is how often a piece occurs in all of them. Special tokens in them are like any text.

        Raises:
            TypeError: `texts` is one string, or holds something else than strings.
            ValueError: The texts are empty, or have a lone surrogate.
        """
        counts = count_pieces(texts, self.normalizer, self.pre_tokenizer)
        if not counts:
            raise ValueError("texts must not be empty: there is nothing to take a share of")
        return sum(count for piece, count in counts.items() if piece not in self._vocabulary) / counts.total()

    def _encode_piece(self, piece: str) -> list[int]:
        return [self._vocabulary.get(piece, self._vocabulary[self.unknown_token])]

    def _piece_spans(self, piece: str) -> list[tuple[int, int]]:
        return [(0, len(piece))]

    def _join(self, ids: list[int]) -> str:
        return self.separator.join(map(self._tokens.__getitem__, ids))

    def _model_json(self) -> dict[str, Any]:
        return {"type": "WordLevel", "vocab": vocabulary_to_json(self._vocabulary), "unk_token": self.unknown_token}

    def _decoder_json(self) -> dict[str, Any] | None:
        return None if self.separator else {"type": "Fuse"}

    @classmethod
    def _from_json(cls, content: Mapping[str, Any], common: dict[str, Any]) -> Self:
        return cls(**cls._model_options(content), **common)

    @staticmethod
    def _model_options(content: Mapping[str, Any]) -> dict[str, Any]:
        model, decoder = content.get("model"), content.get("decoder")
        if not isinstance(model, dict) or model.get("type", "WordLevel") != "WordLevel":
            raise ValueError(f"model must be of type WordLevel, got {kind(model)}")
        if decoder is not None and kind(decoder) != "Fuse":
            raise ValueError(f"decoder must be Fuse or null, got {kind(decoder)}")
        options = read_options(model, vocab=(dict,), unk_token=(str,))
        separator = " " if decoder is None else ""
        vocabulary = vocabulary_from_json(options["vocab"])
        return {"vocabulary": vocabulary, "unknown_token": options["unk_token"], "separator": separator}


def most_frequent(
    counts: Mapping[str, int], vocab_size: int, unknown_token: str, special_tokens: Sequence[str], min_frequency: int
) -> tuple[dict[str, int], dict[str, int]]:
    """The most frequent pieces, for trainers.

    Args:
        counts: How often each piece occurs.
        vocab_size: Number of tokens, special tokens included; fewer come out when there are fewer pieces.
        unknown_token: A special token; the first, unless it is among the others.
        special_tokens: The first ids.
        min_frequency: Leave out pieces that occur less often.

    Returns:
        Token -> id: special tokens, then pieces, the most frequent first, equally frequent ones by code point (the
        order of the WordLevelTrainer of `tokenizers`). And those of them that are special.

    Raises:
        TypeError: A number is no integer.
        ValueError: There are no pieces; `vocab_size` leaves no room for one; `min_frequency` is below 1; special tokens
            repeat.
    """
    if len(set(special_tokens)) < len(special_tokens):
        raise ValueError(f"special_tokens must differ from each other, got {list(special_tokens)!r}")
    if unknown_token not in special_tokens:
        special_tokens = [unknown_token, *special_tokens]
    n_special = len(special_tokens)
    if not n_special < checked_integer("vocab_size", vocab_size) <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be from {n_special + 1} ({n_special} special tokens and one other) to {MAX_VOCAB_SIZE}, "
            f"got {vocab_size}"
        )
    checked_integer("min_frequency", min_frequency, 1)
    if not counts:
        raise ValueError("texts must not be empty: there is nothing to learn from")
    pieces = [piece for piece, count in counts.items() if count >= min_frequency]
    pieces.sort(key=lambda piece: (-counts[piece], piece))
    tokens = list(dict.fromkeys([*special_tokens, *pieces]))[:vocab_size]
    ids = {token: i for i, token in enumerate(tokens)}
    return ids, {token: ids[token] for token in special_tokens}
