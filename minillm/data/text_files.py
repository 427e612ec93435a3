"""Text files of any size and of the usual encodings, as a stream of documents.

A file is read a megabyte at a time, so it may be larger than RAM. What is not text is refused by name and byte offset:
training on a mis-decoded or binary file goes wrong silently, and late.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path

CHUNK_BYTES = 2**20
WHOLE_BYTES = 2**22
PIECE_CHARACTERS = 2**18
# The longer mark first: the UTF-32 mark begins with the UTF-16 one.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def list_files(folder: Path, pattern: str = "*") -> list[Path]:
    """Every file under `folder` whose name matches `pattern`, sorted by path, without hidden files and folders.

    Links to folders are not followed. Raises ValueError when nothing matches, or when `pattern` is no relative one.
    """
    try:
        matching = list(folder.rglob(pattern))
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f"pattern must match names below the folder, such as '*.txt'; got {pattern!r}: {error}"
        ) from None
    files = [
        path
        for path in matching
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise ValueError(f"{folder} holds no file that matches {pattern!r} (hidden ones are not looked at)")
    return sorted(files, key=lambda path: path.relative_to(folder).parts)


def read_documents(
    path: Path, *, encoding: str | None = None, separator: str | None = None, piece_characters: int | None = None
) -> Iterator[str]:
    """The documents of one text file.

    Without a `separator` the file is one document; with one, the documents are what stands between, stripped of the
    white space at their ends, empty ones left out. A document above `piece_characters` (by default: none in files up to
    4 MiB, 262144 in larger ones) comes in pieces, cut after a line end, or after a space, or anywhere, where a line is
    that long. Line ends become "\\n", as in Python's text mode, in the file and in the separator.

    encoding: a Python codec's name. By default a byte order mark decides (UTF-8, UTF-16, UTF-32), else it is UTF-8.

    Raises ValueError for an unknown codec, for bytes that the encoding does not allow and for a binary file (one with a
    NUL character), naming file and byte offset.
    """
    if piece_characters is None:
        size = path.stat().st_size
        piece_characters = size + 1 if size <= WHOLE_BYTES else PIECE_CHARACTERS
    if piece_characters < 1:
        raise ValueError(f"piece_characters must be at least 1, got {piece_characters}")
    if separator == "":
        raise ValueError("separator must be a string of at least one character or None, got ''")
    if separator is not None:
        separator = separator.replace("\r\n", "\n").replace("\r", "\n")
    pending = ""
    for chunk in _decode(path, encoding):
        pending += chunk
        if separator is not None:
            *complete, pending = pending.split(separator)
            for document in complete:
                yield from _pieces(document.strip(), piece_characters)
        while len(pending) > piece_characters + len(separator or ""):
            # What may be the beginning of a separator stays behind the cut.
            at = _cut_before(pending, piece_characters)
            yield pending[:at]
            pending = pending[at:]
    yield from _pieces(pending if separator is None else pending.strip(), piece_characters)


def _pieces(document: str, limit: int) -> Iterator[str]:
    while document:
        at = _cut_before(document, limit) if len(document) > limit else len(document)
        yield document[:at]
        document = document[at:]


def _cut_before(text: str, limit: int) -> int:
    for boundary in ("\n", " "):
        at = text.rfind(boundary, 0, limit)
        if at >= 0:
            return at + 1
    return limit


def _decode(path: Path, encoding: str | None) -> Iterator[str]:
    """The text of the file in chunks, line ends translated."""
    with open(path, "rb") as file:
        codec, skip = _codec(file.read(4), encoding)
        file.seek(skip)
        decoder = codecs.getincrementaldecoder(codec)("strict")
        newlines = io.IncrementalNewlineDecoder(None, translate=True)
        offset = skip
        while True:
            data = file.read(CHUNK_BYTES)
            waiting = len(decoder.getstate()[0])
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                at = offset - waiting + error.start
                raise ValueError(
                    f"{path} is not {codec} text: {error.reason} at byte {at}. Pass encoding= with its own encoding "
                    "(cp1252 and latin-1 are common), or convert it to UTF-8"
                ) from None
            nul = text.find("\0")
            if nul >= 0:
                at = offset - waiting + len(text[:nul].encode(codec))
                raise ValueError(
                    f"{path} looks like a binary file: it has a NUL character at byte {at}. If it is text in UTF-16 "
                    "without a byte order mark, pass encoding='utf-16-le' or 'utf-16-be'; in a folder of mixed files, "
                    "pass pattern= (such as '*.txt')"
                )
            offset += len(data)
            yield newlines.decode(text, final=not data)
            if not data:
                return


def _codec(beginning: bytes, encoding: str | None) -> tuple[str, int]:
    """(codec, bytes of byte order mark to skip)."""
    if encoding is not None:
        try:
            info = codecs.lookup(encoding)
        except LookupError:
            raise ValueError(f"encoding must name a codec of Python such as 'utf-8', got {encoding!r}") from None
        if not getattr(info, "_is_text_encoding", True):
            raise ValueError(f"encoding must name a text encoding, got {encoding!r}")
        for mark, codec in BYTE_ORDER_MARKS:
            if beginning.startswith(mark) and info.name in (codec, codec.removesuffix("-le").removesuffix("-be")):
                return codec, len(mark)
        return info.name, 0
    for mark, codec in BYTE_ORDER_MARKS:
        if beginning.startswith(mark):
            return codec, len(mark)
    return "utf-8", 0
