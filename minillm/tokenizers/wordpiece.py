"""WordPiece: the tokenizer of BERT, DistilBERT and Electra.

Text is normalized and cut into words; a word becomes the longest token that it begins with, then the longest token that
its rest begins with, and so on. A token that continues a word is marked by a prefix: `huggable` is `hug ##ga ##ble`.
Unlike BPE, nothing of how the vocabulary was made is needed, the tokens are enough. A word that cannot be put together
from tokens is unknown as a whole, and what it was is lost.

Each word is looked at once, since its ids are remembered; and it costs at most `max_word_length` times the length of
the longest token, so that no text is slow. (Song et al., "Fast WordPiece tokenization", 2021, find the longest tokens
in one pass, with a trie whose nodes point to where the search goes on when it fails.)

Source: Schuster and Nakajima, "Japanese and Korean voice search" (2012), section 3; Devlin et al., "BERT" (2019) and
the code released with it.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Self

from minillm.tokenizers.added_tokens import AddedToken
from minillm.tokenizers.arguments import checked_integer
from minillm.tokenizers.json_file import kind
from minillm.tokenizers.json_options import read_options
from minillm.tokenizers.normalization import BertNormalizer, Normalizer
from minillm.tokenizers.padding import Padding
from minillm.tokenizers.pieces import check_names, count_pieces
from minillm.tokenizers.pre_tokenization import BertPreTokenizer, PreTokenizer
from minillm.tokenizers.template import Template, bert_template
from minillm.tokenizers.tokenizer import Tokenizer
from minillm.tokenizers.truncation import Truncation
from minillm.tokenizers.vocabulary_json import vocabulary_from_json, vocabulary_to_json
from minillm.tokenizers.wordpiece_decoder import WordPieceDecoder
from minillm.tokenizers.wordpiece_training import Score
from minillm.tokenizers.wordpiece_vocabulary import learn_vocabulary

BERT_SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
BERT_DECODER = WordPieceDecoder()


def longest_match_first(word: str, vocabulary: Container[str], prefix: str = "##", longest: int = 100) -> list[str]:
    """The tokens of one word, each the longest that fits where it begins; none if at some place no token fits.

    Args:
        word: A word, not empty.
        vocabulary: All tokens.
        prefix: What a token begins with that continues a word.
        longest: No token stands for more characters.
    """
    tokens: list[str] = []
    start = 0
    while start < len(word):
        mark = prefix if start > 0 else ""
        for end in range(min(len(word), start + longest), start, -1):
            if (token := mark + word[start:end]) in vocabulary:
                break
        else:
            return []
        tokens.append(token)
        start = end
    return tokens


class WordPieceTokenizer(Tokenizer):
    """A WordPiece tokenizer, made by `train`, `load` or `from_vocab_file`.

    Args:
        vocabulary: Token -> id, the unknown token among them.
        unknown_token: What a word becomes that no tokens fit, or that is too long.
        continuing_prefix: What a token begins with that continues a word.
        max_word_length: The length of the longest word that is not unknown, in characters.
        decoder: How tokens are joined; None puts a space between any two and leaves the prefixes in.
        normalizer, pre_tokenizer, special_tokens, template, truncation, padding: See `Tokenizer`. BERT's are
            `BertNormalizer`, `BertPreTokenizer` and `bert_template`.

    Raises:
        ValueError: The unknown token is not in the vocabulary; `max_word_length` is below 0; what `Tokenizer` refuses.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        *,
        unknown_token: str = "[UNK]",
        continuing_prefix: str = "##",
        max_word_length: int = 100,
        decoder: WordPieceDecoder | None = BERT_DECODER,
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
        self.unknown_token = unknown_token
        self.continuing_prefix = continuing_prefix
        self.max_word_length = checked_integer("max_word_length", max_word_length)
        self.decoder = decoder
        self._longest = max(map(len, self._vocabulary))

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        score: Score = "likelihood",
        special_tokens: Sequence[str] = BERT_SPECIAL_TOKENS,
        unknown_token: str = "[UNK]",
        continuing_prefix: str = "##",
        lowercase: bool = True,
        normalizer: Normalizer | None = None,
        pre_tokenizer: PreTokenizer | None = None,
        min_frequency: int | None = None,
        initial_alphabet: Iterable[str] = (),
        limit_alphabet: int | None = None,
    ) -> Self:
        """Learn a vocabulary from texts, which are read one after the other and not kept.

        If [CLS] and [SEP] are among the special tokens, `prepare` puts them around texts as BERT does.

        Args:
            texts: Documents. A special token in them is text like any other.
            vocab_size: Number of tokens wanted, special tokens and characters (with and without the prefix) included.
                Fewer come out when the texts have no pairs left to merge.
            score: "likelihood" is WordPiece's own, "frequency" that of `tokenizers`: see `wordpiece_training`.
            special_tokens: They get the ids 0, 1, ...; the unknown token must be one of them.
            unknown_token, continuing_prefix: See `WordPieceTokenizer`.
            lowercase: For BERT's normalizer: with it, case and accents are lost.
            normalizer, pre_tokenizer: Others than BERT's.
            min_frequency, initial_alphabet, limit_alphabet: See `wordpiece_vocabulary.learn_vocabulary`.

        Raises:
            TypeError: `texts` is one string, or holds something else than strings.
            ValueError: The texts have no words; `vocab_size` is too small for special tokens and characters; another
                argument is out of range; a text has a lone surrogate; special tokens repeat or lack the unknown token.
        """
        check_names(special_tokens)
        if unknown_token not in special_tokens:
            raise ValueError(f"special_tokens must hold the unknown token {unknown_token!r}, got {[*special_tokens]}")
        if normalizer is not None and not lowercase:
            raise ValueError("lowercase=False is for BERT's normalizer, got it together with another normalizer")
        normalizer = normalizer or BertNormalizer(lowercase=lowercase)
        pre_tokenizer = pre_tokenizer or BertPreTokenizer()
        vocabulary = learn_vocabulary(
            count_pieces(texts, normalizer, pre_tokenizer),
            vocab_size,
            score=score,
            special_tokens=special_tokens,
            prefix=continuing_prefix,
            min_frequency=min_frequency,
            initial_alphabet=initial_alphabet,
            limit_alphabet=limit_alphabet,
        )
        ids = {token: i for i, token in enumerate(vocabulary)}
        return cls(
            ids,
            unknown_token=unknown_token,
            continuing_prefix=continuing_prefix,
            decoder=WordPieceDecoder(continuing_prefix),
            normalizer=normalizer,
            pre_tokenizer=pre_tokenizer,
            special_tokens={token: ids[token] for token in special_tokens},
            template=_template(ids, special_tokens),
        )

    @classmethod
    def from_vocab_file(
        cls, path: str | Path, *, lowercase: bool = True, special_tokens: Iterable[str] = BERT_SPECIAL_TOKENS
    ) -> Self:
        """Read BERT's vocab.txt: one token a line, the first line's id is 0.

        Args:
            path: The file.
            lowercase: Whether it is the vocabulary of an "uncased" model.
            special_tokens: Those of them that are in the file are never split.

        Raises:
            ValueError: A token is there twice, or [UNK] is not there.
        """
        try:
            with Path(path).open(encoding="utf-8") as file:
                tokens = [line.removesuffix("\n") for line in file]
            ids = {token: i for i, token in enumerate(tokens)}
            for i, token in enumerate(tokens):
                if ids[token] != i:
                    raise ValueError(f"token {token!r} must be there once, is in lines {i + 1} and {ids[token] + 1}")
            special = {token: ids[token] for token in special_tokens if token in ids}
            return cls(
                ids,
                normalizer=BertNormalizer(lowercase=lowercase),
                pre_tokenizer=BertPreTokenizer(),
                special_tokens=special,
                template=_template(ids, special),
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def _encode_piece(self, piece: str) -> list[int]:
        tokens: list[str] = []
        if len(piece) <= self.max_word_length:
            tokens = longest_match_first(piece, self._vocabulary, self.continuing_prefix, self._longest)
        return [self._vocabulary[token] for token in tokens or [self.unknown_token]]

    def _piece_spans(self, piece: str) -> list[tuple[int, int]]:
        ids = self._cache[piece]
        if len(ids) == 1:  # the whole word, known or not
            return [(0, len(piece))]
        lengths = [len(self._tokens[i]) for i in ids]
        ends = accumulate((length - len(self.continuing_prefix) for length in lengths[1:]), initial=lengths[0])
        return list(pairwise((0, *ends)))

    def _join(self, ids: list[int]) -> str:
        tokens = [self._tokens[i] for i in ids]
        return " ".join(tokens) if self.decoder is None else self.decoder(tokens)

    def _model_json(self) -> dict[str, Any]:
        return {
            "type": "WordPiece",
            "unk_token": self.unknown_token,
            "continuing_subword_prefix": self.continuing_prefix,
            "max_input_chars_per_word": self.max_word_length,
            "vocab": vocabulary_to_json(self._vocabulary),
        }

    def _decoder_json(self) -> dict[str, Any] | None:
        return None if self.decoder is None else self.decoder.to_json()

    @classmethod
    def _from_json(cls, content: Mapping[str, Any], common: dict[str, Any]) -> Self:
        model = content.get("model")
        if not isinstance(model, dict) or model.get("type", "WordPiece") != "WordPiece":
            raise ValueError(f"model must be of type WordPiece, got {kind(model)}")
        options = read_options(
            model,
            vocab=(dict,),
            unk_token=(str, "[UNK]"),
            continuing_subword_prefix=(str, "##"),
            max_input_chars_per_word=(int, 100),
        )
        return cls(
            vocabulary_from_json(options["vocab"]),
            unknown_token=options["unk_token"],
            continuing_prefix=options["continuing_subword_prefix"],
            max_word_length=options["max_input_chars_per_word"],
            decoder=WordPieceDecoder.from_json(content.get("decoder")),
            **common,
        )


def _template(ids: Mapping[str, int], special_tokens: Container[str]) -> Template | None:
    if "[CLS]" in special_tokens and "[SEP]" in special_tokens:
        return bert_template(("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"]))
    return None
