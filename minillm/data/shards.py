"""Token shards: a tokenised corpus on disk, written once, memory-mapped ever after.

A dataset is a folder:

    index.json              what is here: dtype, counts, checksums, the tokenizer's fingerprint
    train_00000.bin         token ids, little-endian uint16 (vocabularies up to 65536) or uint32, nothing else
    train_00001.bin         ...
    validation_00000.bin

Each shard is a plain array, `np.fromfile(path, dtype="<u2")` reads one. Writing streams, so the corpus may be larger
than RAM.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from minillm.data.shard_index import FORMAT, INDEX_NAME, SPLITS, VERSION
from minillm.data.split import split_documents

DEFAULT_SHARD_TOKENS = 2**27
SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})_\d{{5,}}\.bin")


class Tokenizer(Protocol):
    """What the data room needs of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """SHA-256 over all token ids, in order, and what stands for each: it differs where an id means another token.

    A token is known by its spelling in the vocabulary (`id_to_token`, if the tokenizer has that), or else by the text
    that it decodes to, which several tokens may have in common. An id that no token has counts as empty.
    """
    spelling = getattr(tokenizer, "id_to_token", None)
    digest = hashlib.sha256()
    for token in range(tokenizer.vocab_size):
        try:
            text = spelling(token) if spelling else tokenizer.decode([token])
        except ValueError:
            text = None
        encoded = (text or "").encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(4, "little") + encoded)
    return digest.hexdigest()


def write_shards(
    folder: str | os.PathLike[str],
    documents: Iterable[str],
    tokenizer: Tokenizer,
    *,
    validation_fraction: float = 0.1,
    seed: int = 0,
    end_of_text: int | None = None,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    overwrite: bool = False,
) -> Path:
    """Tokenise `documents` into `folder`; returns the folder. See `TokenDataset.write`."""
    if not isinstance(shard_tokens, int) or shard_tokens < 1:
        raise ValueError(f"shard_tokens must be an integer of at least 1, got {shard_tokens!r}")
    vocab_size = tokenizer.vocab_size
    if not 1 <= vocab_size <= 2**32:
        raise ValueError(f"tokenizer.vocab_size must be in 1 .. 2^32, got {vocab_size}")
    if end_of_text is not None and not 0 <= end_of_text < vocab_size:
        raise ValueError(f"end_of_text must be a token id in 0 .. {vocab_size - 1} or None, got {end_of_text}")
    fingerprint = tokenizer_fingerprint(tokenizer)
    target = Path(os.path.abspath(folder))
    _refuse_to_destroy(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)

    # Everything is written beside the target and renamed into place at the very end: a reader sees the old state or the
    # new one, and a writer that was killed leaves only a folder whose name says that it may be deleted.
    partial = _new_name(target, "partial")
    partial.mkdir()
    try:
        dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        with contextlib.ExitStack() as stack:
            writers = {
                split: stack.enter_context(contextlib.closing(_SplitWriter(partial, split, dtype, shard_tokens)))
                for split in SPLITS
            }
            for number, (split, document) in enumerate(split_documents(documents, validation_fraction, seed)):
                ids = tokenizer.encode(document)
                if end_of_text is not None:
                    ids = [*ids, end_of_text]
                tokens = np.asarray(ids, dtype=np.int64)
                if tokens.size and not (tokens.min() >= 0 and tokens.max() < vocab_size):
                    raise ValueError(
                        f"the tokenizer gave ids from {tokens.min()} to {tokens.max()} for document {number}, "
                        f"but its vocab_size is {vocab_size}"
                    )
                writers[split].add(tokens, len(document.encode("utf-8", "surrogatepass")))
        index = {
            "format": FORMAT,
            "version": VERSION,
            "dtype": dtype.str,
            "vocab_size": vocab_size,
            "tokenizer_fingerprint": fingerprint,
            "end_of_text": end_of_text,
            "validation_fraction": validation_fraction,
            "seed": seed,
            "splits": {split: writer.description() for split, writer in writers.items()},
        }
        with open(partial / INDEX_NAME, "w", encoding="utf-8") as file:
            json.dump(index, file, indent=1)
            file.write("\n")
            _sync(file)
        _sync_folder(partial)
        _move_into_place(partial, target, overwrite)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


class _SplitWriter:
    """Appends tokens to <split>_00000.bin, <split>_00001.bin, ..., of at most `shard_tokens` tokens each."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._shards: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._digest = hashlib.sha256()
        self._n_bytes = self._n_documents = 0

    def add(self, tokens: np.ndarray[Any, Any], n_bytes: int) -> None:
        self._n_bytes += n_bytes
        self._n_documents += 1
        while tokens.size:
            if self._file is None:
                name = f"{self._split}_{len(self._shards):05d}.bin"
                self._file = open(self._folder / name, "wb")  # noqa: SIM115 - lives as long as the shard grows
                self._digest = hashlib.sha256()
                self._shards.append({"file": name, "n_tokens": 0})
            shard = self._shards[-1]
            piece = tokens[: self._shard_tokens - shard["n_tokens"]]
            tokens = tokens[piece.size :]
            data = piece.astype(self._dtype).tobytes()
            self._file.write(data)
            self._digest.update(data)
            shard["n_tokens"] += int(piece.size)
            if shard["n_tokens"] == self._shard_tokens:
                self.close()

    def close(self) -> None:
        if self._file is not None:
            _sync(self._file)
            self._file.close()
            self._file = None
            self._shards[-1]["sha256"] = self._digest.hexdigest()

    def description(self) -> dict[str, Any]:
        return {
            "n_tokens": sum(shard["n_tokens"] for shard in self._shards),
            "n_bytes": self._n_bytes,
            "n_documents": self._n_documents,
            "shards": self._shards,
        }


def _refuse_to_destroy(target: Path, overwrite: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise FileExistsError(f"folder must be a folder or a new name, but {target} is a file")
    names = {path.name for path in target.iterdir()}
    strangers = sorted(name for name in names if name != INDEX_NAME and not SHARD_NAME.fullmatch(name))
    if strangers:
        raise FileExistsError(
            f"{target} holds what is no part of a token dataset ({strangers[0]}): name another folder"
        )
    if names and not overwrite:
        raise FileExistsError(f"{target} already holds a token dataset: pass overwrite=True to replace it")


def _move_into_place(partial: Path, target: Path, overwrite: bool) -> None:
    _refuse_to_destroy(target, overwrite)
    if target.exists():
        old = _new_name(target, "replaced")
        os.replace(target, old)
        os.replace(partial, target)
        shutil.rmtree(old)
    else:
        os.replace(partial, target)
    _sync_folder(target.parent)


def _new_name(target: Path, kind: str) -> Path:
    return target.with_name(f"{target.name}.{kind}-{secrets.token_hex(4)}")


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and the rename is durable by itself
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
