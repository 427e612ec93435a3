"""The slots of a template, and the two ways to write them: as a string, and in a tokenizer.json.

A string has its slots between spaces. `$A` and `$B` are the first and the second text, all else are special tokens, and
`:1` gives the type id of a slot, 0 if left out: `[CLS] $A [SEP] $B:1 [SEP]:1`. This is how Hugging Face's `tokenizers`
writes templates.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from minillm.tokenizers.arguments import checked_integer

LARGEST_ID = (1 << 32) - 1  # of a token or a type: `tokenizers` reads no larger one
# `$` and `$1` are the first text as well, the latter with type id 1.
_SLOT = re.compile(r"(?:\$(?P<text>[AaBb]|[0-9]*)|(?P<token>[^$:][^:]*))(?::(?P<type_id>[0-9]+))?")


class TextSlot(NamedTuple):
    """The place of a text: the first one (`sequence` 0, `$A`) or the second (1, `$B`)."""

    sequence: int
    type_id: int = 0


class TokenSlot(NamedTuple):
    """The place of a special token, by the name that `Template.special_tokens` explains."""

    name: str
    type_id: int = 0


Slot = TextSlot | TokenSlot


def slots_from_string(template: str) -> tuple[Slot, ...]:
    """The slots of a template string; ValueError for one that cannot be read."""
    return tuple(map(_slot_from_string, template.split(" ")))


def slots_to_string(slots: Iterable[Slot]) -> str:
    """How a template is written; type id 0 is left out."""
    names = (("$" + "AB"[slot.sequence] if isinstance(slot, TextSlot) else slot.name, slot.type_id) for slot in slots)
    return " ".join(f"{name}:{type_id}" if type_id else name for name, type_id in names)


def _slot_from_string(text: str) -> Slot:
    match = _SLOT.fullmatch(text)
    if match is None:
        raise ValueError(f"a template has $A, $B and special tokens, each with or without :type_id, got {text!r}")
    type_id = int(match["type_id"] or 0)
    if match["token"] is not None:
        return TokenSlot(match["token"], type_id)
    if match["text"].isdecimal():
        return TextSlot(0, type_id if match["type_id"] else int(match["text"]))
    return TextSlot(int(match["text"] in ("B", "b")), type_id)


def checked_slot(slot: object) -> Slot:
    """`slot`; TypeError if it is none, or its fields are of other types; ValueError for a type id out of range."""
    match slot:
        case TextSlot(sequence):
            sequence = checked_integer("the sequence of a text slot", sequence, 0, 1)
            return TextSlot(sequence, checked_integer("the type id of a text", slot.type_id, 0, LARGEST_ID))
        case TokenSlot(str(name)):
            return TokenSlot(name, checked_integer(f"the type id of {name!r}", slot.type_id, 0, LARGEST_ID))
    raise TypeError(f"a slot of a template must be a TextSlot or a TokenSlot, got {slot!r}")


def slot_from_json(entry: Any) -> Slot:
    """One entry of `single` or `pair` of a TemplateProcessing; ValueError if it is neither text nor token."""
    if isinstance(entry, dict) and len(entry) == 1:
        ((sort, slot),) = entry.items()
        if isinstance(slot, dict) and isinstance(slot.get("type_id"), int) and isinstance(slot.get("id"), str):
            if sort == "SpecialToken":
                return TokenSlot(slot["id"], slot["type_id"])
            if sort == "Sequence" and slot["id"] in ("A", "B"):
                return TextSlot("AB".index(slot["id"]), slot["type_id"])
    raise ValueError(f"a template has Sequence A, Sequence B and SpecialToken, each with a type_id, got {entry!r}")


def slot_to_json(slot: Slot) -> dict[str, Any]:
    """One entry of `single` or `pair` of a TemplateProcessing."""
    if isinstance(slot, TextSlot):
        return {"Sequence": {"id": "AB"[slot.sequence], "type_id": slot.type_id}}
    return {"SpecialToken": {"id": slot.name, "type_id": slot.type_id}}
