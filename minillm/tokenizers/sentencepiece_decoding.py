"""From pieces back to text: as SentencePiece does it, and as the decoders of a tokenizer.json do it.

A "▁" becomes a space, bytes are put together to characters, and the space that was put in front of the text is taken
off. The two differ in what is not text: SentencePiece leaves control pieces out and shows "⁇" for an unknown one, where
`tokenizers` shows both as they are spelled; of bytes that are not UTF-8, SentencePiece makes U+FFFD of each that cannot
be read, `tokenizers` of all bytes in a row with one that cannot.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from minillm.tokenizers.character_map import CharacterMap
from minillm.tokenizers.json_file import kind
from minillm.tokenizers.json_options import read_options, read_parts
from minillm.tokenizers.metaspace import SPACE, metaspace_from_json
from minillm.tokenizers.sentencepiece_model import BYTE_PIECES, PieceType, SentencePieceModel
from minillm.tokenizers.text_pattern import pattern_from_json

_BYTES = {piece: byte for byte, piece in enumerate(BYTE_PIECES)}
_ESCAPED = re.compile("[\udc80-\udcff]")
Step = Callable[[list[str]], list[str]]


class ModelDecoder:
    """Decodes as SentencePiece does.

    Args:
        model: Whose ids are decoded.
    """

    def __init__(self, model: SentencePieceModel) -> None:
        self._pieces = model.pieces
        self._unk_surface = model.unk_surface
        self._strips = model.add_dummy_prefix or model.remove_extra_whitespaces
        self._strips_all = model.remove_extra_whitespaces
        self._denormalizer = CharacterMap(model.denormalizer)

    def __call__(self, ids: Iterable[int]) -> str:
        """The text of ids, all of which the model has."""
        parts: list[str] = []
        pending = bytearray()
        at_start = self._strips
        for i in ids:
            text, _, piece_type = self._pieces[i]
            if piece_type is PieceType.BYTE:
                pending.append(_BYTES[text])
                continue
            if pending:
                parts.append(_characters(pending))
                pending.clear()
                at_start = False
            if piece_type is PieceType.CONTROL:
                continue
            if piece_type is PieceType.UNKNOWN:
                parts.append(self._unk_surface)
                at_start = False
                continue
            if at_start:
                shown = text.removeprefix(SPACE)
                # What is taken off is one space; all of them, if the model keeps none at the begin of a text.
                at_start = not shown and self._strips_all
                text = shown
            parts.append(text.replace(SPACE, " "))
        parts.append(_characters(pending))
        return self._denormalizer("".join(parts))


class DecoderChain:
    """Decodes as a tokenizer.json says.

    Args:
        part: Its "decoder".

    Raises:
        ValueError: It has a step that is not known here.
    """

    def __init__(self, part: Mapping[str, Any] | None) -> None:
        self.part = part
        self._steps = list(_steps(part))

    def __call__(self, tokens: list[str]) -> str:
        """The text of tokens; without any decoder, a space stands between them."""
        if self.part is None:
            return " ".join(tokens)
        for step in self._steps:
            tokens = step(tokens)
        return "".join(tokens)


def llama_decoder(*, strip: bool) -> dict[str, Any]:
    """The "decoder" of Llama 2's file; `strip` takes off the space that was put in front of the text."""
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    return {
        "type": "Sequence",
        "decoders": [*steps, {"type": "Strip", "content": " ", "start": 1, "stop": 0}] if strip else steps,
    }


def _steps(part: Any) -> Iterable[Step]:
    match kind(part):
        case None if part is None:
            return
        case "Sequence":
            for step in read_parts(part, "decoders"):
                yield from _steps(step)
        case "Replace":
            options = read_options(part, pattern=(dict,), content=(str,))
            pattern = pattern_from_json(options["pattern"])
            if not isinstance(pattern, str):
                raise ValueError(f"decoder Replace must have a String as its pattern, got {options['pattern']!r}")
            yield partial(_replace, pattern, options["content"])
        case "ByteFallback":
            yield _join_bytes
        case "Fuse":
            yield lambda tokens: ["".join(tokens)]
        case "Strip":
            options = read_options(part, content=(str,), start=(int,), stop=(int,))
            yield partial(_strip, options["content"], options["start"], options["stop"])
        case "Metaspace":
            metaspace = metaspace_from_json(part)
            yield partial(_spaces, metaspace.replacement, metaspace.prepend_scheme != "never")
        case other:
            raise ValueError(
                "decoder must be Metaspace, or a Sequence of Replace, ByteFallback, Fuse, Strip and Metaspace, "
                f"got {other or part!r}"
            )


def _characters(data: bytearray) -> str:
    """What UTF-8 bytes spell; U+FFFD for each byte that cannot be read (Python has one for several of a character)."""
    return _ESCAPED.sub("\ufffd", data.decode(errors="surrogateescape"))


def _replace(pattern: str, content: str, tokens: list[str]) -> list[str]:
    return [token.replace(pattern, content) for token in tokens]


def _join_bytes(tokens: list[str]) -> list[str]:
    out: list[str] = []
    pending = bytearray()
    for token in [*tokens, ""]:
        if token in _BYTES:
            pending.append(_BYTES[token])
            continue
        if pending:
            try:
                out.append(pending.decode())
            except UnicodeDecodeError:
                out.append("\ufffd" * len(pending))
            pending.clear()
        out.append(token)
    return out


def _strip(content: str, start: int, stop: int, tokens: list[str]) -> list[str]:
    out = []
    for token in tokens:
        left = len(token[:start]) - len(token[:start].lstrip(content))
        tail = token[max(left, len(token) - stop) :]
        out.append(token[left : len(token) - len(tail) + len(tail.rstrip(content))])
    return out


def _spaces(replacement: str, strips: bool, tokens: list[str]) -> list[str]:
    """Metaspace: symbols become spaces; those of the first token go, if the tokenizer puts one there."""
    return [token.replace(replacement, "" if strips and n == 0 else " ") for n, token in enumerate(tokens)]
