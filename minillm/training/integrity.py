"""Whether files hold what was written: sizes, SHA-256 checksums, and forcing content to the disk."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any


class DamagedError(Exception):
    """Names a file and says what is wrong with it."""


def describe(path: Path) -> dict[str, Any]:
    """The size in bytes and the SHA-256 of a file, for `verify`."""
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def verify(path: Path, recorded: dict[str, Any]) -> None:
    """Compare a file with what `describe` said of it; raises DamagedError."""
    try:
        size = path.stat().st_size
        if size != recorded["bytes"]:
            raise DamagedError(f"{path} has {size} bytes where {recorded['bytes']} were written")
        sha256 = _sha256(path)
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error}") from None
    if sha256 != recorded["sha256"]:
        raise DamagedError(f"{path} does not have the checksum it was written with")


def write_sealed(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object together with its own checksum; raises ValueError for what JSON cannot hold."""
    document = {"sha256": hashlib.sha256(canonical(value)).hexdigest(), "state": value}
    path.write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote; raises DamagedError."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or not JSON
        raise DamagedError(f"{path} cannot be read: {error}") from None
    if (
        not isinstance(document, dict)
        or set(document) != {"sha256", "state"}
        or not isinstance(document["state"], dict)
    ):
        raise DamagedError(f"{path} is not the state of a checkpoint")
    state: dict[str, Any] = document["state"]
    if hashlib.sha256(canonical(state)).hexdigest() != document["sha256"]:
        raise DamagedError(f"{path} does not have the checksum it was written with")
    return state


def canonical(value: Any) -> bytes:
    """One byte string for one JSON value; raises ValueError for what is not one."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("utf-8")
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a plain JSON value: {error}") from None


def fsync(path: Path) -> None:
    """Force the content of a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
