"""Generation speed: ``minillm.inference.generate`` against transformers' ``generate`` with its cache, the same weights.

Shape: 6 layers, 6 heads, width 384, vocabulary 65; 64 prompt tokens and 256 new ones, float32, one thread. The two take
turns in one process; the time is the process's own CPU time, so other work on the machine disturbs it little. Both
sides' greedy output must be equal before anything is timed; what is timed is sampling at temperature 1 with top-k 40.

    python benchmarks/generation.py [--rounds 5] [--batches 1 16] [--json FILE]

Prints a table and one JSON line.
"""

import sys
from pathlib import Path

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # where tokenizers.py, which stands beside this file, would hide the library of that name

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers

from minillm.inference import generate
from minillm.models import Transformer, TransformerConfig, huggingface

PROMPT, NEW = 64, 256
CONFIG = TransformerConfig(vocab_size=65, context_length=PROMPT + NEW, d_model=384, n_layers=6, n_heads=6)


def contenders(model: Transformer, batch: int) -> dict[str, Callable[[], object]]:
    """What is timed, by name; refuses to time models that do not agree."""
    theirs = huggingface.to_transformers(model).eval()
    tokens = torch.randint(0, CONFIG.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(1))
    rows, mask = tokens.tolist(), torch.ones_like(tokens)
    common = {"attention_mask": mask, "min_new_tokens": NEW, "max_new_tokens": NEW, "pad_token_id": 0}
    greedy = theirs.generate(tokens, **common, do_sample=False)[:, PROMPT:].tolist()
    if generate(model, rows, max_new_tokens=NEW, temperature=0) != greedy:
        raise RuntimeError("minillm and transformers generate different tokens: nothing to compare")
    return {
        "minillm": lambda: generate(model, rows, max_new_tokens=NEW, top_k=40, seed=0),
        "transformers": lambda: theirs.generate(tokens, **common, do_sample=True, top_k=40),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16], help="batch sizes (default: 1 16)")
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    model = Transformer(CONFIG.replace(initializer_std=0.1)).eval()

    results = []
    print(f"{'batch':>5}  {'':12}  {'tokens per CPU-second':>21}  {'min':>6}  {'max':>6}  {'ratio':>6}")
    for batch in arguments.batches:
        runs = contenders(model, batch)
        speeds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                start = time.process_time()
                run()
                speeds[name].append(batch * NEW / (time.process_time() - start))
        medians = {name: statistics.median(values) for name, values in speeds.items()}
        for name, values in speeds.items():
            ratio = f"{medians['minillm'] / medians[name]:6.2f}"
            print(f"{batch:>5}  {name:12}  {medians[name]:>21.0f}  {min(values):>6.0f}  {max(values):>6.0f}  {ratio}")
        results.append(
            {"batch": batch, "tokens_per_cpu_second": {k: [round(v, 1) for v in s] for k, s in speeds.items()}}
        )
    line = {
        "benchmark": "generation",
        "shape": {"n_layers": 6, "n_heads": 6, "d_model": 384, "vocab_size": 65, "prompt": PROMPT, "new": NEW},
        "dtype": "float32",
        "threads": 1,
        "machine": {"machine": platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "results": results,
    }
    print(json.dumps(line))
    if arguments.json:
        arguments.json.write_text(json.dumps(line) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
