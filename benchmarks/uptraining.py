"""Uptraining (Ainslie et al. 2023, section 2.1): how much of the loss comes back after 5 % of the original steps?

    python benchmarks/uptraining.py --output benchmarks/results/uptraining.json    ten minutes on one quiet core
    python benchmarks/uptraining.py --quick                                        less than half a minute, one seed

A multi-head model is trained. Its key and value heads are merged into fewer, in three ways (`convert_kv_heads`), and
each result is trained on, on the same next batches and with the same recipe, whose rate therefore does not fade out
before the conversion. Validation losses are measured right after the conversion and on the way. Beside them stand the
original trained on likewise (what more training alone brings) and models that had the few heads from the start.

The text is the built-in documentation of Python. Everything follows from the seeds: the initial weights, the order of
the batches, the heads drawn at random.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import torch

from minillm.data import TokenDataset, load_corpus
from minillm.models import Transformer, TransformerConfig, convert_kv_heads
from minillm.models.uptraining import Method
from minillm.tokenizers import ByteBPETokenizer
from minillm.training import Trainer, TrainingConfig

METHODS: tuple[Method, ...] = ("mean", "first", "random")
VOCABULARY, CONTEXT, BATCH, RATE = 512, 64, 16, 2e-3
EVALUATION_BATCHES = 16
PERCENT_BETWEEN_EVALUATIONS, PERCENT_IN_ALL = 2.5, 10.0


def write_data(folder: Path) -> None:
    corpus = load_corpus("python-docs")
    tokenizer = ByteBPETokenizer.train(corpus, VOCABULARY, special_tokens=["<|endoftext|>"])
    TokenDataset.write(folder, corpus, tokenizer, end_of_text=tokenizer.special_tokens["<|endoftext|>"])


def new_trainer(model: Transformer, folder: Path, seed: int, steps: int, warmup_steps: int, every: int) -> Trainer:
    """One recipe for the original training and for uptraining: AdamW at a constant rate, after warm-up."""
    settings = TrainingConfig(
        max_steps=steps,
        learning_rate=RATE,
        min_learning_rate=RATE,
        warmup_steps=warmup_steps,
        eval_every=every,
        eval_batches=EVALUATION_BATCHES,
        log_every=100,
        precision="fp32",
        device="cpu",
        seed=seed,
    )
    train_data, validation_data = (
        TokenDataset(folder, split, context_length=CONTEXT, batch_size=BATCH, seed=seed)
        for split in ("train", "validation")
    )
    return Trainer(model, train_data, validation_data, settings, progress=False)


def train(config: TransformerConfig, folder: Path, steps: int, seed: int) -> Trainer:
    """Train a new model."""
    torch.manual_seed(seed)
    trainer = new_trainer(Transformer(config), folder, seed, steps, steps // 12, steps)
    trainer.train()
    return trainer


def uptrain(model: Transformer, original: Trainer, folder: Path, original_steps: int, seed: int) -> dict[str, float]:
    """Train `model` on from where `original` stopped; validation losses by percent of the original's steps.

    The data go on, and so do Adam's moments of all parameters but the merged ones: with all moments gone, the first
    steps would harm the model more than the conversion's repair could show.
    """
    steps = round(original_steps * PERCENT_IN_ALL / 100)
    every = round(original_steps * PERCENT_BETWEEN_EVALUATIONS / 100)
    trainer = new_trainer(model, folder, seed, steps, 0, every)
    trainer.train_data.load_state_dict(original.train_data.state_dict())
    before = dict(original.model.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.shape == before[name].shape:
            trainer.optimizer.state[parameter] = copy.deepcopy(original.optimizer.state[before[name]])
    losses = {"0": trainer.evaluate()}
    for line in trainer.train().history:
        if "validation_loss" in line:
            losses[f"{100 * line['step'] / original_steps:g}"] = line["validation_loss"]
    return losses


def experiment(
    config: TransformerConfig, targets: list[int], folder: Path, steps: int, seed: int, from_scratch: bool
) -> dict[str, Any]:
    """One seed: each conversion's losses by percent, and the losses of models that had few heads from the start."""
    original = train(config, folder, steps, seed)
    model = cast(Transformer, original.model)
    curves = {"MHA": uptrain(copy.deepcopy(model), original, folder, steps, seed)}
    for n_kv_heads in targets:
        for method in METHODS:
            converted = convert_kv_heads(model, n_kv_heads, method=method, seed=seed)
            curves[f"{n_kv_heads} {method}"] = uptrain(converted, original, folder, steps, seed)
    scratch = {}
    for n_kv_heads in targets if from_scratch else []:
        scratch[str(n_kv_heads)] = train(config.replace(n_kv_heads=n_kv_heads), folder, steps, seed).evaluate()
    return {"seed": seed, "original": original.evaluate(), "curves": curves, "from_scratch": scratch}


def recovered(run: dict[str, Any], name: str, percent: str) -> float:
    """The share of the loss added by the conversion that is gone; 1 is the original trained on for as long."""
    curve, control = run["curves"][name], run["curves"]["MHA"]
    return float(1 - (curve[percent] - control[percent]) / (curve["0"] - control["0"]))


def spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    names = list(runs[0]["curves"])
    percents = list(runs[0]["curves"]["MHA"])
    return {
        "original": spread([run["original"] for run in runs]),
        "from_scratch": {
            heads: spread([run["from_scratch"][heads] for run in runs]) for heads in runs[0]["from_scratch"]
        },
        "curves": {name: {p: spread([run["curves"][name][p] for run in runs]) for p in percents} for name in names},
        "recovered": {
            name: {p: spread([recovered(run, name, p) for run in runs]) for p in percents[1:]}
            for name in names
            if name != "MHA"
        },
    }


def show(summary: dict[str, Any]) -> None:
    percents = list(summary["curves"]["MHA"])
    print(f"\n{'key heads, method':20}" + "".join(f"{p + ' %':>10}" for p in percents) + f"{'back after 5 %':>24}")
    for name, curve in summary["curves"].items():
        line = f"{name:20}" + "".join(f"{curve[p]['mean']:10.3f}" for p in percents)
        if name in summary["recovered"]:
            back = summary["recovered"][name]["5"]
            line += f"{back['mean']:12.0%} ({back['min']:.0%}-{back['max']:.0%})"
        print(line)
    for heads, loss in summary["from_scratch"].items():
        print(f"{heads} from scratch: {loss['mean']:.3f} ({loss['min']:.3f}-{loss['max']:.3f})")
    original = summary["original"]
    print(f"original: {original['mean']:.3f} ({original['min']:.3f}-{original['max']:.3f}) nats per token")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two layers, 240 steps, one seed, nothing from scratch")
    parser.add_argument("--steps", type=int, help="of the original training, a multiple of 40")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = arguments.steps or (240 if arguments.quick else 600)
    seeds = arguments.seeds or ([0] if arguments.quick else [0, 1, 2])
    if steps % 40:
        parser.error(f"--steps must be a multiple of 40, so that 2.5 % are whole steps, got {steps}")
    config = TransformerConfig(
        vocab_size=VOCABULARY,
        context_length=CONTEXT,
        d_model=128,
        n_layers=2 if arguments.quick else 3,
        n_heads=8,
        positions="rope",
    )
    start = time.process_time()
    runs = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        write_data(folder)
        tokens = TokenDataset(folder, "train", context_length=CONTEXT, batch_size=BATCH).n_tokens
        for seed in seeds:
            runs.append(experiment(config, [2, 1], folder, steps, seed, not arguments.quick))
            print(f"seed {seed}: {time.process_time() - start:.0f} s of CPU time so far", flush=True)
    summary = summarize(runs)
    show(summary)
    result = {
        "benchmark": "uptraining",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": platform.machine(),
        "cpu_seconds": round(time.process_time() - start),
        "config": {"n_layers": config.n_layers, "n_heads": config.n_heads, "d_model": config.d_model},
        "vocabulary": VOCABULARY,
        "context_length": CONTEXT,
        "batch_size": BATCH,
        "steps": steps,
        "train_tokens": tokens,
        "tokens_seen": steps * CONTEXT * BATCH,
        "learning_rate": RATE,
        "summary": summary,
        "runs": runs,
    }
    line = json.dumps(result)
    print(f"\n{line}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
