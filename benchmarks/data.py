"""Loading speed: batches from TokenDataset and from two usual loaders over the same memory-mapped file.

    python benchmarks/data.py

One thread, CPU time, the loaders taken in turn, median of several rounds:
    DataLoader     torch.utils.data.DataLoader in this process, a map-style dataset of the same windows, shuffled
    stacked        windows at random places (with repetition), cut one by one and stacked, as minimal scripts do

The file is in the page cache: what is compared is the work of the loaders, not the disk.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from minillm.data import TokenDataset

# batch_size, context_length
SHAPES = {"small": (12, 64), "medium": (8, 256), "gpt2-small": (16, 1024), "wide": (256, 128)}
VOCAB_SIZE = 50257


class IdsOfWords:
    """Text to ids by the shortest way, so that writing the file takes no time."""

    vocab_size = VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class Windows(Dataset[tuple[Tensor, Tensor]]):
    def __init__(self, tokens: npt.NDArray[np.uint16], context_length: int) -> None:
        self.tokens, self.context_length = tokens, context_length

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context_length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        start = index * self.context_length
        window = torch.from_numpy(self.tokens[start : start + self.context_length + 1].astype(np.int64))
        return window[:-1], window[1:]


def stacked(tokens: npt.NDArray[np.uint16], batch_size: int, context_length: int) -> tuple[Tensor, Tensor]:
    places = torch.randint(len(tokens) - context_length, (batch_size,)).tolist()
    inputs = [torch.from_numpy(tokens[at : at + context_length].astype(np.int64)) for at in places]
    targets = [torch.from_numpy(tokens[at + 1 : at + 1 + context_length].astype(np.int64)) for at in places]
    return torch.stack(inputs), torch.stack(targets)


def benchmark(folder: Path, batch_size: int, context_length: int, rounds: int) -> dict[str, float]:
    """CPU microseconds for a batch, by loader."""
    data = TokenDataset(folder, context_length=context_length, batch_size=batch_size)
    tokens = np.memmap(folder / "train_00000.bin", dtype="<u2", mode="r")

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(Windows(tokens, context_length), batch_size=batch_size, shuffle=True, drop_last=True)
        while True:
            yield from loader

    batches = endless()
    loaders: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "minillm": data.next_batch,
        "DataLoader": lambda: next(batches),
        "stacked": lambda: stacked(tokens, batch_size, context_length),
    }
    for load in loaders.values():
        inputs, targets = load()
        assert inputs.shape == targets.shape == (batch_size, context_length)
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
    steps = max(20, 400_000 // (batch_size * context_length))
    times: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(rounds):
        for name, load in loaders.items():
            start = time.process_time()
            for _ in range(steps):
                load()
            times[name].append((time.process_time() - start) / steps * 1e6)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as parent:
        documents = (" ".join(map(str, generator.integers(VOCAB_SIZE, size=10_000))) for _ in range(500))
        folder = TokenDataset.write(Path(parent) / "data", documents, IdsOfWords(), validation_fraction=0)
        shapes = {name: benchmark(folder, *SHAPES[name], arguments.rounds) for name in arguments.shapes}
    print(
        f"{'':12}{'batch':>7}{'context':>9}{'minillm':>12}{'DataLoader':>12}{'stacked':>12}   CPU microseconds a batch"
    )
    for name, times in shapes.items():
        columns = "".join(f"{times[loader]:12,.0f}" for loader in ("minillm", "DataLoader", "stacked"))
        print(f"{name:12}{SHAPES[name][0]:7}{SHAPES[name][1]:9}{columns}")
    result = {
        "benchmark": "data",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rounds": arguments.rounds,
        "microseconds_per_batch": {
            name: {loader: round(value, 1) for loader, value in times.items()} for name, times in shapes.items()
        },
    }
    line = json.dumps(result)
    print(f"\n{line}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
