"""What all tokenizers have in common: the way from a text to token ids, and back.

    text -> special tokens are cut out -> normalizer -> pre-tokenizer -> model -> ids -> template, truncation, padding

A normalizer changes the characters (`normalization`), a pre-tokenizer cuts the text into pieces that no token may reach
across (`pre_tokenization`), the model cuts a piece into tokens: this is what byte BPE, WordPiece and Unigram do
differently. Pieces repeat, so their ids are remembered.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import index
from pathlib import Path
from typing import Any, Self

from minillm.tokenizers import json_file
from minillm.tokenizers.added_tokens import AddedToken, AddedTokens
from minillm.tokenizers.aligned_text import AlignedText
from minillm.tokenizers.encoding import Encoding
from minillm.tokenizers.normalization import Normalizer, normalizer_from_json
from minillm.tokenizers.padding import Padding, padding_from_json
from minillm.tokenizers.pieces import PieceCache, check_steps, check_text
from minillm.tokenizers.pre_tokenization import PreTokenizer, pre_tokenizer_from_json, treats_start_apart
from minillm.tokenizers.prepare import prepare
from minillm.tokenizers.template import Template, template_from_json
from minillm.tokenizers.truncation import Truncation, truncation_from_json

MAX_VOCAB_SIZE = 0x110000


class Tokenizer(ABC):
    """The base of all tokenizers.

    Args:
        vocabulary: The tokens as files spell them -> id.
        normalizer: Changes the text first; None leaves it as it is.
        pre_tokenizer: Cuts the text into pieces; None takes all of it as one.
        special_tokens: Text -> id of tokens that are never split; or `AddedToken`s, which can say more.
        template: What `prepare` puts around a text, such as BERT's [CLS] and [SEP].
        truncation, padding: How `prepare` and `prepare_batch` make a text fit.

    Raises:
        ValueError: An id is out of range, or belongs to two tokens; special tokens are in conflict.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        *,
        normalizer: Normalizer | None = None,
        pre_tokenizer: PreTokenizer | None = None,
        special_tokens: Mapping[str, int] | Iterable[AddedToken] = (),
        template: Template | None = None,
        truncation: Truncation | None = None,
        padding: Padding | None = None,
    ) -> None:
        check_steps(normalizer, pre_tokenizer)
        self.normalizer = normalizer
        self.pre_tokenizer = pre_tokenizer
        self.template = template
        self.truncation = truncation
        self.padding = padding
        self._added = AddedTokens(_added_tokens(special_tokens))
        self._vocabulary: dict[str, int] = {}
        for token, i in vocabulary.items():
            check_text(token, "a token")
            if isinstance(i, bool):
                raise TypeError(f"the id of token {token!r} must be an integer, got {i}")
            self._vocabulary[token] = index(i)
        self._tokens: dict[int, str] = {}
        for token, i in [*self._vocabulary.items(), *((added.text, added.id) for added in self._added)]:
            if not 0 <= i < MAX_VOCAB_SIZE:
                raise ValueError(f"token {token!r} has id {i}, which is not in 0 .. {MAX_VOCAB_SIZE - 1}")
            if self._tokens.setdefault(i, token) != token:
                raise ValueError(f"token {token!r} has id {i}, which belongs to {self._tokens[i]!r}")
        for added in self._added:
            if self._vocabulary.get(added.text, added.id) != added.id:
                raise ValueError(
                    f"special token {added.text!r} has id {added.id}, but {self._vocabulary[added.text]} as a token"
                )
        self._cache = PieceCache(self._encode_piece)
        self._aligned_cache = PieceCache(self._describe_piece)

    # What each kind of tokenizer does in its own way.

    @abstractmethod
    def _encode_piece(self, piece: str) -> list[int]:
        """The ids of one piece, which is not empty."""

    @abstractmethod
    def _piece_spans(self, piece: str) -> list[tuple[int, int]]:
        """For each id of `_encode_piece(piece)`: the characters `piece[start:end]` that it stands for."""

    @abstractmethod
    def _join(self, ids: list[int]) -> str:
        """The text that token ids, each of which is in the vocabulary, stand for; `_tokens` has their spelling."""

    @abstractmethod
    def _model_json(self) -> dict[str, Any]:
        """The "model" of a tokenizer.json."""

    @abstractmethod
    def _decoder_json(self) -> dict[str, Any] | None:
        """The "decoder" of a tokenizer.json."""

    @classmethod
    @abstractmethod
    def _from_json(cls, content: Mapping[str, Any], common: dict[str, Any]) -> Self:
        """A tokenizer from the content of a tokenizer.json.

        Args:
            content: All of it; "model" and "decoder" are still to be read.
            common: What has been read: the keyword arguments of `Tokenizer`.
        """

    # The vocabulary.

    @property
    def vocab_size(self) -> int:
        """The largest id + 1: the number of rows that an embedding needs."""
        return max(self._tokens, default=-1) + 1

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text -> id of the special tokens."""
        return self._added.special

    def token_to_id(self, token: str) -> int | None:
        """The id of a token, as spelled in files; None if there is no such token."""
        added = self._added.with_text(token)
        return added.id if added else self._vocabulary.get(token)

    def id_to_token(self, token_id: int) -> str:
        """How a token is spelled in files; ValueError for an id that no token has."""
        token = self._tokens.get(index(token_id))
        if token is None:
            raise ValueError(f"token id must be one of the {len(self._tokens)} of the vocabulary, got {token_id!r}")
        return token

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size}, special_tokens={list(self.special_tokens)})"

    # From text to ids.

    def encode(self, text: str, *, allow_special: bool = True) -> list[int]:
        """The token ids of a text; of the text alone, whatever template and truncation say.

        Args:
            text: Any text without lone surrogates, which have no UTF-8 form.
            allow_special: Turn the text of a special token into its id. False treats it like any other text, which is
                what text from strangers calls for.

        Raises:
            TypeError: `text` is not a str.
            ValueError: `text` has a lone surrogate.
        """
        check_text(text)
        if self.normalizer and self.pre_tokenizer and treats_start_apart(self.pre_tokenizer):
            # Whether a piece stands at the start of the text is a matter of where it came from.
            return self.encode_with_offsets(text, allow_special=allow_special).ids
        if not self._added:
            return self._encode_ordinary(self.normalizer(text) if self.normalizer else text, at_start=True)
        ids: list[int] = []
        at_start = True
        for part in self._added.cut(text, self.normalizer, allow_special=allow_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._encode_ordinary(part, at_start=at_start)
            at_start = False
        return ids

    def encode_batch(self, texts: Iterable[str], *, allow_special: bool = True) -> list[list[int]]:
        """`encode` for each of several texts."""
        if isinstance(texts, str):
            raise TypeError("texts must be an iterable of texts, got one str; for a single text use encode")
        return [self.encode(text, allow_special=allow_special) for text in texts]

    def encode_with_offsets(self, text: str, *, allow_special: bool = True) -> Encoding:
        """The same ids, with how each token is spelled and which characters of the text it stands for."""
        check_text(text)
        ids: list[int] = []
        tokens: list[str] = []
        offsets: list[tuple[int, int]] = []
        words: list[int | None] = []
        n_pieces = 0
        for part in self._added.cut_aligned(AlignedText.of(text), self.normalizer, allow_special=allow_special):
            if isinstance(part, AlignedText):
                for piece in self._pieces(part):
                    piece_ids, piece_tokens, spans = self._aligned_cache[piece.text]
                    ids += piece_ids
                    tokens += piece_tokens
                    starts, ends = piece.starts, piece.ends
                    offsets += [(starts[start], ends[end - 1]) for start, end in spans]
                    words += [n_pieces] * len(piece_ids)
                    n_pieces += 1
            else:
                ids.append(part.id)
                tokens.append(part.text)
                offsets.append((part.start, part.end))
                words.append(n_pieces)
                n_pieces += 1
        return Encoding.of_text(ids, tokens, offsets, words)

    def tokenize(self, text: str) -> list[str]:
        """How the tokens of a text are spelled in the vocabulary."""
        return [self._tokens[i] for i in self.encode(text)]

    def prepare(self, text: str, pair: str | None = None) -> Encoding:
        """What a model is fed: a text, or two, cut to the greatest length, with the template around it, and padded."""
        encoding = self._prepare_unpadded(text, pair)
        return self.padding.apply([encoding])[0] if self.padding else encoding

    def prepare_batch(self, texts: Iterable[str | tuple[str, str]]) -> list[Encoding]:
        """`prepare` for several texts or pairs of texts, padded to one length."""
        if isinstance(texts, str):
            raise TypeError("texts must be an iterable of texts and pairs, got one str; for a single text use prepare")
        batch = [
            self._prepare_unpadded(text) if isinstance(text, str) else self._prepare_unpadded(*text) for text in texts
        ]
        return self.padding.apply(batch) if self.padding else batch

    def _prepare_unpadded(self, text: str, pair: str | None = None) -> Encoding:
        second = None if pair is None else self.encode_with_offsets(pair)
        return prepare(self.encode_with_offsets(text), second, template=self.template, truncation=self.truncation)

    # And back.

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids; ValueError for an id that no token has.

        Args:
            ids: Token ids, from `encode` or from a model.
            skip_special_tokens: Leave special tokens out.
        """
        hidden = set(self.special_tokens.values()) if skip_special_tokens else ()
        shown = [i for i in map(index, ids) if i not in hidden]  # a tensor's elements are equal to no integer in a set
        for i in shown:
            self.id_to_token(i)
        return self._join(shown)

    # Files.

    def save(self, path: str | Path) -> None:
        """Write a Hugging Face tokenizer.json. It appears under its name only when it is complete and on disk."""
        content = {
            "version": "1.0",
            "truncation": self.truncation.to_json() if self.truncation else None,
            "padding": self.padding.to_json() if self.padding else None,
            "added_tokens": self._added.to_json(),
            "normalizer": self._normalizer_json(),
            "pre_tokenizer": self._pre_tokenizer_json(),
            "post_processor": self.template.to_json() if self.template else None,
            "decoder": self._decoder_json(),
            "model": self._with_all_ids(self._model_json()),
        }
        json_file.write_object(content, Path(path))

    def _with_all_ids(self, model: dict[str, Any]) -> dict[str, Any]:
        """The model of a file in which `tokenizers` finds the ids that the added tokens have here.

        It goes by its own: an added token that is not in the model's vocabulary gets the next id that is free. Where
        that is another one, the token is written into the vocabulary.
        """
        vocabulary = model["vocab"]
        known = set(vocabulary if isinstance(vocabulary, dict) else (piece for piece, _ in vocabulary))
        others = {added.text: added.id for added in self._added if added.text not in known}
        n = len(vocabulary)
        ids = sorted(vocabulary.values()) if isinstance(vocabulary, dict) else range(n)
        if sorted(others.values()) == [*range(n, n + len(others))] and (not n or ids[-1] < n):
            return model
        if not isinstance(vocabulary, dict):
            raise ValueError(f"special tokens that are no pieces must have the ids from {n} on, got {others}")
        by_id = sorted((vocabulary | others).items(), key=lambda item: item[1])
        return model | {"vocab": dict(by_id)}

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a Hugging Face tokenizer.json; ValueError says what in it cannot be done here."""
        return cls._from_content(json_file.read_object(Path(path)), path)

    @classmethod
    def _from_content(cls, content: dict[str, Any], path: str | Path) -> Self:
        try:
            common = cls._common_parts(content)
            return cls._from_json(content, common)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a tokenizer.json of {cls.__name__}: {error}") from None

    @classmethod
    def _common_parts(cls, content: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "normalizer": normalizer_from_json(content.get("normalizer")),
            "pre_tokenizer": pre_tokenizer_from_json(content.get("pre_tokenizer")),
            "special_tokens": AddedTokens.from_json(content.get("added_tokens")),
            "template": template_from_json(content.get("post_processor")),
            "truncation": truncation_from_json(content.get("truncation")),
            "padding": padding_from_json(content.get("padding")),
        }

    def _normalizer_json(self) -> dict[str, Any] | None:
        return self.normalizer.to_json() if self.normalizer else None

    def _pre_tokenizer_json(self) -> dict[str, Any] | None:
        return self.pre_tokenizer.to_json() if self.pre_tokenizer else None

    # Normalized text, piece by piece.

    def _encode_ordinary(self, text: str, *, at_start: bool) -> list[int]:
        lookup = self._cache.__getitem__
        if self.pre_tokenizer is None:
            return list(lookup(text)) if text else []
        blocks = self.pre_tokenizer.split(text, at_start=at_start)
        return list(chain.from_iterable(chain.from_iterable(map(lookup, block)) for block in blocks))

    def _pieces(self, text: AlignedText) -> Sequence[AlignedText]:
        if self.pre_tokenizer is None:
            return [text] if text.text else []
        return self.pre_tokenizer.align(text)

    def _describe_piece(self, piece: str) -> tuple[list[int], list[str], list[tuple[int, int]]]:
        """The ids of a piece, how each is spelled, and which characters of the piece it stands for."""
        ids = self._cache[piece]
        return ids, [self._tokens[i] for i in ids], self._piece_spans(piece)


def _added_tokens(special_tokens: Mapping[str, int] | Iterable[AddedToken]) -> list[AddedToken]:
    if isinstance(special_tokens, Mapping):
        return [AddedToken(text, index(i)) for text, i in special_tokens.items()]
    tokens = [] if isinstance(special_tokens, str) else list(special_tokens)
    if isinstance(special_tokens, str) or not all(isinstance(token, AddedToken) for token in tokens):
        raise TypeError(f"special_tokens must be a mapping of texts to ids, or AddedTokens, got {special_tokens!r}")
    return tokens
