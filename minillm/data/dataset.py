"""Batches of tokens from memory-mapped shards: shuffled, seeded, resumable to the exact next batch.

The split is one long row of tokens. Each epoch cuts it, from a random offset, into windows of `context_length` inputs
whose targets are the inputs moved by one, and visits the windows in a random order without repetition. Everything that
decides the next batch is (seed, epoch, position in the epoch): two integers of state.
"""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from minillm.data.shard_index import SPLITS, DatasetError, map_shard, read_index
from minillm.data.shards import DEFAULT_SHARD_TOKENS, Tokenizer, tokenizer_fingerprint, write_shards
from minillm.data.shuffle import permute, random_integer

BLOCK = 8192  # window numbers are permuted this many at a time, so that a batch costs a slice


class TokenDataset:
    """One split of a tokenised corpus, as batches for next-token prediction.

    Args:
        folder: what `TokenDataset.write` made.
        split: "train" or "validation".
        context_length: inputs in a window, in tokens. A window spans context_length + 1 tokens and may cross the
            boundaries of documents and of shards.
        batch_size: windows in a batch, over all ranks together.
        seed: of the order of the windows.
        rank, world_size: of a data-parallel run: rank r gets rows r * b .. (r + 1) * b - 1 of each global batch,
            b = batch_size / world_size. The state is the same on every rank, and does not depend on world_size.
        tokenizer: when given, it must be the one that the shards were written with.

    The shards are memory-mapped: opening costs no reading, and the operating system keeps in memory what fits.

    Raises DatasetError (a ValueError) for a folder that is no intact dataset, and ValueError for an unknown split, a
    context longer than the split, a batch_size that is below 1 or not divisible by world_size.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        split: str = "train",
        *,
        context_length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(map(repr, SPLITS))}, got {split!r}")
        for name, value in (("context_length", context_length), ("batch_size", batch_size), ("world_size", world_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        if not isinstance(seed, int):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        if batch_size % world_size:
            raise ValueError(f"world_size must divide batch_size {batch_size}, got {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0 .. {world_size - 1}, got {rank}")
        self.folder, self.split = Path(folder), split
        self.context_length, self.batch_size, self.seed = context_length, batch_size, seed
        self.rank, self.world_size = rank, world_size

        index, self.fingerprint = read_index(self.folder)
        self.vocab_size: int = index["vocab_size"]
        self.end_of_text: int | None = index["end_of_text"]
        self.tokenizer_fingerprint: str = index["tokenizer_fingerprint"]
        if tokenizer is not None and tokenizer_fingerprint(tokenizer) != self.tokenizer_fingerprint:
            raise DatasetError(f"{self.folder} was written with another tokenizer than the one given")
        description = index["splits"][split]
        self.n_tokens: int = description["n_tokens"]
        self.n_bytes: int = description["n_bytes"]
        self.n_documents: int = description["n_documents"]
        if self.n_tokens < context_length + 1:
            raise ValueError(
                f"context_length must be at most {self.n_tokens - 1} for the {split} split of {self.folder}, which has "
                f"{self.n_tokens} tokens; got {context_length}"
            )
        self._shard_records: list[dict[str, Any]] = description["shards"]
        self._shards = [map_shard(self.folder, record, index["dtype"]) for record in self._shard_records]
        self._shard_ends = np.cumsum([shard.size for shard in self._shards]).tolist()
        self._epoch = self._position = 0
        self._start_epoch(0)

    @staticmethod
    def write(
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
        """Tokenise `documents` into shards in `folder`, split by document; returns the folder.

        Streams: memory holds some 32 million characters at most (or one document), however large the corpus. The folder
        appears complete or not at all (written beside, fsynced, renamed); a killed writer leaves a `<folder>.partial-*`
        behind, which may be deleted.

        Args:
            validation_fraction: share of the text that goes to "validation", whole documents at a time (a lone one is
                cut), decided by a hash of (seed, text); see `minillm.data.split`. 0 writes no validation split.
            end_of_text: token id put after each document, or None for no separator.
            shard_tokens: tokens in a shard file at most.
            overwrite: replace a dataset that is already in `folder`. Other files are never replaced.

        Raises FileExistsError when `folder` holds something, ValueError when there is no text or an argument is out of
        range, TypeError when a document is no str.
        """
        return write_shards(
            folder,
            documents,
            tokenizer,
            validation_fraction=validation_fraction,
            seed=seed,
            end_of_text=end_of_text,
            shard_tokens=shard_tokens,
            overwrite=overwrite,
        )

    @property
    def epoch(self) -> float:
        """Passes over the split so far, with fraction."""
        return self._epoch + self._position / self._n_windows

    @property
    def tokens_per_batch(self) -> int:
        """Target tokens in a global batch: batch_size * context_length."""
        return self.batch_size * self.context_length

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """(inputs, targets): int64 tensors of shape (batch_size / world_size, context_length), targets = inputs moved
        by one. Goes on for ever, epoch after epoch."""
        starts: list[int] = []
        while len(starts) < self.batch_size:
            if self._position == self._n_windows:
                self._start_epoch(self._epoch + 1)
            block = self._position // BLOCK * BLOCK
            if block != self._block_start:
                self._load_block(block)
            count = min(self.batch_size - len(starts), len(self._block) - (self._position - block))
            starts += self._block[self._position - block : self._position - block + count]
            self._position += count
        rows = self.batch_size // self.world_size
        return self._gather(starts[self.rank * rows : (self.rank + 1) * rows], self.context_length)

    def evaluation_batches(self, max_batches: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """The split once, in order: every token but the first is a target exactly once.

        Batches have batch_size rows; then come the rows that do not fill a batch, and, as a batch of one shorter row,
        the tokens that do not fill a window. So weigh each batch's mean loss by its number of targets. With
        world_size > 1 each rank gets its rows of each batch, and a rank whose share of the last ones is empty yields
        fewer batches. Leaves the state of `next_batch` alone.
        """
        if max_batches is not None and max_batches < 1:
            raise ValueError(f"max_batches must be at least 1 or None, got {max_batches}")
        length = self.context_length
        n_windows, rest = divmod(self.n_tokens - 1, length)
        batches = [
            (range(first, min(first + self.batch_size, n_windows)), length)
            for first in range(0, n_windows, self.batch_size)
        ]
        if rest:
            batches.append((range(n_windows, n_windows + 1), rest))
        rows = self.batch_size // self.world_size
        for windows, width in batches[:max_batches]:
            mine = windows[self.rank * rows : (self.rank + 1) * rows]
            if mine:
                yield self._gather([window * length for window in mine], width)

    def state_dict(self) -> dict[str, Any]:
        """Where the next batch comes from: a few numbers and the dataset's name, JSON-able."""
        return {
            "dataset": self.fingerprint,
            "split": self.split,
            "context_length": self.context_length,
            "seed": self.seed,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken: the next batch is the one that would have come next there.

        batch_size and world_size may differ from the saved run's: the state counts windows. Raises ValueError when the
        state is of another dataset, split, context_length or seed, or lies outside the epoch.
        """
        expected = self.state_dict()
        if not isinstance(state, dict) or set(state) != set(expected):
            raise ValueError(f"state must be a dict with the keys {sorted(expected)}, got {state!r}")
        for name in ("dataset", "split", "context_length", "seed"):
            if state[name] != expected[name]:
                raise ValueError(
                    f"the state was saved with {name} {state[name]!r}, this dataset has {expected[name]!r}"
                )
        epoch, position = state["epoch"], state["position"]
        if not (isinstance(epoch, int) and isinstance(position, int) and epoch >= 0):
            raise ValueError(f"epoch and position must be integers from 0 up, got {epoch!r} and {position!r}")
        n_windows = self._epoch_shape(epoch)[1]
        if not 0 <= position <= n_windows:
            raise ValueError(f"position must be in 0 .. {n_windows} in epoch {epoch}, got {position}")
        self._start_epoch(epoch)
        self._position = position

    def verify(self) -> None:
        """Read every shard of the split and compare its SHA-256 with the index's; DatasetError for a damaged one."""
        for record, shard in zip(self._shard_records, self._shards, strict=True):
            digest = hashlib.sha256(shard.view(np.uint8).data).hexdigest()
            if digest != record["sha256"]:
                path = self.folder / record["file"]
                raise DatasetError(f"{path} is damaged: its SHA-256 is {digest}, the index says {record['sha256']}")

    def _epoch_shape(self, epoch: int) -> tuple[int, int]:
        """(offset of the first window, number of windows). The offset is random so that, over the epochs, a token is
        seen at every place of a window, not always with the same left context."""
        slack = self.n_tokens - 1 - self.context_length
        offset = random_integer(min(self.context_length - 1, slack) + 1, self.seed, epoch, 0)
        return offset, (self.n_tokens - 1 - offset) // self.context_length

    def _start_epoch(self, epoch: int) -> None:
        self._epoch, self._position = epoch, 0
        self._offset, self._n_windows = self._epoch_shape(epoch)
        self._block_start, self._block = -1, list[int]()

    def _load_block(self, start: int) -> None:
        positions = np.arange(start, min(start + BLOCK, self._n_windows))
        windows = permute(positions, self._n_windows, self.seed, self._epoch, 1)
        self._block_start, self._block = start, (self._offset + windows * self.context_length).tolist()

    def _gather(self, starts: list[int], length: int) -> tuple[Tensor, Tensor]:
        inputs = np.empty((len(starts), length), dtype=np.int64)
        targets = np.empty((len(starts), length), dtype=np.int64)
        for row, start in enumerate(starts):
            window = self._read(start, length + 1)
            inputs[row], targets[row] = window[:-1], window[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def _read(self, start: int, count: int) -> npt.NDArray[Any]:
        number = bisect.bisect_right(self._shard_ends, start)
        shard = self._shards[number]
        first = start - (self._shard_ends[number] - shard.size)
        if first + count <= shard.size:
            return shard[first : first + count]
        rest = count - (shard.size - first)
        return np.concatenate([shard[first:], self._read(start + count - rest, rest)])
