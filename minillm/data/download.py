"""Download a file once, with its checksum: resumed where it broke off, complete or not there at all.

The bytes go to `<name>.part`, are compared with the pinned SHA-256 and only then renamed to `<name>`. A download that
broke off is continued with an HTTP Range request (RFC 9110, section 14; If-Range, section 13.1.5, makes the server send
the whole file again if it has changed). The standard library's urllib does the talking.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from filelock import FileLock
from tqdm import tqdm

CHUNK_BYTES = 2**16


class DownloadError(RuntimeError):
    """A file could not be had. The message says from where, why, and what was left behind."""


def default_cache_folder() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/minillm where that is set, else the platform's usual place."""
    base = os.environ.get("XDG_CACHE_HOME")
    if base and os.path.isabs(base):  # the XDG specification has relative paths ignored
        return Path(base) / "minillm"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "minillm" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "minillm"
    return Path.home() / ".cache" / "minillm"


def download(
    url: str,
    sha256: str,
    *,
    file_name: str | None = None,
    cache_folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
    timeout: float = 30.0,
    attempts: int = 3,
) -> Path:
    """The path of a file with the given SHA-256, fetched from `url` unless the cache folder has it already.

    Args:
        url: http or https.
        sha256: the checksum in hexadecimal. A cached file that no longer has it is fetched again.
        file_name: its name in the cache folder; the last part of the URL's path by default.
        cache_folder: `default_cache_folder()` by default; made if need be.
        progress: show a bar on stderr.
        timeout: seconds without a byte after which the connection counts as lost.
        attempts: requests at most; a connection that ends early is continued by the next one.

    Several processes may ask for the same file at once: one fetches it, the others wait for that.

    Raises DownloadError when the server cannot be reached, answers with an error, ends early for the last time (what
    came is kept for the next call), sends other bytes than the checksum says (they are deleted), or the disk refuses
    them; ValueError for arguments out of range.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"url must start with http:// or https:// and name a host, got {url!r}")
    sha256 = sha256.lower()
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"sha256 must be 64 hexadecimal digits, got {sha256!r}")
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, got {attempts}")
    if not timeout > 0:
        raise ValueError(f"timeout must be above 0 seconds, got {timeout}")
    name = file_name or unquote(PurePosixPath(parts.path).name)
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise ValueError(f"file_name must be a plain file name, got {name!r}")
    folder = Path(cache_folder) if cache_folder is not None else default_cache_folder()
    target = folder / name
    try:
        if _has_checksum(target, sha256):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            return _download(url, sha256, target, progress, timeout, attempts)
    except OSError as error:
        raise DownloadError(f"{target} cannot be written: {error}. Pass cache_folder= to keep it elsewhere") from error


def _download(url: str, sha256: str, target: Path, progress: bool, timeout: float, attempts: int) -> Path:
    if _has_checksum(target, sha256):  # another process fetched it while this one waited for the lock
        return target
    part = target.with_name(f"{target.name}.part")
    validator = target.with_name(f"{target.name}.part.validator")
    transfer = _Transfer(0, None, resumed=False)
    for _ in range(attempts):
        if not _has_checksum(part, sha256):
            transfer = _request(url, part, validator, timeout, progress)
            if transfer.total is not None and transfer.size < transfer.total:
                continue
            actual = _sha256(part)
            if actual != sha256:
                part.unlink()
                if transfer.resumed:  # the first half may have been another version's: once more from the beginning
                    continue
                raise DownloadError(
                    f"{url} sent {transfer.size} bytes with SHA-256 {actual}, expected {sha256}. The bytes were "
                    "deleted; the file has changed at its source, or something on the way changed it"
                )
        os.replace(part, target)
        validator.unlink(missing_ok=True)
        return target
    raise DownloadError(
        f"{url}: the connection ended after {transfer.size} of {transfer.total} bytes, {attempts} times. "
        "What came is kept; the next call goes on from there"
    )


@dataclass
class _Transfer:
    size: int  # bytes in the part file now
    total: int | None  # bytes it should have, where the server said so
    resumed: bool  # whether the part file held bytes of an earlier request


def _request(url: str, part: Path, validator: Path, timeout: float, progress: bool) -> _Transfer:
    """One request for what is still missing, appended to the part file."""
    have = part.stat().st_size if part.exists() else 0
    # Compressed in transit, byte ranges would count other bytes than the file's.
    request = urllib.request.Request(url, headers={"User-Agent": "minillm", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
        if validator.exists():
            request.add_header("If-Range", validator.read_text(encoding="ascii"))
    try:
        response = urllib.request.urlopen(request, timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and have:  # there is no such range: what is here is not the beginning of that file
            part.unlink()
            return _request(url, part, validator, timeout, progress)
        raise DownloadError(f"{url} cannot be had: the server answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise DownloadError(f"{url} cannot be had: {urlsplit(url).hostname} cannot be reached ({reason})") from None
    with response:
        resumed = response.status == 206 and have > 0
        if resumed:
            first, total = _content_range(response.headers.get("Content-Range"))
            if first != have:
                part.unlink()
                raise DownloadError(f"{url}: asked for the bytes from {have} on, the server sent those from {first} on")
        else:
            have = 0
            length = response.headers.get("Content-Length")
            total = int(length) if length is not None and length.isdigit() else None
            _remember(validator, response.headers)
        with (
            open(part, "ab" if resumed else "wb") as file,
            tqdm(
                total=total,
                initial=have,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                desc=part.name.removesuffix(".part"),
                disable=not progress,
            ) as bar,
        ):
            size = have
            while chunk := _read(response):
                file.write(chunk)
                size += len(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    return _Transfer(size, total, resumed)


def _read(response: Any) -> bytes:
    """The next bytes; none at the end, be it the file's or the connection's: the count tells which."""
    try:
        return bytes(response.read(CHUNK_BYTES))
    except http.client.IncompleteRead as error:
        return error.partial
    except (OSError, http.client.HTTPException):
        return b""


def _remember(validator: Path, headers: Any) -> None:
    """Keep what If-Range needs: a strong ETag, or else the date (RFC 9110 does not allow a weak ETag there)."""
    etag = headers.get("ETag", "")
    value = etag if etag.startswith('"') else headers.get("Last-Modified", "")
    validator.unlink(missing_ok=True)
    if value and value.isascii():
        validator.write_text(value, encoding="ascii")


def _content_range(value: str | None) -> tuple[int, int | None]:
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", value or "")
    if match is None:
        return -1, None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _has_checksum(path: Path, sha256: str) -> bool:
    return path.exists() and _sha256(path) == sha256


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
