"""Batches: each window once an epoch, the exact next batch after a resume, whatever the shards and the ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data import DatasetError, TokenDataset

Factory = Callable[..., Path]


class CountingTokenizer:
    """Encodes "5 9" as the ids 5, 6, 7, 8: every token of a text tells its own place in the corpus."""

    vocab_size = 70_000

    def encode(self, text: str) -> list[int]:
        first, end = map(int, text.split())
        return list(range(first, end))

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Factory:
    """A dataset whose train split is the ids 0 .. n - 1 in order, in shards of the given size."""
    made: dict[tuple[int, int], Path] = {}

    def make(n_tokens: int, shard_tokens: int = 10**9) -> Path:
        key = (n_tokens, shard_tokens)
        if key not in made:
            folder = tmp_path_factory.mktemp("rows") / "data"
            documents = [f"{start} {min(start + 37, n_tokens)}" for start in range(0, n_tokens, 37)]
            TokenDataset.write(folder, documents, CountingTokenizer(), validation_fraction=0, shard_tokens=shard_tokens)
            made[key] = folder
        return made[key]

    return make


def starts_of_an_epoch(data: TokenDataset) -> list[int]:
    n_windows = (data.n_tokens - 1) // data.context_length
    return [int(data.next_batch()[0][0, 0]) for _ in range(n_windows)]


@settings(max_examples=25, deadline=None)
@given(n_tokens=st.integers(50, 600), context=st.integers(1, 40), seed=st.integers(0, 50))
def test_an_epoch_shows_each_window_once(rows: Factory, n_tokens: int, context: int, seed: int) -> None:
    n_tokens = n_tokens // 50 * 50
    data = TokenDataset(rows(n_tokens, 91), context_length=context, batch_size=1, seed=seed)
    for _ in range(3):
        inputs, targets = [], []
        while True:
            batch = data.next_batch()
            assert torch.equal(batch[1], batch[0] + 1)  # ids count up: the target is the next token
            inputs.append(batch[0])
            targets.append(batch[1])
            if data.epoch == int(data.epoch):
                break
        starts = sorted(int(row[0, 0]) for row in inputs)
        seen = sorted(torch.cat(targets).flatten().tolist())
        offset = starts[0]
        assert 0 <= offset < context
        assert starts == list(range(offset, n_tokens - context, context))
        assert seen == list(range(offset + 1, offset + 1 + len(seen)))  # each target once
        assert n_tokens - 1 - seen[-1] < context


def test_epochs_differ_in_order_and_offset(rows: Factory) -> None:
    data = TokenDataset(rows(600), context_length=16, batch_size=1)
    first, second = starts_of_an_epoch(data), starts_of_an_epoch(data)
    assert first != sorted(first)
    assert first != second
    offsets = set()
    for seed in range(40):
        offsets.add(starts_of_an_epoch(TokenDataset(rows(600), context_length=16, batch_size=1, seed=seed))[0] % 16)
    assert len(offsets) > 8


@settings(max_examples=25, deadline=None)
@given(
    context=st.integers(1, 30),
    batch_size=st.integers(1, 70),
    before=st.integers(0, 40),
    after=st.integers(1, 5),
    seed=st.integers(0, 5),
)
def test_resuming_gives_the_exact_next_batch(
    rows: Factory, context: int, batch_size: int, before: int, after: int, seed: int
) -> None:
    def fresh() -> TokenDataset:
        return TokenDataset(rows(600, 91), context_length=context, batch_size=batch_size, seed=seed)

    uninterrupted = fresh()
    for _ in range(before):
        uninterrupted.next_batch()
    state = json.loads(json.dumps(uninterrupted.state_dict()))
    resumed = fresh()
    resumed.next_batch()
    resumed.load_state_dict(state)
    for _ in range(after):
        for ours, theirs in zip(uninterrupted.next_batch(), resumed.next_batch(), strict=True):
            assert torch.equal(ours, theirs)
    assert resumed.state_dict() == uninterrupted.state_dict()


@settings(max_examples=20, deadline=None)
@given(world_size=st.sampled_from([1, 2, 3, 6]), context=st.integers(1, 50), steps=st.integers(1, 30))
def test_the_ranks_share_the_batch(rows: Factory, world_size: int, context: int, steps: int) -> None:
    def open_rank(rank: int, size: int) -> TokenDataset:
        return TokenDataset(rows(600, 91), context_length=context, batch_size=12, rank=rank, world_size=size)

    alone, ranks = open_rank(0, 1), [open_rank(rank, world_size) for rank in range(world_size)]
    for _ in range(steps):
        whole = alone.next_batch()
        parts = [rank.next_batch() for rank in ranks]
        for side in (0, 1):
            assert torch.equal(torch.cat([part[side] for part in parts]), whole[side])
    assert all(rank.state_dict() == alone.state_dict() for rank in ranks)
    # The same run may go on with another number of ranks.
    half = open_rank(1, 2)
    half.load_state_dict(ranks[-1].state_dict())
    assert torch.equal(half.next_batch()[0], alone.next_batch()[0][6:])


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("context", "batch_size"), [(1, 2), (16, 4), (599, 2), (37, 16), (23, 2)])
def test_evaluation_shows_each_token_once_in_order(
    rows: Factory, context: int, batch_size: int, world_size: int
) -> None:
    targets: list[int] = []
    for rank in range(world_size):
        data = TokenDataset(
            rows(600, 91), context_length=context, batch_size=batch_size, rank=rank, world_size=world_size
        )
        before = data.state_dict()
        for inputs, expected in data.evaluation_batches():
            assert torch.equal(expected, inputs + 1)
            assert inputs.shape[0] <= batch_size // world_size
            targets += expected.flatten().tolist()
        assert data.state_dict() == before
        if world_size == 1:
            assert targets == list(range(1, 600))
            assert len(list(data.evaluation_batches(max_batches=1))) == 1
    assert sorted(targets) == list(range(1, 600))


@pytest.mark.parametrize("shard_tokens", [7, 64, 10**6])
def test_shards_do_not_show(rows: Factory, shard_tokens: int) -> None:
    one = TokenDataset(rows(150), context_length=20, batch_size=3)
    many = TokenDataset(rows(150, shard_tokens), context_length=20, batch_size=3)
    for _ in range(8):
        assert torch.equal(one.next_batch()[0], many.next_batch()[0])


def test_shapes_types_and_independence(rows: Factory) -> None:
    data = TokenDataset(rows(600), context_length=16, batch_size=4)
    inputs, targets = data.next_batch()
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.shape == targets.shape == (4, 16)
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    saved = targets.clone()
    inputs.zero_()  # may be written to: it is no view of the file or of the targets
    assert torch.equal(targets, saved)
    assert data.tokens_per_batch == 64


def test_a_batch_may_be_larger_than_an_epoch(rows: Factory) -> None:
    data = TokenDataset(rows(150), context_length=149, batch_size=5)
    assert data.next_batch()[0].tolist() == [list(range(149))] * 5
    assert data.epoch == 5


def test_orders_longer_than_a_block(rows: Factory, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = starts_of_an_epoch(TokenDataset(rows(600), context_length=4, batch_size=1))
    monkeypatch.setattr("minillm.data.dataset.BLOCK", 10)
    assert starts_of_an_epoch(TokenDataset(rows(600), context_length=4, batch_size=1)) == whole


def test_splits_and_counts(tmp_path: Path, byte_tokenizer: Any) -> None:
    documents = [f"Straße {number} " * (number % 7 + 1) for number in range(50)]
    folder = TokenDataset.write(tmp_path / "data", documents, byte_tokenizer, validation_fraction=0.3, end_of_text=0)
    train = TokenDataset(folder, "train", context_length=8, batch_size=2)
    validation = TokenDataset(folder, "validation", context_length=8, batch_size=2)
    assert train.n_documents + validation.n_documents == 50
    assert train.n_bytes + validation.n_bytes == sum(len(text.encode()) for text in documents)
    for data in (train, validation):
        assert data.n_tokens == data.n_bytes + data.n_documents  # byte tokens, and one separator a document
        assert data.end_of_text == 0
    tokens = torch.cat([row.flatten() for row, _ in validation.evaluation_batches()]).tolist()
    pieces = bytes(tokens).decode().split("\0")  # the inputs are all tokens but the last, which is a separator
    assert len(pieces) == validation.n_documents
    assert set(pieces) <= set(documents)


def test_bad_arguments_are_refused(rows: Factory, tmp_path: Path) -> None:
    folder = rows(150)
    for arguments, message in (
        ({"split": "test"}, "split must be one of 'train', 'validation', got 'test'"),
        ({"context_length": 150}, "context_length must be at most 149 for the train split"),
        ({"split": "validation"}, "validation split of .* has 0 tokens"),
        ({"context_length": 0}, "context_length must be an integer of at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        ({"world_size": 3}, "world_size must divide batch_size 4, got 3"),
        ({"context_length": 8.5}, "context_length must be an integer of at least 1, got 8.5"),
        ({"world_size": 0}, "world_size must be an integer of at least 1, got 0"),
        ({"seed": "0"}, "seed must be an integer, got '0'"),
        ({"rank": 1}, r"rank must be in 0 \.\. 0, got 1"),
        ({"tokenizer": CharactersOnly()}, "written with another tokenizer"),
    ):
        with pytest.raises(ValueError, match=message):
            TokenDataset(folder, **{"context_length": 8, "batch_size": 4} | arguments)  # type: ignore[arg-type]
    TokenDataset(folder, context_length=8, batch_size=4, tokenizer=CountingTokenizer())
    with pytest.raises(DatasetError, match="holds no token dataset"):
        TokenDataset(tmp_path, context_length=8, batch_size=4)
    with pytest.raises(DatasetError, match="holds no token dataset"):
        TokenDataset(folder / "index.json", context_length=8, batch_size=4)
    with pytest.raises(ValueError, match="max_batches must be at least 1"):
        next(TokenDataset(folder, context_length=8, batch_size=4).evaluation_batches(max_batches=0))


class CharactersOnly(CountingTokenizer):
    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_a_state_from_elsewhere_is_refused(rows: Factory) -> None:
    data = TokenDataset(rows(150), context_length=8, batch_size=4)
    good = data.state_dict()
    for change, message in (
        ({"dataset": TokenDataset(rows(600), context_length=8, batch_size=4).fingerprint}, "saved with dataset"),
        ({"context_length": 9}, "saved with context_length 9, this dataset has 8"),
        ({"seed": 1}, "saved with seed 1"),
        ({"split": "validation"}, "saved with split"),
        ({"position": 10**6}, "position must be in"),
        ({"position": -1}, "position must be in"),
        ({"epoch": 0.5}, "must be integers"),
        ({"extra": 1}, "state must be a dict with the keys"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load_state_dict(good | change)
    with pytest.raises(ValueError, match="state must be a dict"):
        data.load_state_dict(None)  # type: ignore[arg-type]
    assert data.state_dict() == good


def test_the_tokens_are_mapped_not_read(rows: Factory) -> None:
    data = TokenDataset(rows(600, 91), context_length=8, batch_size=4)
    for shard in data._shards:
        base = shard
        while not isinstance(base, np.memmap):
            assert base.base is not None
            base = base.base
        assert not shard.flags.writeable
