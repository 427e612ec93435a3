"""What a folder of token shards says of itself: index.json, read and checked before anything is trusted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT = "minillm token shards"
VERSION = 2  # 1 had another fingerprint of the tokenizer
INDEX_NAME = "index.json"
SPLITS = ("train", "validation")


class DatasetError(ValueError):
    """A token dataset on disk that is missing, damaged, or of another kind. The message names the file."""


def read_index(folder: Path) -> tuple[dict[str, Any], str]:
    """The index and the dataset's fingerprint (the SHA-256 of the index, which holds every shard's own)."""
    path = folder / INDEX_NAME
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DatasetError(
            f"{folder} holds no token dataset ({INDEX_NAME} is missing): TokenDataset.write makes one"
        ) from None
    try:
        index = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is damaged: {error}") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise DatasetError(f"{path} is no index of a token dataset")
    if index.get("version") != VERSION:
        raise DatasetError(f"{path} has format version {index.get('version')!r}, this minillm reads {VERSION}")
    try:
        _check_index(index)
    except (KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path} is damaged: {type(error).__name__} {error}") from error
    except ValueError as error:
        raise DatasetError(f"{path} is damaged: {error}") from error
    return index, hashlib.sha256(data).hexdigest()


def _check_index(index: dict[str, Any]) -> None:
    if index["dtype"] not in ("<u2", "<u4"):
        raise ValueError(f"dtype must be '<u2' or '<u4', it is {index['dtype']!r}")
    if type(index["vocab_size"]) is not int or not 1 <= index["vocab_size"] <= 2**32:
        raise ValueError(f"vocab_size must be an integer in 1 .. 2^32, it is {index['vocab_size']!r}")
    end_of_text = index["end_of_text"]
    if end_of_text is not None and not (type(end_of_text) is int and 0 <= end_of_text < index["vocab_size"]):
        raise ValueError(f"end_of_text must be a token id or null, it is {end_of_text!r}")
    for name in ("seed", "validation_fraction", "tokenizer_fingerprint"):
        index[name]
    for split in SPLITS:
        description = index["splits"][split]
        for name in ("n_tokens", "n_bytes", "n_documents"):
            if not isinstance(description[name], int) or description[name] < 0:
                raise ValueError(
                    f"{name} of the {split} split must be an integer from 0 up, it is {description[name]!r}"
                )
        if sum(shard["n_tokens"] for shard in description["shards"]) != description["n_tokens"]:
            raise ValueError(f"the shards of the {split} split do not add up to {description['n_tokens']} tokens")
        for shard in description["shards"]:
            if Path(shard["file"]).name != shard["file"] or not isinstance(shard["sha256"], str):
                raise ValueError(f"the shard {shard['file']!r} must be a plain file name with a sha256")
            if not isinstance(shard["n_tokens"], int) or shard["n_tokens"] < 1:
                raise ValueError(f"the shard {shard['file']!r} must have at least 1 token, not {shard['n_tokens']!r}")


def map_shard(folder: Path, record: dict[str, Any], dtype: str) -> npt.NDArray[Any]:
    path = folder / record["file"]
    expected = record["n_tokens"] * np.dtype(dtype).itemsize
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: write the dataset again") from None
    if size != expected:
        raise DatasetError(f"{path} has {size} bytes, the index says {expected}: write the dataset again")
    # A plain array over the map: slicing an np.memmap costs ten times as much as slicing an ndarray.
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))
