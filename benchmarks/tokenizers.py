"""WordPiece, Unigram and SentencePiece: training and encoding beside `tokenizers` and `sentencepiece`, and the memory
that training takes. (Byte-level BPE has benchmarks/bpe.py.)

    python benchmarks/tokenizers.py
    python benchmarks/tokenizers.py --kinds unigram --slow     also tokenizers' Unigram trainer: many minutes

One thread, CPU time, the contestants taken in turn, several rounds.

    training   from the texts, fed in pieces of 8 kB, to a tokenizer
    first      encoding all documents, one by one, with a tokenizer that has just been loaded: its cache is empty
    again      encoding them once more
    memory     by how much training raises the process's peak memory, each in a process of its own that reads the
               pieces one by one from a file

In a round of encoding all have the vocabulary that minillm has learned, and their ids must be equal. The exception is
how `tokenizers` reads SentencePiece models (it takes "<s>" in a text for the piece, and breaks ties in double
precision): there the share of documents with equal ids is told. Of trainers, the share of the vocabulary that a peer
has learned too is told, and how many tokens each makes of the documents.
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # where this file would hide the library of the same name

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
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from io import BytesIO
from typing import Any

import psutil
import sentencepiece
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minillm.tokenizers import SentencePieceTokenizer, UnigramTokenizer, WordPieceTokenizer, load_tokenizer

Texts = Iterable[str]
Encode = Callable[[str], list[int]]
BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PIECE_BYTES = 8192


def read_documents(corpus: str, n_bytes: int) -> list[str]:
    """Whole documents from the start of the corpus, until there are so many bytes."""
    from minillm.data import load_corpus  # not at the top: it loads PyTorch, beside which no tokenizer's memory shows

    sizes = itertools.accumulate(len(document.encode()) for document in load_corpus(corpus))
    return [document for document, size in zip(load_corpus(corpus), sizes, strict=True) if size <= n_bytes]


def cut(documents: Texts, n_bytes: int = PIECE_BYTES) -> Iterator[str]:
    """The documents in pieces of about so many bytes, cut at the ends of lines."""
    for document in documents:
        piece: list[str] = []
        size = 0
        for line in document.splitlines(keepends=True):
            piece.append(line)
            size += len(line.encode())
            if size >= n_bytes:
                yield "".join(piece)
                piece, size = [], 0
        if piece:
            yield "".join(piece)


def wordpiece_tokenizers(texts: Texts, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=BERT_SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def unigram_tokenizers(texts: Texts, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_sentencepiece(texts: Texts, vocab_size: int, kind: str) -> bytes:
    """The .model file; the library takes lines."""
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines()),
        model_writer=model,
        model_type=kind,
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


TRAINERS: dict[str, dict[str, Callable[[Texts, int], Any]]] = {
    "wordpiece": {
        "minillm": WordPieceTokenizer.train,
        "minillm, by frequency": lambda texts, size: WordPieceTokenizer.train(texts, size, score="frequency"),
        "tokenizers": wordpiece_tokenizers,
    },
    "unigram": {
        "minillm": UnigramTokenizer.train,
        "sentencepiece": lambda texts, size: train_sentencepiece(texts, size, "unigram"),
        "tokenizers": unigram_tokenizers,
    },
    "sentencepiece-unigram": {
        "minillm": lambda texts, size: SentencePieceTokenizer.train(texts, size, model="unigram"),
        "sentencepiece": lambda texts, size: train_sentencepiece(texts, size, "unigram"),
    },
    "sentencepiece-bpe": {
        "minillm": lambda texts, size: SentencePieceTokenizer.train(texts, size, model="bpe"),
        "sentencepiece": lambda texts, size: train_sentencepiece(texts, size, "bpe"),
    },
}
SLOW = ("unigram", "tokenizers")
SENTENCEPIECE = ("sentencepiece-unigram", "sentencepiece-bpe")


def vocabulary(trained: Any) -> set[str]:
    if isinstance(trained, bytes):
        processor = sentencepiece.SentencePieceProcessor(model_proto=trained)
        return {processor.id_to_piece(i) for i in range(processor.vocab_size())}
    if isinstance(trained, Tokenizer):
        return set(trained.get_vocab())
    return {trained.id_to_token(i) for i in range(trained.vocab_size)}


def encoder(trained: Any) -> Encode:
    if isinstance(trained, bytes):
        return sentencepiece.SentencePieceProcessor(model_proto=trained).encode
    if isinstance(trained, Tokenizer):
        return lambda text: trained.encode(text, add_special_tokens=False).ids
    return trained.encode


def encoders(kind: str, folder: Path) -> dict[str, Callable[[], Encode]]:
    """By contestant: what loads a fresh encoder with the vocabulary that minillm learned."""
    file, model_file = str(folder / "minillm.json"), folder / "minillm.model"
    if kind not in SENTENCEPIECE:
        return {
            "minillm": lambda: load_tokenizer(file).encode,
            "tokenizers": lambda: encoder(Tokenizer.from_file(file)),
        }
    return {
        "minillm": lambda: SentencePieceTokenizer.from_model_file(model_file).encode,
        "sentencepiece": lambda: encoder(model_file.read_bytes()),
        "tokenizers": lambda: encoder(Tokenizer.from_file(file)),
    }


def training_memory(kind: str, name: str, file: Path, vocab_size: int, results: Any) -> None:
    """Runs in a process of its own: puts the MiB by which training raised the peak into the queue."""
    one_thread()
    before = psutil.Process().memory_info().rss
    with file.open(encoding="utf-8") as lines:
        TRAINERS[kind][name](map(json.loads, lines), vocab_size)
    results.put((peak_memory() - before) / 2**20)


def peak_memory() -> int:
    """The largest resident size so far, in bytes."""
    if sys.platform == "linux":  # where getrusage's peak begins with that of the process that started this one
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def one_thread() -> None:
    os.environ.update(RAYON_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def benchmark(kind: str, documents: list[str], vocab_size: int, rounds: int, slow: bool) -> dict[str, Any]:
    names = [name for name in TRAINERS[kind] if slow or (kind, name) != SLOW]
    pieces = list(cut(documents))
    seconds: dict[str, dict[str, list[float]]] = {"training": {}, "first": {}, "again": {}}
    learned: dict[str, Any] = {}
    equal_documents: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name_of_folder:
        folder = Path(name_of_folder)
        for _ in range(rounds):
            for name in names:
                spent, learned[name] = timed(lambda name=name: TRAINERS[kind][name](pieces, vocab_size))
                seconds["training"].setdefault(name, []).append(spent)
            learned["minillm"].save(folder / "minillm.json")
            if kind in SENTENCEPIECE:
                learned["minillm"].save_model_file(folder / "minillm.model")
            equal: dict[str, list[list[int]]] = {}
            for name, make in encoders(kind, folder).items():
                encode = make()
                for row in ("first", "again"):
                    spent, ids = timed(lambda encode=encode: [encode(document) for document in documents])
                    seconds[row].setdefault(name, []).append(spent)
                equal.setdefault("minillm", ids)
                same = sum(map(list.__eq__, equal["minillm"], ids))
                equal_documents[name] = round(same / len(documents), 4)
                assert same == len(documents) or (kind in SENTENCEPIECE and name == "tokenizers"), name
                del ids
        (folder / "pieces.jsonl").write_text("\n".join(map(json.dumps, pieces)), encoding="utf-8")
        memory = {name: memory_of(kind, name, folder / "pieces.jsonl", vocab_size) for name in names}
    ours = vocabulary(learned["minillm"])
    return {
        "vocab_size": vocab_size,
        "megabytes": round(sum(len(document.encode()) for document in documents) / 1e6, 3),
        "cpu_seconds": {row: {name: spread(values) for name, values in by.items()} for row, by in seconds.items()},
        "training_memory_mib": memory,
        "share_of_documents_with_equal_ids": equal_documents,
        "n_tokens": {name: sum(len(encoder(learned[name])(text)) for text in documents) for name in names},
        "share_of_vocabulary_in_common": {
            name: round(len(ours & vocabulary(learned[name])) / len(ours), 4) for name in names if name != "minillm"
        },
    }


def memory_of(kind: str, name: str, file: Path, vocab_size: int) -> float:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    child = context.Process(target=training_memory, args=(kind, name, file, vocab_size, results))
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"measuring the memory of {name} ended with {child.exitcode}")
    return round(float(results.get()), 1)


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def report(kind: str, result: dict[str, Any]) -> None:
    size = result["megabytes"]
    print(f"\n{kind}: {size} MB, vocabulary {result['vocab_size']}")
    print(
        f"{'':10}{'':24}{'CPU s':>8}{'min':>8}{'max':>8}{'MB/s':>8}{'minillm is':>16}{'memory MiB':>12}{'tokens':>11}"
    )
    for row, by_name in result["cpu_seconds"].items():
        for name, spent in by_name.items():
            ratio = f"{spent['median'] / by_name['minillm']['median']:.2f}x as fast" if name != "minillm" else ""
            training = row == "training"
            memory = f"{result['training_memory_mib'][name]:.0f}" if training else ""
            tokens = f"{result['n_tokens'][name]:,}" if training else ""
            columns = "".join(f"{spent[key]:8.2f}" for key in ("median", "min", "max"))
            print(f"{row:10}{name:24}{columns}{size / spent['median']:8.2f}{ratio:>16}{memory:>12}{tokens:>11}")
    for name, share in result["share_of_documents_with_equal_ids"].items():
        if share < 1:
            print(f"{share:.1%} of the documents have the same ids in {name}")
    for name, share in result["share_of_vocabulary_in_common"].items():
        print(f"{share:.1%} of minillm's tokens are also those of {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(TRAINERS), choices=list(TRAINERS))
    parser.add_argument("--corpus", default="python-stdlib", help="a name or a path, as minillm.data.load_corpus takes")
    parser.add_argument("--bytes", type=int, default=10_000_000)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--slow", action="store_true", help="with tokenizers' Unigram trainer")
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    arguments = parser.parse_args()
    one_thread()
    documents = read_documents(arguments.corpus, arguments.bytes)
    kinds = {}
    for kind in arguments.kinds:
        kinds[kind] = benchmark(kind, documents, arguments.vocab_size, arguments.rounds, arguments.slow)
        report(kind, kinds[kind])
    result = {
        "benchmark": "tokenizers",
        "python": platform.python_version(),
        "tokenizers": version("tokenizers"),
        "sentencepiece": version("sentencepiece"),
        "machine": platform.machine(),
        "corpus": arguments.corpus,
        "rounds": arguments.rounds,
        "kinds": kinds,
    }
    line = json.dumps(result)
    print(f"\n{line}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
