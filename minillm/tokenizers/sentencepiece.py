"""SentencePiece: the tokenizer of T5, XLM-R, Llama 1 and 2, Mistral and Gemma.

Raw text goes in: no pre-tokenization decides what a word is, spaces are characters ("▁"), and what no piece spells is
spelled in UTF-8 bytes, so that nothing is lost and languages that do not put spaces between words are not at a
disadvantage. Pieces are learned by BPE or as a Unigram model.

Lossless: with byte fallback, no character map and no removal of extra white space, `decode(encode(text)) == text` for
every text without "▁" itself, which becomes a space.

A `.model` file is read as the `sentencepiece` library reads it, and gives its ids. A tokenizer.json is read as the
`tokenizers` library reads it, and gives its ids. Both kinds of files can be written, but the same model may then cut a
text differently, because the two libraries do:

- In `tokenizers`, the text of a control piece ("<s>") becomes that piece, and in Unigram models the text of a byte
  ("<0x41>") that byte; in `sentencepiece` both are text.
- User-defined symbols are cut out before normalization there, as one of several steps here. Every stretch between them
  is normalized alone; a space in front is put only where such a stretch begins the text, and itself with no space.
- Of these symbols, those with "▁" in them stand for text with spaces. In a BPE file they are cut out after
  normalization, which makes the spaces "▁". In a Unigram file they are cut out where the text itself has "▁"; where it
  has spaces, they compete with the other pieces, as they always do here, but by other scores.
- A character map is read grapheme by grapheme there (see `character_map`).
- Unigram: which of two nearly equally likely segmentations wins is decided by rounding (see
  `sentencepiece_unigram`): in single precision here, in double precision there, where also, if no piece has a "▁"
  inside, each word is cut by itself.
- Decoding: see `sentencepiece_decoding`.

Sources: Kudo and Richardson, "SentencePiece" (2018); Kudo, "Subword regularization" (2018); Touvron et al., "LLaMA"
(2023), section 2.1, for byte fallback and single digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from minillm.tokenizers import json_file, sentencepiece_json
from minillm.tokenizers.aligned_text import AlignedText
from minillm.tokenizers.character_map import CharacterMap
from minillm.tokenizers.encoding import Encoding
from minillm.tokenizers.pieces import check_text
from minillm.tokenizers.sentencepiece_bpe import PieceMerger
from minillm.tokenizers.sentencepiece_decoding import DecoderChain, ModelDecoder
from minillm.tokenizers.sentencepiece_model import BYTE_PIECES, PieceType, SentencePieceModel
from minillm.tokenizers.sentencepiece_normalization import SentencePieceNormalizer
from minillm.tokenizers.sentencepiece_segmentation import BPESegmenter, Segmenter, Spelling
from minillm.tokenizers.sentencepiece_training import train_model
from minillm.tokenizers.sentencepiece_unigram import UnigramSegmenter
from minillm.tokenizers.sentencepiece_words import PieceShape
from minillm.tokenizers.tokenizer import Tokenizer
from minillm.tokenizers.unigram_lattice import UNKNOWN_PENALTY, RandomSource


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece tokenizer, made by `train`, `from_model_file`, `from_model` or `load`.

    Args:
        vocabulary: Pieces -> ids.
        segmenter: Cuts normalized text.
        decoder: From ids (of a model) or tokens (of a tokenizer.json) to text.
        model: What has been read from a `.model` file; None if it was a tokenizer.json.
        algorithm: The "model" of a tokenizer.json; None if it was a `.model` file.
        common: The keyword arguments of `Tokenizer`.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        segmenter: Segmenter,
        decoder: ModelDecoder | DecoderChain,
        *,
        model: SentencePieceModel | None = None,
        algorithm: Mapping[str, Any] | None = None,
        **common: Any,
    ) -> None:
        super().__init__(vocabulary, **common)
        self.model = model
        self._segmenter = segmenter
        self._decoder = decoder
        self._algorithm = algorithm

    @classmethod
    def from_model(cls, model: SentencePieceModel) -> Self:
        """The tokenizer of a model; it does with a text what the `sentencepiece` library does.

        Raises:
            ValueError: The model does not write spaces as "▁", or has no ordinary pieces.
        """
        if not model.escape_whitespaces:
            raise ValueError("escape_whitespaces must be true: spaces that stay spaces are not supported")
        vocabulary = {piece.text: i for i, piece in enumerate(model.pieces)}
        spoken = (PieceType.NORMAL, PieceType.USER_DEFINED, PieceType.UNUSED)
        ids = {piece.text: i for i, piece in enumerate(model.pieces) if piece.type in spoken}
        symbols = [model.pieces[i].text for i in model.ids_of(PieceType.USER_DEFINED)]
        unused = [model.pieces[i].text for i in model.ids_of(PieceType.UNUSED)]
        byte_ids = [vocabulary[piece] for piece in BYTE_PIECES] if model.byte_fallback else None
        spelling = Spelling(ids, model.unk_id, byte_ids)
        segmenter: Segmenter
        if model.algorithm == "bpe":
            merger = PieceMerger.of_scores({text: model.pieces[i].score for text, i in ids.items()}, unused=unused)
            segmenter = BPESegmenter(merger, spelling, ids, atoms=symbols)
        else:
            scores = {piece.text: piece.score for piece in model.pieces if piece.type is PieceType.NORMAL}
            if not scores:
                raise ValueError("a Unigram model must have pieces of type NORMAL")
            unknown_score = float(np.float32(min(scores.values())) - np.float32(UNKNOWN_PENALTY))
            for symbol in symbols:
                # Better than any other way, the longer the better; in the arithmetic of version 0.2.3.
                scores[symbol] = float(np.float32(0.1) * np.float32(len(symbol.encode()) - 1))
            segmenter = UnigramSegmenter(scores, unknown_score, spelling, float32=True)
        normalizer = SentencePieceNormalizer(
            CharacterMap(model.character_map, protected=symbols),
            add_dummy_prefix=model.add_dummy_prefix,
            remove_extra_whitespaces=model.remove_extra_whitespaces,
            suffix=model.treat_whitespace_as_suffix,
        )
        return cls(vocabulary, segmenter, ModelDecoder(model), model=model, normalizer=normalizer)

    @classmethod
    def from_model_file(cls, path: str | Path) -> Self:
        """Read a `.model` file; ValueError names the file and says what in it cannot be done here."""
        model = SentencePieceModel.load(path)
        try:
            return cls.from_model(model)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save_model_file(self, path: str | Path) -> None:
        """Write a `.model` file. It appears under its name only when it is complete and on disk.

        Raises:
            ValueError: The tokenizer was read from a tokenizer.json, which has no scores for its merges.
        """
        if self.model is None:
            raise ValueError("a tokenizer that was read from a tokenizer.json cannot be written as a .model file")
        self.model.save(path)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        model: Literal["unigram", "bpe"] = "unigram",
        byte_fallback: bool = True,
        character_coverage: float = 0.9995,
        normalizer: bytes | CharacterMap = b"",
        add_dummy_prefix: bool = True,
        remove_extra_whitespaces: bool = False,
        split_by_script: bool = True,
        split_digits: bool = False,
        max_piece_length: int = 16,
        special_tokens: Sequence[str] = ("<unk>", "<s>", "</s>"),
        user_defined_symbols: Sequence[str] = (),
    ) -> Self:
        """Learn a vocabulary from texts, which are read one after the other and not kept.

        BPE learns the pieces that version 0.2.3 of `sentencepiece` learns from the same lines; Unigram see
        `unigram_training`. Ids: special tokens, user-defined symbols, bytes, then pieces, the best first.

        Args:
            texts: Documents. Unlike the library, which takes lines, no text is left out for its length, and line ends
                are characters like others.
            vocab_size: How many pieces are wanted, all of the above included. Fewer come out when the texts have no
                more to learn.
            model: "unigram" or "bpe".
            byte_fallback: Spell what no piece spells as bytes, which takes 256 pieces; else it is unknown.
            character_coverage: The share of the characters of the texts that are to be pieces; the rarest are not.
            normalizer: A compiled character map, such as the one of a model that has been read; empty for none.
            add_dummy_prefix, remove_extra_whitespaces: See `SentencePieceModel`.
            split_by_script, split_digits: See `PieceShape`.
            max_piece_length: In characters, "▁" included.
            special_tokens: The first is the unknown piece; "<s>", "</s>" and "<pad>" are found by these names.
            user_defined_symbols: Texts that are always one piece.

        Raises:
            TypeError: `texts` is one string, or holds something else than strings.
            ValueError: The texts are empty or have a lone surrogate; `vocab_size` is too small for the characters;
                symbols conflict; another argument is out of range.
        """
        trained = train_model(
            texts,
            vocab_size,
            algorithm=model,
            byte_fallback=byte_fallback,
            character_coverage=character_coverage,
            character_map=normalizer.compiled if isinstance(normalizer, CharacterMap) else normalizer,
            add_dummy_prefix=add_dummy_prefix,
            remove_extra_whitespaces=remove_extra_whitespaces,
            shape=PieceShape(max_piece_length, split_by_script=split_by_script, split_digits=split_digits),
            special_tokens=special_tokens,
            user_defined_symbols=user_defined_symbols,
        )
        return cls.from_model(trained)

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text -> id of the special tokens; of a model, the unknown piece and the control pieces."""
        if self.model is None:
            return super().special_tokens
        hidden = (PieceType.UNKNOWN, PieceType.CONTROL)
        return {piece.text: i for i, piece in enumerate(self.model.pieces) if piece.type in hidden}

    def encode_with_offsets(self, text: str, *, allow_special: bool = True) -> Encoding:
        """The same ids as `encode` gives, with how each is spelled and which characters of the text it stands for.

        Of a model, as `sentencepiece` has it: a piece reaches to where the next one begins, and of the bytes of a
        character, the last has all of its place and the others have none.
        """
        if self.model is None:
            return super().encode_with_offsets(text, allow_special=allow_special)
        check_text(text)
        assert self.normalizer is not None
        aligned = self.normalizer.align(AlignedText.of(text))
        found = self._segmenter.spans(aligned.text)
        offsets = []
        for n, (i, start, end) in enumerate(found):
            begin = aligned.starts[start]
            is_last = n + 1 == len(found) or found[n + 1][1:] != (start, end)
            is_byte = self.model.pieces[i].type is PieceType.BYTE
            offsets.append((begin, begin if is_byte and not is_last else aligned.ends[end - 1]))
        ids = [i for i, _, _ in found]
        return Encoding.of_text(ids, [self.id_to_token(i) for i in ids], offsets, [0] * len(ids))

    def n_best_encode(self, text: str, n: int) -> list[tuple[list[int], float]]:
        """The ids of the n most likely segmentations (of all, if there are fewer), with their log probabilities.

        Raises:
            TypeError, ValueError: As for `encode`; `n` is not positive; the model is not Unigram.
        """
        segmenter, normalized = self._unigram(text)
        return [(segmenter.ids(normalized, spans), score) for spans, score in segmenter.lattice.n_best(normalized, n)]

    def sample_encode(self, text: str, rng: RandomSource, *, alpha: float = 1.0) -> list[int]:
        """The ids of a random segmentation, drawn with a probability proportional to P^alpha: subword regularization.

        Raises:
            TypeError, ValueError: As for `encode`; `alpha` is negative; the model is not Unigram.
        """
        segmenter, normalized = self._unigram(text)
        return segmenter.ids(normalized, segmenter.lattice.sample(normalized, rng, alpha=alpha))

    def save(self, path: str | Path) -> None:
        """Write a Hugging Face tokenizer.json. It appears under its name only when it is complete and on disk.

        Raises:
            ValueError: What the model does to a text cannot be said in a tokenizer.json.
        """
        if self.model is None:
            super().save(path)
            return
        content = {
            "version": "1.0",
            "truncation": self.truncation.to_json() if self.truncation else None,
            "padding": self.padding.to_json() if self.padding else None,
            "post_processor": self.template.to_json() if self.template else None,
        }
        json_file.write_object(content | sentencepiece_json.parts_of(self.model), Path(path))

    def _unigram(self, text: str) -> tuple[UnigramSegmenter, str]:
        check_text(text)
        if not isinstance(self._segmenter, UnigramSegmenter) or self.pre_tokenizer is not None or self._added:
            raise ValueError("segmentations are drawn from Unigram models that were trained here or read from a .model")
        return self._segmenter, self.normalizer(text) if self.normalizer else text

    def _encode_piece(self, piece: str) -> list[int]:
        return self._segmenter.encode(piece)

    def _piece_spans(self, piece: str) -> list[tuple[int, int]]:
        return [(start, end) for _, start, end in self._segmenter.spans(piece)]

    def _join(self, ids: list[int]) -> str:
        if isinstance(self._decoder, ModelDecoder):
            return self._decoder(ids)
        return self._decoder([self._tokens[i] for i in ids])

    def _model_json(self) -> dict[str, Any]:
        return dict(self._algorithm or {})

    def _decoder_json(self) -> dict[str, Any] | None:
        part = self._decoder.part if isinstance(self._decoder, DecoderChain) else None
        return None if part is None else dict(part)

    @classmethod
    def _from_json(cls, content: Mapping[str, Any], common: dict[str, Any]) -> Self:
        vocabulary, segmenter = sentencepiece_json.read_model(content.get("model"))
        decoder = DecoderChain(content.get("decoder"))
        return cls(vocabulary, segmenter, decoder, algorithm=content["model"], **common)
