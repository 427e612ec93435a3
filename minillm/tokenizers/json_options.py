"""Reading the options of one part (a normalizer, a pre-tokenizer) of a tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def read_options(part: Mapping[str, Any], **allowed: tuple[Any, ...]) -> dict[str, Any]:
    """The options of a part, those that it does not name at their defaults; "type" is not one of them.

    Args:
        part: Such as {"type": "Strip", "strip_left": true, "strip_right": false}.
        allowed: For each option its type or types (as `isinstance` takes them) and, if it has one, its default.

    Raises:
        ValueError: An option is missing, of another type, or not one of those allowed. The part's type is named.
    """
    unknown = part.keys() - allowed.keys() - {"type"}
    if unknown:
        names = ", ".join(map(repr, sorted(unknown)))
        raise ValueError(f"{part.get('type')} has options that are not supported: {names}")
    options = {}
    for name, (types, *default) in allowed.items():
        if name not in part and not default:
            raise ValueError(f"{part.get('type')} must have the option {name!r}")
        options[name] = value = part.get(name, *default)
        if not isinstance(value, types):
            raise ValueError(f"option {name!r} of {part.get('type')} has a value that is not supported: {value!r}")
    return options


def read_parts(part: Mapping[str, Any], name: str) -> list[Any]:
    """The list of parts that a sequence holds under `name`."""
    parts = read_options(part, **{name: (list,)})[name]
    assert isinstance(parts, list)
    return parts
