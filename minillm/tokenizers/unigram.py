"""Unigram: the tokenizer of T5, ALBERT, XLNet and XLM-R.

Each piece of the vocabulary has a probability, and a word is cut into the pieces whose product of probabilities is
greatest (`unigram_lattice`). Unlike BPE and WordPiece, which know one way to cut a word, the model has a probability
for each: a language model can be trained on other ways too, drawn at random (subword regularization).

Source: Kudo, "Subword regularization: improving neural network translation models with multiple subword candidates"
(2018).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import nlargest
from itertools import chain
from math import inf, isfinite
from operator import index
from typing import Any, Self

from minillm.tokenizers.added_tokens import AddedToken
from minillm.tokenizers.arguments import checked_flag
from minillm.tokenizers.json_file import kind
from minillm.tokenizers.json_options import read_options
from minillm.tokenizers.metaspace import Metaspace
from minillm.tokenizers.normalization import Normalizer
from minillm.tokenizers.padding import Padding
from minillm.tokenizers.pieces import check_names, check_text, count_pieces
from minillm.tokenizers.pre_tokenization import PreTokenizer
from minillm.tokenizers.sentencepiece_decoding import DecoderChain
from minillm.tokenizers.template import Template
from minillm.tokenizers.tokenizer import MAX_VOCAB_SIZE, Tokenizer
from minillm.tokenizers.truncation import Truncation
from minillm.tokenizers.unigram_lattice import Lattice, RandomSource, Spans
from minillm.tokenizers.unigram_training import train_unigram

BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))
METASPACE = Metaspace()
# `tokenizers` reads numbers of up to 15 digits exactly, of longer ones the last bit may be wrong: ties would differ.
SCORE_DECIMALS = 10


class UnigramTokenizer(Tokenizer):
    """A Unigram tokenizer, made by `train` or `load`.

    Characters in a row that no piece spells are one unknown token together. As in `tokenizers`, a text that is written
    like the unknown token, or like the piece of a byte, is encoded as such.

    Args:
        pieces: (piece, natural logarithm of its probability); the place in the list is the id. The unknown token and
            special tokens are among them; their score is of no matter, and 0 as a rule.
        unknown_token: None: a text with a character that is not in the vocabulary is refused.
        byte_fallback: Spell unknown characters as the pieces <0x00> to <0xFF> of their UTF-8 bytes instead.
        decoder: How tokens are joined; if left out, so that `pre_tokenizer`'s symbols become spaces again.
        normalizer, pre_tokenizer, special_tokens, template, truncation, padding: See `Tokenizer`.

    Raises:
        ValueError: There are no pieces, a piece is empty or there twice; a score is positive or not finite; the unknown
            token or, with `byte_fallback`, a byte is missing; what `Tokenizer` refuses.
    """

    def __init__(
        self,
        pieces: Sequence[tuple[str, float]],
        *,
        unknown_token: str | None = "<unk>",
        byte_fallback: bool = False,
        decoder: DecoderChain | None = None,
        normalizer: Normalizer | None = None,
        pre_tokenizer: PreTokenizer | None = METASPACE,
        special_tokens: Mapping[str, int] | Iterable[AddedToken] = (),
        template: Template | None = None,
        truncation: Truncation | None = None,
        padding: Padding | None = None,
    ) -> None:
        self.scores: dict[str, float] = {}
        for i, (piece, score) in enumerate(pieces):
            if piece in self.scores:
                raise ValueError(f"pieces must differ, got {piece!r} twice, the second time with id {i}")
            if not (isfinite(score) and score <= 0.0):
                raise ValueError(f"scores must be logarithms of probabilities, finite and <= 0: {piece!r} has {score}")
            self.scores[piece] = float(score)
        super().__init__(
            {piece: i for i, piece in enumerate(self.scores)},
            normalizer=normalizer,
            pre_tokenizer=pre_tokenizer,
            special_tokens=special_tokens,
            template=template,
            truncation=truncation,
            padding=padding,
        )
        if unknown_token is not None and unknown_token not in self.scores:
            raise ValueError(f"pieces must hold the unknown token {unknown_token!r}")
        missing = [piece for piece in BYTE_PIECES if piece not in self.scores]
        if byte_fallback and missing:
            raise ValueError(f"with byte_fallback all 256 bytes must be pieces; missing: {', '.join(missing)}")
        self.unknown_token = unknown_token
        self.byte_fallback = checked_flag("byte_fallback", byte_fallback)
        self.decoder = decoder or _decoder(pre_tokenizer, byte_fallback)
        self._unknown_id = None if unknown_token is None else self._vocabulary[unknown_token]
        self._byte_ids = [self._vocabulary[piece] for piece in BYTE_PIECES] if byte_fallback else []
        self._lattice = Lattice(self.scores)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        special_tokens: Sequence[str] = ("<unk>",),
        unknown_token: str = "<unk>",
        byte_fallback: bool = False,
        normalizer: Normalizer | None = None,
        pre_tokenizer: PreTokenizer | None = METASPACE,
        split_by_script: bool = True,
        max_piece_length: int = 16,
        seed_size: int | None = None,
        shrinking_factor: float = 0.75,
        n_sub_iterations: int = 2,
    ) -> Self:
        """Learn pieces from texts, which are read one after the other and not kept.

        Ids: special tokens, the bytes if there is a fallback to them, then pieces, the most likely first.

        Args:
            texts: Documents. Of a special token in them nothing is learned; what is left and right of it is learned
                from apart.
            vocab_size: Number of tokens wanted, all of these and every character of the texts included. Fewer come out
                when the texts have too few repeated substrings.
            special_tokens: They get the ids 0, 1, ...; the unknown token must be one of them.
            unknown_token, byte_fallback, normalizer, pre_tokenizer: See `UnigramTokenizer`.
            split_by_script, max_piece_length, seed_size, shrinking_factor, n_sub_iterations: See `train_unigram`.

        Raises:
            TypeError: `texts` is one string, or holds something else than strings.
            ValueError: The texts hold nothing; `vocab_size` is smaller than what must be there; another number is out
                of range; a text has a lone surrogate; special tokens repeat or lack the unknown token.
        """
        check_names(special_tokens)
        reserved = [*special_tokens, *(BYTE_PIECES if byte_fallback else ())]
        if unknown_token not in special_tokens:
            raise ValueError(f"special_tokens must hold the unknown token {unknown_token!r}, got {[*special_tokens]}")
        if len(set(reserved)) < len(reserved):
            raise ValueError(f"special_tokens must differ from each other and from bytes, got {[*special_tokens]}")
        reserved_text = re.compile("|".join(map(re.escape, sorted(reserved, key=len, reverse=True))))
        words: Counter[str] = Counter()
        for word, count in count_pieces(texts, normalizer, pre_tokenizer).items():
            for part in filter(None, reserved_text.split(word)):
                words[part] += count
        if not words:
            raise ValueError("texts must hold at least one character: nothing can be learned from an empty corpus")
        n_characters = len(set().union(*words))
        if not len(reserved) + n_characters <= index(vocab_size) <= MAX_VOCAB_SIZE:
            raise ValueError(
                f"vocab_size must be from {len(reserved) + n_characters} ({n_characters} different characters, "
                f"{len(reserved)} special tokens and bytes) to {MAX_VOCAB_SIZE}, got {vocab_size}"
            )
        scores = train_unigram(
            words,
            vocab_size - len(reserved),
            seed_size=seed_size,
            max_piece_length=max_piece_length,
            shrinking_factor=shrinking_factor,
            n_sub_iterations=n_sub_iterations,
            split_by_script=split_by_script,
        )
        learned = ((piece, round(score, SCORE_DECIMALS)) for piece, score in scores.items())
        return cls(
            [*((piece, 0.0) for piece in reserved), *learned],
            unknown_token=unknown_token,
            byte_fallback=byte_fallback,
            normalizer=normalizer,
            pre_tokenizer=pre_tokenizer,
            special_tokens={token: i for i, token in enumerate(special_tokens)},
        )

    def n_best_encode(self, text: str, n: int, *, allow_special: bool = True) -> list[tuple[list[int], float]]:
        """The ids of the n most likely segmentations of a text (all, if there are fewer) with their log probabilities.

        Args:
            text, allow_special: As for `encode`, whose ids come first.
            n: At least 1.

        Raises:
            TypeError, ValueError: As for `encode`; `n` is not positive.
        """
        if index(n) < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        # Of the text so far: (log probability, number of the shorter text's, ids that are added), best first.
        paths: list[list[tuple[float, int, list[int]]]] = []
        for part in self._parts(text, allow_special):
            if isinstance(part, int):
                ways = [([part], 0.0)]
            else:
                ways = [(self._ids(part, spans), score) for spans, score in self._lattice.n_best(part, n)]
            before = [score for score, _, _ in paths[-1]] if paths else [0.0]
            # Of n paths, the i-th best shorter one can be part of only with one of the n / i best ways to go on.
            longer = (
                (score + added, rank, ids)
                for rank, score in enumerate(before)
                for ids, added in ways[: -(-n // (rank + 1))]
            )
            paths.append(nlargest(n, longer, key=lambda path: path[0]))
        out = []
        for rank, (score, _, _) in enumerate(paths[-1] if paths else [(0.0, 0, [])]):
            parts = []
            for path in reversed(paths):
                _, rank, ids = path[rank]
                parts.append(ids)
            out.append((list(chain.from_iterable(reversed(parts))), score))
        return out

    def sample_encode(
        self, text: str, rng: RandomSource, *, alpha: float = 1.0, allow_special: bool = True
    ) -> list[int]:
        """The ids of a random segmentation, drawn with a probability proportional to P^alpha.

        Args:
            text, allow_special: As for `encode`.
            rng: A `random.Random` or a `numpy.random.Generator`.
            alpha: 0 makes all segmentations equally likely, a large one gives the best nearly always.

        Raises:
            TypeError, ValueError: As for `encode`; `alpha` is negative or not finite.
        """
        if not 0.0 <= alpha < inf:
            raise ValueError(f"alpha must be a finite number of at least 0, got {alpha}")
        ids: list[int] = []
        for part in self._parts(text, allow_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._ids(part, self._lattice.sample(part, rng, alpha=alpha))
        return ids

    def _parts(self, text: str, allow_special: bool) -> Iterator[int | str]:
        """The ids of the special tokens in a text, and the pieces between them."""
        check_text(text)
        at_start = True
        for part in self._added.cut(text, self.normalizer, allow_special=allow_special):
            if isinstance(part, int) or self.pre_tokenizer is None:
                yield part
            else:
                yield from chain.from_iterable(self.pre_tokenizer.split(part, at_start=at_start))
            at_start = False

    def _encode_piece(self, piece: str) -> list[int]:
        return self._ids(piece, self._lattice.viterbi(piece))

    def _piece_spans(self, piece: str) -> list[tuple[int, int]]:
        return [(start, end) for start, end, ids in self._tokens_of(piece, self._lattice.viterbi(piece)) for _ in ids]

    def _ids(self, piece: str, spans: Spans) -> list[int]:
        try:
            ids = [self._vocabulary[piece[start:end]] for start, end in spans]
            # What is there twice in a row may have to be made one.
            if self._unknown_id is None or self._unknown_id not in ids:
                return ids
        except KeyError:
            pass
        return [i for _, _, ids in self._tokens_of(piece, spans) for i in ids]

    def _tokens_of(self, piece: str, spans: Spans) -> list[tuple[int, int, list[int]]]:
        """(start, end, ids): unknown characters in a row are one token, or all bytes of it."""
        stretches: list[tuple[int, int]] = []
        unknown = False
        for start, end in spans:
            before, unknown = unknown, self._vocabulary.get(piece[start:end], self._unknown_id) == self._unknown_id
            if before and unknown:
                start = stretches.pop()[0]
            stretches.append((start, end))
        # Not before: looking at each growing stretch would take a time that grows with the square of its length.
        return [(start, end, self._ids_of(piece[start:end])) for start, end in stretches]

    def _ids_of(self, token: str) -> list[int]:
        if token in self._vocabulary:
            return [self._vocabulary[token]]
        if self._unknown_id is None:
            raise ValueError(f"text must be made of pieces where there is no unknown token, got {token!r:.80}")
        return [self._byte_ids[byte] for byte in token.encode()] if self.byte_fallback else [self._unknown_id]

    def _join(self, ids: list[int]) -> str:
        return self.decoder([self._tokens[i] for i in ids])

    def _model_json(self) -> dict[str, Any]:
        return {
            "type": "Unigram",
            "unk_id": self._unknown_id,
            "vocab": [[piece, score] for piece, score in self.scores.items()],
            "byte_fallback": self.byte_fallback,
        }

    def _decoder_json(self) -> dict[str, Any] | None:
        return None if self.decoder.part is None else dict(self.decoder.part)

    @classmethod
    def _from_json(cls, content: Mapping[str, Any], common: dict[str, Any]) -> Self:
        model = content.get("model")
        if kind(model) != "Unigram":
            raise ValueError(f"model must be of type Unigram, got {kind(model)}")
        options = read_options(
            model,  # type: ignore[arg-type]  # it has a type, so it is an object
            vocab=(list,),
            unk_id=((int, type(None)), None),
            byte_fallback=(bool, False),
        )
        pieces = []
        for entry in options["vocab"]:
            match entry:
                case [str(piece), int() | float() as score]:
                    pieces.append((piece, float(score)))
                case _:
                    raise ValueError(f"an entry of model.vocab must be a piece and its score, got {entry!r}")
        unknown_id = options["unk_id"]
        if unknown_id is not None and not 0 <= unknown_id < len(pieces):
            raise ValueError(f"model.unk_id must be null or from 0 to {len(pieces) - 1}, got {unknown_id}")
        return cls(
            pieces,
            unknown_token=None if unknown_id is None else pieces[unknown_id][0],
            byte_fallback=options["byte_fallback"],
            decoder=DecoderChain(content.get("decoder")),
            **common,
        )


def _decoder(pre_tokenizer: PreTokenizer | None, byte_fallback: bool) -> DecoderChain:
    metaspace = pre_tokenizer if isinstance(pre_tokenizer, Metaspace) else METASPACE
    steps = [{"type": "ByteFallback"}] if byte_fallback else []
    steps.append(metaspace.to_json())
    return DecoderChain(steps[0] if len(steps) == 1 else {"type": "Sequence", "decoders": steps})
