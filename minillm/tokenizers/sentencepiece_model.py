"""SentencePiece's `.model` files: the vocabulary of Llama 2, T5, XLM-R, Gemma and many more, as they are published.

Such a file is one protocol buffer message. The classes to read it are made here, when the module is imported, from a
list of the fields that matter, by the `protobuf` library, in a descriptor pool of their own: whoever has the
`sentencepiece` package loaded as well, with its classes of the same names, is not disturbed. Fields that are not in the
list (how the model was trained) are skipped, as protocol buffers intend.

Source: `sentencepiece_model.proto` of the SentencePiece library (Kudo and Richardson, "SentencePiece: a simple and
language independent subword tokenizer and detokenizer for neural text processing", 2018).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from minillm.tokenizers.json_file import write_bytes

MAX_PIECES = 0x110000
# The library refuses pieces that are longer.
MAX_PIECE_BYTES = 4096


class PieceType(IntEnum):
    """What a piece is for; the numbers are those in the files."""

    NORMAL = 1
    UNKNOWN = 2  # stands for what no piece spells
    CONTROL = 3  # such as <s>: no text ever becomes one
    USER_DEFINED = 4  # always one token where its text occurs
    UNUSED = 5  # switched off: its text is cut as if the piece were not there
    BYTE = 6  # <0x00> to <0xFF>


class Piece(NamedTuple):
    """One entry of the vocabulary; its place in the list is its id.

    Attributes:
        text: How it is spelled; a space is "▁" (U+2581).
        score: Unigram: the natural logarithm of its probability. BPE: the higher, the earlier it is merged.
        type: What it is for.
    """

    text: str
    score: float
    type: PieceType = PieceType.NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
    """What a `.model` file says about cutting a text.

    Attributes:
        pieces: The vocabulary by id. There is exactly one piece of type UNKNOWN.
        algorithm: "unigram" or "bpe".
        byte_fallback: Spell what no piece spells as UTF-8 bytes, with the 256 pieces of type BYTE.
        add_dummy_prefix: Begin every text with a space, so that a word is spelled alike at the start and elsewhere.
        remove_extra_whitespaces: Drop spaces at both ends, and all but one where several follow each other.
        escape_whitespaces: Write a space as "▁".
        treat_whitespace_as_suffix: The space belongs to the word before it; the dummy prefix comes at the end.
        character_map: The normalization, compiled (see `character_map`); empty for none.
        normalizer_name: By which the library knows that normalization: "nmt_nfkc", "identity" ...
        denormalizer: Another character map, applied to decoded text; empty for none.
        unk_surface: What the unknown piece decodes to.
        bos_piece, eos_piece, pad_piece: The spelling of the pieces that begin, end and fill up a text.
    """

    pieces: tuple[Piece, ...]
    algorithm: str = "unigram"
    byte_fallback: bool = False
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True
    treat_whitespace_as_suffix: bool = False
    character_map: bytes = b""
    normalizer_name: str = ""
    denormalizer: bytes = b""
    unk_surface: str = " \u2047 "
    bos_piece: str = "<s>"
    eos_piece: str = "</s>"
    pad_piece: str = "<pad>"

    def __post_init__(self) -> None:
        if self.algorithm not in ("unigram", "bpe"):
            raise ValueError(f"algorithm must be 'unigram' or 'bpe', got {self.algorithm!r}")
        if len(self.pieces) > MAX_PIECES:
            raise ValueError(f"pieces must be at most {MAX_PIECES}, got {len(self.pieces)}")
        ids: dict[str, int] = {}
        for i, (text, score, _) in enumerate(self.pieces):
            if not 0 < len(text.encode()) <= MAX_PIECE_BYTES or "\0" in text:
                raise ValueError(f"piece {i} must have 1 to {MAX_PIECE_BYTES} bytes, none of them zero, got {text!r}")
            if ids.setdefault(text, i) != i:
                raise ValueError(f"pieces {ids[text]} and {i} are both spelled {text!r}")
            if not math.isfinite(score):
                raise ValueError(f"piece {i} ({text!r}) must have a finite score, got {score}")
        unknown = self.ids_of(PieceType.UNKNOWN)
        if len(unknown) != 1:
            raise ValueError(f"exactly one piece must be of type UNKNOWN, got {len(unknown)}")
        spelled = {self.pieces[i].text for i in self.ids_of(PieceType.BYTE)}
        if spelled != (set(BYTE_PIECES) if self.byte_fallback else set()):
            wanted = "<0x00> to <0xFF> with byte_fallback" if self.byte_fallback else "none without byte_fallback"
            raise ValueError(f"pieces of type BYTE must be {wanted}, got {len(spelled)} of them")

    def ids_of(self, kind: PieceType) -> list[int]:
        """The ids of the pieces of one type, in order."""
        return [i for i, piece in enumerate(self.pieces) if piece.type is kind]

    @property
    def unk_id(self) -> int:
        """The id of the unknown piece."""
        return self.ids_of(PieceType.UNKNOWN)[0]

    @property
    def bos_id(self) -> int | None:
        """The id of the piece that begins a text; None if the model has none."""
        return self._control_id(self.bos_piece)

    @property
    def eos_id(self) -> int | None:
        """The id of the piece that ends a text; None if the model has none."""
        return self._control_id(self.eos_piece)

    @property
    def pad_id(self) -> int | None:
        """The id of the piece that fills up a batch; None if the model has none."""
        return self._control_id(self.pad_piece)

    def _control_id(self, text: str) -> int | None:
        return next((i for i in self.ids_of(PieceType.CONTROL) if self.pieces[i].text == text), None)

    @classmethod
    def load(cls, path: str | Path) -> SentencePieceModel:
        """Read a `.model` file; ValueError names the file and says what is wrong with it."""
        message: Any = _ModelProto()
        try:
            message.ParseFromString(Path(path).read_bytes())
            return cls._from_message(message)
        except (DecodeError, ValueError) as error:
            raise ValueError(f"{path}: not a SentencePiece model: {error}") from None

    def save(self, path: str | Path) -> None:
        """Write a `.model` file, which the library reads. It appears under its name only when complete and on disk."""
        write_bytes(self._to_message().SerializeToString(deterministic=True), Path(path))

    @classmethod
    def _from_message(cls, message: Any) -> SentencePieceModel:
        if not message.pieces:
            raise ValueError("it holds no pieces")
        trainer, normalizer = message.trainer_spec, message.normalizer_spec
        if trainer.model_type not in _ALGORITHMS:
            raise ValueError(f"model_type must be one of {_ALGORITHMS} (unigram, bpe), got {trainer.model_type}")
        return cls(
            pieces=tuple(Piece(_text(piece.piece), piece.score, PieceType(piece.type)) for piece in message.pieces),
            algorithm=_ALGORITHMS[trainer.model_type],
            byte_fallback=trainer.byte_fallback,
            add_dummy_prefix=normalizer.add_dummy_prefix,
            remove_extra_whitespaces=normalizer.remove_extra_whitespaces,
            escape_whitespaces=normalizer.escape_whitespaces,
            treat_whitespace_as_suffix=trainer.treat_whitespace_as_suffix,
            character_map=normalizer.precompiled_charsmap,
            normalizer_name=_text(normalizer.name),
            denormalizer=message.denormalizer_spec.precompiled_charsmap,
            unk_surface=_text(trainer.unk_surface),
            bos_piece=_text(trainer.bos_piece) or "<s>",
            eos_piece=_text(trainer.eos_piece) or "</s>",
            pad_piece=_text(trainer.pad_piece) or "<pad>",
        )

    def _to_message(self) -> Any:
        message: Any = _ModelProto()
        for text, score, kind in self.pieces:
            message.pieces.add(piece=text, score=score, type=int(kind))
        trainer, normalizer = message.trainer_spec, message.normalizer_spec
        trainer.model_type = {name: number for number, name in _ALGORITHMS.items()}[self.algorithm]
        trainer.vocab_size = len(self.pieces)
        trainer.byte_fallback = self.byte_fallback
        trainer.treat_whitespace_as_suffix = self.treat_whitespace_as_suffix
        trainer.unk_surface = self.unk_surface
        trainer.unk_piece = self.pieces[self.unk_id].text
        trainer.bos_piece, trainer.eos_piece, trainer.pad_piece = self.bos_piece, self.eos_piece, self.pad_piece
        trainer.unk_id = self.unk_id
        trainer.bos_id, trainer.eos_id, trainer.pad_id = (
            -1 if i is None else i for i in (self.bos_id, self.eos_id, self.pad_id)
        )
        normalizer.name = self.normalizer_name
        normalizer.precompiled_charsmap = self.character_map
        normalizer.add_dummy_prefix = self.add_dummy_prefix
        normalizer.remove_extra_whitespaces = self.remove_extra_whitespaces
        normalizer.escape_whitespaces = self.escape_whitespaces
        if self.denormalizer:
            message.denormalizer_spec.precompiled_charsmap = self.denormalizer
        return message


BYTE_PIECES = [f"<0x{byte:02X}>" for byte in range(256)]
_ALGORITHMS = {1: "unigram", 2: "bpe"}

# The fields that are read: message -> name, number, type and, where it is not the empty value, default.
_FIELDS: dict[str, list[tuple[Any, ...]]] = {
    "TrainerSpec": [
        ("model_type", 3, "int32", "1"),
        ("vocab_size", 4, "int32"),
        ("treat_whitespace_as_suffix", 24, "bool"),
        ("byte_fallback", 35, "bool"),
        ("unk_id", 40, "int32", "0"),
        ("bos_id", 41, "int32", "1"),
        ("eos_id", 42, "int32", "2"),
        ("pad_id", 43, "int32", "-1"),
        ("unk_surface", 44, "string", " \u2047 "),
        ("unk_piece", 45, "string", "<unk>"),
        ("bos_piece", 46, "string", "<s>"),
        ("eos_piece", 47, "string", "</s>"),
        ("pad_piece", 48, "string", "<pad>"),
    ],
    "NormalizerSpec": [
        ("name", 1, "string"),
        ("precompiled_charsmap", 2, "bytes"),
        ("add_dummy_prefix", 3, "bool", "true"),
        ("remove_extra_whitespaces", 4, "bool", "true"),
        ("escape_whitespaces", 5, "bool", "true"),
    ],
    "SentencePiece": [("piece", 1, "string"), ("score", 2, "float"), ("type", 3, "int32", "1")],
    "ModelProto": [
        ("pieces", 1, "SentencePiece"),
        ("trainer_spec", 2, "TrainerSpec"),
        ("normalizer_spec", 3, "NormalizerSpec"),
        ("denormalizer_spec", 5, "NormalizerSpec"),
    ],
}


def _text(value: str | bytes) -> str:
    """The library hands out the bytes of a string that is not UTF-8."""
    return value if isinstance(value, str) else value.decode()


def _message_class() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="minillm/sentencepiece_model.proto", package="minillm")
    for name, fields in _FIELDS.items():
        message = file.message_type.add(name=name)
        for field_name, number, kind, *default in fields:
            field = message.field.add(name=field_name, number=number)
            field.label = field.LABEL_REPEATED if field_name == "pieces" else field.LABEL_OPTIONAL
            if kind in _FIELDS:
                field.type, field.type_name = field.TYPE_MESSAGE, f".minillm.{kind}"
            else:
                field.type = getattr(field, f"TYPE_{kind.upper()}")
            if default:
                field.default_value = default[0]
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("minillm.ModelProto"))


_ModelProto = _message_class()
