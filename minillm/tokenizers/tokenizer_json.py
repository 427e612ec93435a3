"""The files of byte-level BPE: Hugging Face's tokenizer.json, and GPT-2's vocab.json with merges.txt.

Both spell a token as a string in which every byte is one visible character: printable Latin-1 bytes stand for
themselves, the other 68 are moved to U+0100 and up (a space becomes "Ġ"). `spell` and `unspell` go between the two.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minillm.tokenizers.split_patterns import SPLIT_PATTERNS, SplitPattern

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_MOVED = [byte for byte in range(256) if byte not in _PRINTABLE]
_SPELLING = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(0x100 + n) for n, byte in enumerate(_MOVED)}
_BYTE = {ord(character): byte for byte, character in _SPELLING.items()}
# The single bytes in the order of their spelling: the order of their ids in GPT-2 and in every trained tokenizer.
BYTE_ALPHABET = [bytes([byte]) for byte in [*_PRINTABLE, *_MOVED]]


class Parts(NamedTuple):
    """What a file holds: the arguments of `ByteBPETokenizer`."""

    vocabulary: dict[bytes, int]
    merges: list[tuple[bytes, bytes]]
    pattern: str
    special_tokens: dict[str, int]


def spell(token: bytes) -> str:
    """One visible character a byte."""
    return token.decode("latin-1").translate(_SPELLING)


def unspell(text: str) -> bytes:
    """The inverse of `spell`; ValueError for a character that stands for no byte."""
    try:
        return bytes([_BYTE[ord(character)] for character in text])
    except KeyError as error:
        raise ValueError(f"token {text!r}: {chr(error.args[0])!r} is not in the byte-level alphabet") from None


def save(
    path: Path,
    vocabulary: Mapping[bytes, int],
    merges: Sequence[tuple[bytes, bytes]],
    pattern: SplitPattern,
    special_tokens: Mapping[str, int],
) -> None:
    """Write a tokenizer.json: to a temporary file beside `path`, flushed to disk, then renamed over it."""
    spelled = {spell(token): i for token, i in vocabulary.items() if i not in special_tokens.values()}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if pattern.name == "gpt2":
        pre_tokenizer: dict[str, Any] = byte_level
    else:
        split = {"type": "Split", "pattern": {"Regex": pattern.published}, "behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text} | flags for text, i in special_tokens.items()],
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": dict(sorted((spelled | dict(special_tokens)).items(), key=lambda item: item[1])),
            "merges": [[spell(left), spell(right)] for left, right in merges],
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, prefix=path.name, delete=False) as file:
        try:
            json.dump(content, file, ensure_ascii=False, indent=1)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def load(path: Path) -> Parts:
    """Read a tokenizer.json; ValueError names what in it is not byte-level BPE with a known split pattern."""
    content = _read_object(path)
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict):
        raise ValueError(f"{path}: not a byte-level BPE tokenizer.json: it has no model.vocab object")
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"{path}: model.type must be 'BPE', got {model['type']!r}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
        if model.get(name):
            raise ValueError(f"{path}: model.{name} must be null, false or empty, got {model[name]!r}")
    for name in ("normalizer", "truncation", "padding"):
        if content.get(name) is not None:
            raise ValueError(f"{path}: {name} must be null, got {_kind(content[name])}")
    for name, allowed in (("post_processor", (None, "ByteLevel")), ("decoder", ("ByteLevel",))):
        if _kind(content.get(name)) not in allowed:
            raise ValueError(f"{path}: {name} must be {' or '.join(map(str, allowed))}, got {_kind(content.get(name))}")
    special_tokens: dict[str, int] = {}
    for token in content.get("added_tokens") or []:
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag):
                raise ValueError(f"{path}: added token {token.get('content')!r} must not have {flag}")
        special_tokens[token["content"]] = token["id"]
    try:
        pattern = _pattern_name(content.get("pre_tokenizer"))
        merges = [_merge(entry) for entry in model.get("merges") or []]
        return Parts(_vocabulary(model["vocab"], special_tokens), merges, pattern, special_tokens)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def load_gpt2_files(vocab: Path, merges: Path, special_tokens: Sequence[str]) -> Parts:
    """Read vocab.json (spelled token -> id) and merges.txt (a "#version" line, then two spelled tokens a line)."""
    spelled = _read_object(vocab)
    special = {}
    for text in special_tokens:
        special[text] = spelled.setdefault(text, len(spelled))
    pairs = []
    for number, line in enumerate(merges.read_text(encoding="utf-8").split("\n"), 1):
        if line.startswith("#version") or not line:
            continue
        try:
            pairs.append(_merge(line.rstrip("\r")))
        except ValueError as error:
            raise ValueError(f"{merges}, line {number}: {error}") from None
    try:
        return Parts(_vocabulary(spelled, special), pairs, "gpt2", special)
    except ValueError as error:
        raise ValueError(f"{vocab}: {error}") from None


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def _vocabulary(spelled: Mapping[str, Any], special_tokens: Mapping[str, int]) -> dict[bytes, int]:
    vocabulary = {}
    for text, i in spelled.items():
        if not isinstance(i, int) or isinstance(i, bool):
            raise ValueError(f"the id of token {text!r} must be an integer, got {i!r}")
        if text in special_tokens:
            if special_tokens[text] != i:
                raise ValueError(f"added token {text!r} has id {special_tokens[text]}, but {i} in model.vocab")
            vocabulary[text.encode()] = i
        else:
            vocabulary[unspell(text)] = i
    return vocabulary


def _merge(entry: object) -> tuple[bytes, bytes]:
    parts = entry.split(" ") if isinstance(entry, str) else entry
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise ValueError(f"a merge must be two tokens, got {entry!r}")
    return unspell(parts[0]), unspell(parts[1])


def _kind(part: Any) -> str | None:
    return part.get("type") if isinstance(part, dict) else None


def _pattern_name(pre_tokenizer: Any) -> str:
    steps = pre_tokenizer.get("pretokenizers", []) if _kind(pre_tokenizer) == "Sequence" else [pre_tokenizer]
    kinds = [_kind(step) for step in steps]
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise ValueError(f"pre_tokenizer must be ByteLevel, or Split and then ByteLevel, got {kinds}")
    if steps[-1].get("add_prefix_space", True):
        raise ValueError("pre_tokenizer ByteLevel must have add_prefix_space false")
    if steps[-1].get("use_regex", True) is (len(steps) == 2):
        raise ValueError("pre_tokenizer must split once: ByteLevel's use_regex is true alone and false after Split")
    if len(steps) == 1:
        return "gpt2"
    if steps[0].get("behavior") != "Isolated" or steps[0].get("invert"):
        raise ValueError("pre_tokenizer Split must have behavior 'Isolated' and invert false")
    published = (steps[0].get("pattern") or {}).get("Regex")
    for name, pattern in SPLIT_PATTERNS.items():
        if pattern.published == published:
            return name
    raise ValueError(
        f"pre_tokenizer Split must have the pattern of one of {', '.join(SPLIT_PATTERNS)}, got {published!r}"
    )
