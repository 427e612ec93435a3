"""JSON files as tokenizers need them: read with errors that name the file, written completely or not at all."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError names the file if it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(content).__name__}")
    return content


def write_object(content: dict[str, Any], path: Path) -> None:
    """Write an object as JSON: to a temporary file beside `path`, flushed to disk, then renamed."""
    write_bytes(json.dumps(content, ensure_ascii=False, indent=2).encode(), path)


def write_bytes(content: bytes, path: Path) -> None:
    """Write a file that appears under its name only when it is complete and on disk."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def kind(part: Any) -> str | None:
    """The "type" of one part of a tokenizer.json; None if it has none that is a string."""
    name = part.get("type") if isinstance(part, dict) else None
    return name if isinstance(name, str) else None
