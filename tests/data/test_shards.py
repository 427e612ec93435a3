"""Shards on disk: complete or not there, never in place of something else, damage noticed."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillm.data import DatasetError, TokenDataset, shards, tokenizer_fingerprint
from minillm.data.shards import write_shards
from minillm.data.split import split_documents

DOCUMENTS = [f"document {number}, " * 5 for number in range(40)]


def open_train(folder: Path) -> TokenDataset:
    return TokenDataset(folder, "train", context_length=8, batch_size=2)


@pytest.mark.parametrize(("wide", "dtype"), [(False, "<u2"), (True, "<u4")])
def test_numpy_alone_can_read_the_shards(
    tmp_path: Path, byte_tokenizer: Any, wide_tokenizer: Any, wide: bool, dtype: str
) -> None:
    tokenizer = wide_tokenizer if wide else byte_tokenizer
    folder = write_shards(tmp_path / "a" / "data", DOCUMENTS, tokenizer, shard_tokens=1000)
    index = json.loads((folder / "index.json").read_text())
    assert index["dtype"] == dtype
    assert index["tokenizer_fingerprint"] == tokenizer_fingerprint(tokenizer)
    expected: dict[str, str] = {"train": "", "validation": ""}
    for split, document in split_documents(DOCUMENTS, 0.1, 0):
        expected[split] += document
    for split, text in expected.items():
        records = index["splits"][split]["shards"]
        parts = [np.fromfile(folder / record["file"], dtype=dtype) for record in records]
        assert bytes(np.concatenate(parts).astype(np.uint8)).decode() == text
        assert [part.size for part in parts[:-1]] == [1000] * (len(parts) - 1)
        for record in records:
            assert record["sha256"] == hashlib.sha256((folder / record["file"]).read_bytes()).hexdigest()
    assert {path.name for path in folder.iterdir()} == {
        "index.json",
        *(record["file"] for split in expected for record in index["splits"][split]["shards"]),
    }


def test_the_same_arguments_give_the_same_bytes(tmp_path: Path, byte_tokenizer: Any) -> None:
    one = write_shards(tmp_path / "one", DOCUMENTS, byte_tokenizer)
    two = write_shards(tmp_path / "two", iter(DOCUMENTS), byte_tokenizer)
    assert open_train(one).fingerprint == open_train(two).fingerprint
    other = write_shards(tmp_path / "other", DOCUMENTS, byte_tokenizer, seed=1)
    assert open_train(one).fingerprint != open_train(other).fingerprint


def test_memory_is_bounded(tmp_path: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def documents() -> Iterator[str]:
        for number in range(200):
            yield f"{number:05d} " * 5000

    monkeypatch.setattr(shards, "split_documents", functools.partial(split_documents, held_characters=10**5))
    tracemalloc.start()
    folder = write_shards(tmp_path / "data", documents(), byte_tokenizer, shard_tokens=10**6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert open_train(folder).n_tokens > 5 * 10**6
    assert peak < 3 * 10**6


@pytest.mark.parametrize("existing", [False, True])
def test_a_writer_killed_at_any_moment_leaves_the_old_state_or_the_new(
    tmp_path: Path, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    target = tmp_path / "data"
    new = open_train(write_shards(tmp_path / "new", DOCUMENTS, byte_tokenizer, seed=1)).fingerprint
    for fatal in range(100):
        if existing and not target.exists():
            old = open_train(write_shards(target, DOCUMENTS, byte_tokenizer)).fingerprint
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # a fork of a process with threads
            child = os.fork()
        if child == 0:
            _die_at(fatal)
            write_shards(target, DOCUMENTS, byte_tokenizer, seed=1, overwrite=existing)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        if target.exists():
            data = open_train(target)
            data.verify()
            assert data.fingerprint in ({old, new} if existing else {new})
        else:
            # Between two renames there may be no dataset under the name, but the old one is whole beside it.
            replaced = list(tmp_path.glob("data.replaced-*"))
            assert existing == bool(replaced)
            for folder in replaced:
                open_train(folder).verify()
                for path in folder.iterdir():
                    path.unlink()
                folder.rmdir()
        if not existing and target.exists():
            break  # the last thing that can go wrong came after the dataset was in place
    assert fatal >= 4
    open_train(target).verify()
    assert open_train(target).fingerprint == new


def _die_at(fatal: int) -> None:
    """Kill this process for good just before its fatal-th fsync, rename or removal."""
    count = 0

    def deadly(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            if count == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return function(*args, **kwargs)

        return call

    for name in ("fsync", "replace", "mkdir"):
        setattr(os, name, deadly(getattr(os, name)))
    shards.shutil.rmtree = deadly(shards.shutil.rmtree)


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path, byte_tokenizer: Any) -> None:
    def broken() -> Iterator[str]:
        yield from DOCUMENTS
        raise RuntimeError("the disk of the source failed")

    with pytest.raises(RuntimeError, match="the source failed"):
        write_shards(tmp_path / "data", broken(), byte_tokenizer)
    assert list(tmp_path.iterdir()) == []

    class Wrong:
        vocab_size = 100
        decode = byte_tokenizer.decode
        encode = byte_tokenizer.encode

    with pytest.raises(ValueError, match="ids from 32 to 117 for document 0, but its vocab_size is 100"):
        write_shards(tmp_path / "data", DOCUMENTS, Wrong())
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_unasked(tmp_path: Path, byte_tokenizer: Any) -> None:
    folder = write_shards(tmp_path / "data", DOCUMENTS, byte_tokenizer)
    before = open_train(folder).fingerprint
    with pytest.raises(FileExistsError, match="already holds a token dataset: pass overwrite=True"):
        write_shards(folder, DOCUMENTS, byte_tokenizer, seed=1)
    assert open_train(folder).fingerprint == before
    write_shards(folder, DOCUMENTS, byte_tokenizer, seed=1, overwrite=True)
    assert open_train(folder).fingerprint != before

    (folder / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match=r"no part of a token dataset \(thesis\.txt\)"):
            write_shards(folder, DOCUMENTS, byte_tokenizer, overwrite=overwrite)
        with pytest.raises(FileExistsError, match="is a file"):
            write_shards(folder / "thesis.txt", DOCUMENTS, byte_tokenizer, overwrite=overwrite)
    assert (folder / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    open_train(write_shards(tmp_path / "empty", DOCUMENTS, byte_tokenizer)).verify()
    assert {path.name for path in tmp_path.iterdir()} == {"data", "empty"}


def test_bad_arguments_are_refused(tmp_path: Path, byte_tokenizer: Any) -> None:
    for arguments, message in (
        ({"validation_fraction": 1.0}, "validation_fraction must be in"),
        ({"shard_tokens": 0}, "shard_tokens must be an integer of at least 1"),
        ({"shard_tokens": 1e6}, r"shard_tokens must be an integer of at least 1, got 1000000\.0"),
        ({"end_of_text": 256}, r"end_of_text must be a token id in 0 \.\. 255 or None, got 256"),
    ):
        with pytest.raises(ValueError, match=message):
            write_shards(tmp_path / "data", DOCUMENTS, byte_tokenizer, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="there is no text"):
        write_shards(tmp_path / "data", [], byte_tokenizer)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_noticed(tmp_path: Path, byte_tokenizer: Any) -> None:
    folder = write_shards(tmp_path / "data", DOCUMENTS, byte_tokenizer)
    index_path, shard_path = folder / "index.json", folder / "train_00000.bin"
    index, shard = index_path.read_text(), shard_path.read_bytes()
    good = json.loads(index)

    def changed(**changes: Any) -> str:
        return json.dumps(good | changes)

    lost_count = json.loads(index)
    del lost_count["splits"]["train"]["n_bytes"]
    wrong_sum = json.loads(index)
    wrong_sum["splits"]["train"]["n_tokens"] += 1
    no_tokens = json.loads(index)
    no_tokens["splits"]["train"]["shards"].append({"file": "train_00001.bin", "n_tokens": 0, "sha256": ""})
    escaping = json.loads(index)
    escaping["splits"]["train"]["shards"][0]["file"] = "../elsewhere.bin"
    for text, message in (
        (index[: len(index) // 2], "index.json is damaged"),
        ("", "index.json is damaged"),
        ("[]", "no index of a token dataset"),
        (changed(format="other"), "no index of a token dataset"),
        (changed(version=99), "format version 99, this minillm reads 2"),
        (changed(dtype="<f4"), "dtype must be '<u2' or '<u4'"),
        (changed(vocab_size="256"), "vocab_size must be an integer in .*, it is '256'"),
        (changed(end_of_text=256), "end_of_text must be a token id or null, it is 256"),
        ("[" * 100_000, "index.json is damaged"),
        (changed(splits=None), "index.json is damaged"),
        (json.dumps(lost_count), "index.json is damaged: KeyError 'n_bytes'"),
        (json.dumps(wrong_sum), "do not add up"),
        (json.dumps(no_tokens), "'train_00001.bin' must have at least 1 token, not 0"),
        (json.dumps(escaping), "must be a plain file name"),
    ):
        index_path.write_text(text)
        with pytest.raises(DatasetError, match=message):
            open_train(folder)
    index_path.write_text(index)

    shard_path.write_bytes(shard[:-1])
    with pytest.raises(DatasetError, match=f"has {len(shard) - 1} bytes, the index says {len(shard)}"):
        open_train(folder)
    shard_path.unlink()
    with pytest.raises(DatasetError, match=r"train_00000\.bin is missing"):
        open_train(folder)
    shard_path.write_bytes(bytes([shard[0] ^ 1]) + shard[1:])
    data = open_train(folder)
    with pytest.raises(DatasetError, match=r"train_00000\.bin is damaged: its SHA-256"):
        data.verify()


def test_fingerprints_tell_tokenizers_apart(byte_tokenizer: Any, wide_tokenizer: Any) -> None:
    assert tokenizer_fingerprint(byte_tokenizer) == tokenizer_fingerprint(byte_tokenizer)
    assert tokenizer_fingerprint(byte_tokenizer) != tokenizer_fingerprint(wide_tokenizer)
