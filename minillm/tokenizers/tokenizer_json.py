"""The files of byte-level BPE: Hugging Face's tokenizer.json, and GPT-2's vocab.json with merges.txt.

Both spell a token as a string in which every byte is one visible character: printable Latin-1 bytes stand for
themselves, the other 68 are moved to U+0100 and up (a space becomes "Ġ"). `spell` and `unspell` go between the two.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from minillm.tokenizers.split_patterns import SPLIT_PATTERNS

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_MOVED = [byte for byte in range(256) if byte not in _PRINTABLE]
_SPELLING = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(0x100 + n) for n, byte in enumerate(_MOVED)}
_BYTE = {character: byte for byte, character in _SPELLING.items()}
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


def unspell(text: str) -> bytes | None:
    """The token that `text` spells; None if a character of it stands for no byte."""
    try:
        return bytes([_BYTE[character] for character in text])
    except KeyError:
        return None


def spells_itself(text: str) -> bool:
    """Whether `text` is the spelling of its own UTF-8 bytes, as printable ASCII without spaces is."""
    return unspell(text) == text.encode()


def save(parts: Parts, path: Path) -> None:
    """Write a tokenizer.json: to a temporary file beside `path`, flushed to disk, then renamed."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    pre_tokenizer: dict[str, Any] = byte_level
    if parts.pattern != "gpt2":
        regex = {"Regex": SPLIT_PATTERNS[parts.pattern].published}
        split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level | {"use_regex": False}]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    vocabulary = {spell(token): i for token, i in parts.vocabulary.items()} | parts.special_tokens
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text} | flags for text, i in parts.special_tokens.items()],
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
            "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
            "merges": [[spell(left), spell(right)] for left, right in parts.merges],
        },
    }
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False, indent=2)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> Parts:
    """Read a tokenizer.json; ValueError names what in it is not byte-level BPE with a known split pattern.

    Which ids fit together is for `ByteBPETokenizer` to say.
    """
    content = _read_object(path)
    try:
        model = content.get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            raise ValueError(f"model must be of type BPE, got {_kind(model)}")
        if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
            raise ValueError("model must have an object 'vocab' and a list 'merges'")
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges"):
            if model.get(name):
                raise ValueError(f"model.{name} must be null, false or empty, got {model[name]!r}")
        for name in ("normalizer", "truncation", "padding"):
            if content.get(name) is not None:
                raise ValueError(f"{name} must be null, got {content[name]!r}")
        for name in ("post_processor", "decoder"):
            if content.get(name) is not None and _kind(content[name]) != "ByteLevel":
                raise ValueError(f"{name} must be null or ByteLevel, got {_kind(content[name])}")
        special_tokens = _special_tokens(content.get("added_tokens"))
        pattern = _pattern_name(content.get("pre_tokenizer"))
        merges = [_merge(entry) for entry in model["merges"]]
        return Parts(_vocabulary(model["vocab"], special_tokens), merges, pattern, special_tokens)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a tokenizer.json of byte-level BPE: {error}") from None


def load_gpt2_files(vocab: Path, merges: Path, special_tokens: Sequence[str]) -> Parts:
    """Read vocab.json (spelled token -> id) and merges.txt (a "#version" line, then two spelled tokens a line)."""
    spelled = _read_object(vocab)
    pairs = []
    for number, line in enumerate(merges.read_text(encoding="utf-8").split("\n"), 1):
        if line and not line.startswith("#version"):
            try:
                pairs.append(_merge(line))
            except ValueError as error:
                raise ValueError(f"{merges}, line {number}: {error}") from None
    try:
        vocabulary = _vocabulary(spelled, dict.fromkeys(special_tokens))
    except ValueError as error:
        raise ValueError(f"{vocab}: {error}") from None
    special: dict[str, int] = {}
    for text in special_tokens:
        special[text] = spelled.setdefault(text, max(spelled.values(), default=-1) + 1)
    return Parts(vocabulary, pairs, "gpt2", special)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def _special_tokens(added_tokens: Any) -> dict[str, int]:
    if not isinstance(added_tokens, list | None):
        raise ValueError(f"added_tokens must be a list or null, got {added_tokens!r}")
    special_tokens: dict[str, int] = {}
    normalized: dict[bool, list[str]] = {False: [], True: []}
    for token in added_tokens or []:
        if not (isinstance(token, dict) and isinstance(token.get("content"), str) and _is_id(token.get("id"))):
            raise ValueError(f"an added token must have a string 'content' and an integer 'id', got {token!r}")
        text = token["content"]
        for flag in ("single_word", "lstrip", "rstrip"):
            if token.get(flag):
                raise ValueError(f"added token {text!r} must have {flag} false")
        if special_tokens.setdefault(text, token["id"]) != token["id"]:
            raise ValueError(f"added token {text!r} must have one id, got {special_tokens[text]} and {token['id']}")
        normalized[bool(token.get("normalized"))].append(text)
    # `tokenizers` looks for the normalized ones in a second pass, here all are found in one: the same, if none overlap.
    for first, second in product(normalized[False], normalized[True]):
        if _overlap(first, second):
            raise ValueError(f"added tokens {first!r} and {second!r} overlap: both must be normalized, or neither")
    return special_tokens


def _overlap(one: str, other: str) -> bool:
    """Whether a text may hold both tokens with characters in common."""
    short, long = sorted((one, other), key=len)
    return short in long or any(long.endswith(short[:n]) or long.startswith(short[-n:]) for n in range(1, len(short)))


def _vocabulary(spelled: Mapping[str, Any], special_tokens: Mapping[str, int | None]) -> dict[bytes, int]:
    """The ordinary tokens; a special token is one of them as well if it is spelled like one."""
    vocabulary = {}
    for text, i in spelled.items():
        if not _is_id(i):
            raise ValueError(f"the id of token {text!r} must be an integer, got {i!r}")
        if text in special_tokens and special_tokens[text] not in (i, None):
            raise ValueError(f"added token {text!r} has id {special_tokens[text]}, but {i} in the vocabulary")
        if text not in special_tokens or spells_itself(text):
            vocabulary[_token(text)] = i
    return vocabulary


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _merge(entry: object) -> tuple[bytes, bytes]:
    parts = entry.split(" ") if isinstance(entry, str) else entry
    if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise ValueError(f"a merge must be two tokens, got {entry!r}")
    return _token(parts[0]), _token(parts[1])


def _token(text: str) -> bytes:
    token = unspell(text)
    if token is None:
        raise ValueError(f"token {text!r} has a character that is not in the byte-level alphabet")
    return token


def _kind(part: Any) -> str | None:
    return part.get("type") if isinstance(part, dict) else None


def _pattern_name(pre_tokenizer: Any) -> str:
    steps = pre_tokenizer.get("pretokenizers") if _kind(pre_tokenizer) == "Sequence" else [pre_tokenizer]
    kinds = [_kind(step) for step in steps] if isinstance(steps, list) else []
    if kinds not in (["ByteLevel"], ["Split", "ByteLevel"]):
        raise ValueError(f"pre_tokenizer must be ByteLevel, or Split and then ByteLevel, got {kinds}")
    if steps[-1].get("add_prefix_space", True):
        raise ValueError("pre_tokenizer ByteLevel must have add_prefix_space false")
    if steps[-1].get("use_regex", True) != (len(steps) == 1):
        raise ValueError("pre_tokenizer ByteLevel must have use_regex true if it is alone, and false after Split")
    if len(steps) == 1:
        return "gpt2"
    published = {pattern.published: name for name, pattern in SPLIT_PATTERNS.items()}
    expression = steps[0]["pattern"].get("Regex") if isinstance(steps[0].get("pattern"), dict) else None
    if not isinstance(expression, str) or expression not in published:
        raise ValueError(f"pre_tokenizer Split must have one of the patterns {list(published)}, got {expression!r}")
    # The patterns match every character, so what lies between matches can be kept or removed.
    if (steps[0].get("behavior"), steps[0].get("invert", False)) not in (("Isolated", False), ("Removed", True)):
        raise ValueError("pre_tokenizer Split must be Isolated and not inverted, or Removed and inverted")
    return published[expression]
