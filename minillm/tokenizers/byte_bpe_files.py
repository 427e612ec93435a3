"""The files of byte-level BPE: its parts of Hugging Face's tokenizer.json, and GPT-2's vocab.json with merges.txt.

Both spell the bytes of a token by `byte_alphabet`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from minillm.tokenizers.byte_alphabet import spell, spells_itself, unspell
from minillm.tokenizers.json_file import kind, read_object
from minillm.tokenizers.split_patterns import SPLIT_PATTERNS

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


class Parts(NamedTuple):
    """What the model and the pre-tokenizer of a file say: arguments of `ByteBPETokenizer`."""

    vocabulary: dict[bytes, int]
    merges: list[tuple[bytes, bytes]]
    pattern: str = "gpt2"
    ignore_merges: bool = False


def model_json(
    vocabulary: Mapping[str, int], merges: Iterable[tuple[bytes, bytes]], ignore_merges: bool
) -> dict[str, Any]:
    """The "model" of a tokenizer.json; `vocabulary` as it is spelled there, special tokens included."""
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": ignore_merges,
        "vocab": dict(sorted(vocabulary.items(), key=lambda item: item[1])),
        "merges": [[spell(left), spell(right)] for left, right in merges],
    }


def decoder_json() -> dict[str, Any]:
    """The "decoder" of a tokenizer.json."""
    return dict(_BYTE_LEVEL)


def pre_tokenizer_json(pattern: str) -> dict[str, Any]:
    """The "pre_tokenizer" of a tokenizer.json."""
    if pattern == "gpt2":
        return dict(_BYTE_LEVEL)
    regex = {"Regex": SPLIT_PATTERNS[pattern].published}
    split = {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [split, _BYTE_LEVEL | {"use_regex": False}]}


def read_parts(content: Mapping[str, Any], special_tokens: Mapping[str, int]) -> Parts:
    """The parts in the content of a tokenizer.json; ValueError names what is not byte-level BPE with a known pattern.

    Which ids fit together is for `ByteBPETokenizer` to say.
    """
    model = content.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        raise ValueError(f"model must be of type BPE, got {kind(model)}")
    if not isinstance(model.get("vocab"), dict) or not isinstance(model.get("merges"), list):
        raise ValueError("model must have an object 'vocab' and a list 'merges'")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise ValueError(f"model.{name} must be null, false or empty, got {model[name]!r}")
    if content.get("decoder") is not None and kind(content["decoder"]) != "ByteLevel":
        raise ValueError(f"decoder must be null or ByteLevel, got {kind(content['decoder'])}")
    ignore_merges = model.get("ignore_merges")
    if not isinstance(ignore_merges, bool | None):
        raise ValueError(f"model.ignore_merges must be true, false or null, got {ignore_merges!r}")
    pattern = _pattern_name(content.get("pre_tokenizer"))
    merges = [_merge(entry) for entry in model["merges"]]
    vocabulary = _vocabulary(model["vocab"], special_tokens)
    return Parts(vocabulary, merges, pattern, bool(ignore_merges))


def read_gpt2_files(vocab: Path, merges: Path, special_tokens: Collection[str]) -> tuple[Parts, dict[str, int]]:
    """Read vocab.json (spelled token -> id) and merges.txt (a "#version" line, then two spelled tokens a line).

    Returns:
        The parts, and the ids of the special tokens: those in vocab.json, or else the next free ones.
    """
    spelled = read_object(vocab)
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
    return Parts(vocabulary, pairs), special


def _vocabulary(spelled: Mapping[str, Any], special_tokens: Mapping[str, int | None]) -> dict[bytes, int]:
    """The ordinary tokens; a special token is one of them as well if it is spelled like one."""
    vocabulary = {}
    for text, i in spelled.items():
        if not isinstance(i, int) or isinstance(i, bool):
            raise ValueError(f"the id of token {text!r} must be an integer, got {i!r}")
        if text in special_tokens and special_tokens[text] not in (i, None):
            raise ValueError(f"added token {text!r} has id {special_tokens[text]}, but {i} in the vocabulary")
        if text not in special_tokens or spells_itself(text):
            vocabulary[_token(text)] = i
    return vocabulary


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


def _pattern_name(pre_tokenizer: Any) -> str:
    steps = pre_tokenizer.get("pretokenizers") if kind(pre_tokenizer) == "Sequence" else [pre_tokenizer]
    kinds = [kind(step) for step in steps] if isinstance(steps, list) else []
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
