"""Byte-level BPE: training and encoding speed beside `tokenizers` and `tiktoken`, and the memory that training takes.

    python benchmarks/bpe.py

One thread, CPU time, the contestants taken in turn, several rounds. All are fed the same documents one by one, all
must give equal merges and equal ids. tiktoken cannot train; it is given the vocabulary learned here.

    training   from the texts to a tokenizer
    first      encoding all documents with a tokenizer that has just been made: its cache is empty
    again      encoding them once more
    memory     by how much training raises the process's peak memory, each in a process of its own that reads the
               documents one by one from a file
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # where tokenizers.py, which stands beside this file, would hide the library of that name

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

import psutil
import tiktoken
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from minillm.tokenizers import ByteBPETokenizer
from minillm.tokenizers.split_patterns import SPLIT_PATTERNS

CASES = {"stdlib": ("python-stdlib", 10_000_000, 32768), "docs": ("python-docs", 10_000_000, 8192)}
Encode = Callable[[str], list[int]]


def read_documents(corpus: str, n_bytes: int) -> list[str]:
    """Whole documents from the start of the corpus, until there are so many bytes."""
    from minillm.data import load_corpus  # not at the top: it loads PyTorch, beside which no tokenizer's memory shows

    sizes = itertools.accumulate(len(document.encode()) for document in load_corpus(corpus))
    return [document for document, size in zip(load_corpus(corpus), sizes, strict=True) if size <= n_bytes]


def train_minillm(documents: Iterable[str], vocab_size: int, pattern: str) -> ByteBPETokenizer:
    return ByteBPETokenizer.train(documents, vocab_size, pattern=pattern)


def train_tokenizers(documents: Iterable[str], vocab_size: int, pattern: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERNS[pattern].published), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == "gpt2")
    tokenizer.pre_tokenizer = byte_level if pattern == "gpt2" else pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


TRAINERS: dict[str, Callable[[Iterable[str], int, str], Any]] = {
    "minillm": train_minillm,
    "tokenizers": train_tokenizers,
}


def encoders(file: Path) -> dict[str, Callable[[], Encode]]:
    """By contestant: what makes a fresh encoder with the vocabulary of the tokenizer.json."""
    ours = ByteBPETokenizer.load(file)
    # tiktoken's id of a token is also the rank of its merge, which is so here: no special tokens, merges by id.
    ranks = {ours.token_bytes(i): i for i in range(ours.vocab_size)}
    expression = SPLIT_PATTERNS[ours.pattern].published

    def with_tokenizers() -> Encode:
        tokenizer = Tokenizer.from_file(str(file))
        return lambda text: tokenizer.encode(text).ids

    def with_tiktoken() -> Encode:
        return tiktoken.Encoding("bench", pat_str=expression, mergeable_ranks=ranks, special_tokens={}).encode_ordinary

    return {
        "minillm": lambda: ByteBPETokenizer.load(file).encode,
        "tokenizers": with_tokenizers,
        "tiktoken": with_tiktoken,
    }


def training_memory(name: str, file: Path, vocab_size: int, pattern: str, results: Any) -> None:
    """Runs in a process of its own: puts the MiB by which training raised the peak into the queue."""
    one_thread()
    process = psutil.Process()
    before = process.memory_info().rss
    with file.open(encoding="utf-8") as lines:
        TRAINERS[name](map(json.loads, lines), vocab_size, pattern)
    results.put((peak_memory() - before) / 2**20)


def peak_memory() -> int:
    """The largest resident size so far, in bytes."""
    if sys.platform == "linux":  # where getrusage's peak begins with that of the process that started this one
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def one_thread() -> None:
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def benchmark(case: tuple[str, int, int], pattern: str, rounds: int, folder: Path) -> dict[str, Any]:
    documents = read_documents(*case[:2])
    seconds: dict[str, dict[str, list[float]]] = {"training": {}, "first": {}, "again": {}}
    for _ in range(rounds):
        for name, train in TRAINERS.items():
            spent, tokenizer = timed(lambda train=train: train(documents, case[2], pattern))
            seconds["training"].setdefault(name, []).append(spent)
            tokenizer.save(str(folder / f"{name}.json"))
        saved = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["model"] for name in TRAINERS]
        assert saved[0] == saved[1], "the two trainers disagree"
        ids = {}
        for name, make in encoders(folder / "minillm.json").items():
            encode = make()
            for row in ("first", "again"):
                spent, ids[name] = timed(lambda encode=encode: [encode(document) for document in documents])
                seconds[row].setdefault(name, []).append(spent)
            assert ids[name] == ids["minillm"], f"{name} encodes differently"
            ids = {"minillm": ids["minillm"]}
    memory = {}
    (folder / "documents.jsonl").write_text("\n".join(map(json.dumps, documents)), encoding="utf-8")
    for name in TRAINERS:
        context = multiprocessing.get_context("spawn")
        results = context.SimpleQueue()
        child = context.Process(
            target=training_memory, args=(name, folder / "documents.jsonl", case[2], pattern, results)
        )
        child.start()
        child.join()
        memory[name] = round(results.get(), 1)
    return {
        "corpus": case[0],
        "megabytes": round(sum(len(document.encode()) for document in documents) / 1e6, 3),
        "vocab_size": case[2],
        "n_tokens": sum(map(len, ids["minillm"])),
        "cpu_seconds": {
            row: {
                name: {
                    "median": round(statistics.median(values), 4),
                    "min": round(min(values), 4),
                    "max": round(max(values), 4),
                }
                for name, values in by_name.items()
            }
            for row, by_name in seconds.items()
        },
        "training_memory_mib": memory,
    }


def report(result: dict[str, Any]) -> None:
    size = result["megabytes"]
    print(f"\n{result['corpus']}: {size} MB, vocabulary {result['vocab_size']}, {result['n_tokens']:,} tokens")
    print(f"{'':10}{'':14}{'CPU s':>8}{'min':>8}{'max':>8}{'MB/s':>8}{'minillm is':>16}{'memory MiB':>13}")
    for row, by_name in result["cpu_seconds"].items():
        for name, spent in by_name.items():
            ratio = f"{spent['median'] / by_name['minillm']['median']:.2f}x as fast" if name != "minillm" else ""
            memory = f"{result['training_memory_mib'][name]:.0f}" if row == "training" else ""
            columns = "".join(f"{spent[key]:8.3f}" for key in ("median", "min", "max"))
            print(f"{row:10}{name:14}{columns}{size / spent['median']:8.2f}{ratio:>16}{memory:>13}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--pattern", default="gpt2", choices=list(SPLIT_PATTERNS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    arguments = parser.parse_args()
    one_thread()
    cases = {}
    for name in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            cases[name] = benchmark(CASES[name], arguments.pattern, arguments.rounds, Path(folder))
        report(cases[name])
    result = {
        "benchmark": "bpe",
        "python": platform.python_version(),
        "tokenizers": version("tokenizers"),
        "tiktoken": version("tiktoken"),
        "machine": platform.machine(),
        "pattern": arguments.pattern,
        "rounds": arguments.rounds,
        "cases": cases,
    }
    line = json.dumps(result)
    print(f"\n{line}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
