"""Training speed: one step (batch, forward, backward, clipping, AdamW) of minillm's Trainer and of two peers.

    python benchmarks/training.py                    CPU, one thread, CPU time
    python benchmarks/training.py --threads 2        CPU, wall time: only on a machine that does nothing else
    python benchmarks/training.py --compile --device cuda --shapes small medium gpt2-small

The peers, in the same process, taken in turn, each in the way it is commonly run:
    minimal        a GPT training step in the style of the well-known minimal scripts, written out below: windows drawn
                   at random and stacked, one module a layer, torch.optim.AdamW as it comes (fused on CUDA)
    transformers   GPT2LMHeadModel of the same shape (it always has biases), with its own loss and torch.optim.AdamW

The small shape is the documented CPU set-up of those scripts: characters of Shakespeare, 4 layers, 4 heads, width 128,
context 64, batch 12, no dropout, no biases. The text's content does not change the speed, so random characters do.
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # where tokenizers.py, which stands beside this file, would hide the library of that name

import argparse
import json
import math
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from minillm.costs import training_flops
from minillm.data import TokenDataset
from minillm.kernels.ceilings import measure_ceilings
from minillm.models import Transformer, TransformerConfig
from minillm.training import Trainer, TrainingConfig

# n_layers, n_heads, d_model, context_length, batch_size, vocab_size
SHAPES = {
    "small": (4, 4, 128, 64, 12, 65),
    "medium": (6, 6, 384, 256, 8, 65),
    "gpt2-small": (12, 12, 768, 1024, 16, 50304),
}
LEARNING_RATE, WEIGHT_DECAY, BETAS, GRAD_CLIP = 1e-3, 0.1, (0.9, 0.95), 1.0


class MinimalBlock(nn.Module):
    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.gelu = nn.GELU()
        self.down = nn.Linear(4 * width, width, bias=False)
        self.attention_dropout, self.mlp_dropout = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        parts = self.qkv(self.norm_1(x)).split(width, dim=2)
        query, key, value = (p.view(batch, seq, self.n_heads, width // self.n_heads).transpose(1, 2) for p in parts)
        attended = F.scaled_dot_product_attention(query, key, value, dropout_p=0.0, is_causal=True)
        attended = attended.transpose(1, 2).contiguous().view(batch, seq, width)
        x = x + self.attention_dropout(self.out(attended))
        return x + self.mlp_dropout(self.down(self.gelu(self.up(self.norm_2(x)))))


class MinimalGPT(nn.Module):
    def __init__(self, n_layers: int, n_heads: int, width: int, context: int, vocab_size: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab_size, width), nn.Embedding(context, width)
        self.dropout = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(MinimalBlock(width, n_heads) for _ in range(n_layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocab_size, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        positions = torch.arange(inputs.size(1), device=inputs.device)
        x = self.dropout(self.tokens(inputs) + self.positions(positions))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)


def draw_batch(shard: Path, batch_size: int, context: int, device: torch.device) -> tuple[Tensor, Tensor]:
    data = np.memmap(shard, dtype=np.uint16, mode="r")
    starts = torch.randint(len(data) - context, (batch_size,))
    inputs = torch.stack([torch.from_numpy(data[i : i + context].astype(np.int64)) for i in starts])
    targets = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + context].astype(np.int64)) for i in starts])
    if device.type == "cuda":
        return inputs.pin_memory().to(device, non_blocking=True), targets.pin_memory().to(device, non_blocking=True)
    return inputs, targets


def peer(
    kind: str, shape: tuple[int, ...], shard: Path, device: torch.device, bf16: bool, compiled: bool
) -> Callable[[], None]:
    """A step of a peer: the next batch is drawn while the device computes, as the minimal scripts do."""
    n_layers, n_heads, width, context, batch_size, vocab_size = shape
    model: nn.Module
    if kind == "minimal":
        model = MinimalGPT(n_layers, n_heads, width, context, vocab_size)
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_positions=context,
                n_embd=width,
                n_layer=n_layers,
                n_head=n_heads,
                activation_function="gelu",
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                use_cache=False,
            )
        )
    model.to(device).train()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    extra = {"fused": True} if device.type == "cuda" else {}
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, **extra)
    forward = torch.compile(model) if compiled else model
    state: dict[str, Any] = {"batch": draw_batch(shard, batch_size, context, device), "step": 0}

    def step() -> None:
        state["step"] += 1
        rate = LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * min(1.0, state["step"] / 10_000)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = state["batch"]
        with torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext():
            loss = forward(inputs, targets) if kind == "minimal" else forward(inputs, labels=inputs).loss
        state["batch"] = draw_batch(shard, batch_size, context, device)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def ours(shape: tuple[int, ...], folder: Path, device: torch.device, bf16: bool, compiled: bool) -> Callable[[], None]:
    config = TrainingConfig(
        max_steps=10_000,
        learning_rate=LEARNING_RATE,
        warmup_steps=0,
        weight_decay=WEIGHT_DECAY,
        betas=BETAS,
        grad_clip=GRAD_CLIP,
        precision="bf16" if bf16 else "fp32",
        compile=compiled,
        device=str(device),
    )
    data = TokenDataset(folder, "train", context_length=shape[3], batch_size=shape[4])
    trainer = Trainer(Transformer(our_config(shape)), data, None, config, progress=False)
    trainer.model.train()
    return trainer.update


def our_config(shape: tuple[int, ...]) -> TransformerConfig:
    n_layers, n_heads, width, context, _, vocab_size = shape
    return TransformerConfig(
        vocab_size=vocab_size, context_length=context, d_model=width, n_layers=n_layers, n_heads=n_heads, bias=False
    )


class Characters:
    """The tokenizer of a text whose characters are the token ids."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def write_data(folder: Path, vocab_size: int) -> Path:
    """About a million tokens, the length of tiny Shakespeare; returns the shard's path."""
    generator = random.Random(0)
    documents = ("".join(chr(generator.randrange(vocab_size)) for _ in range(10_000)) for _ in range(100))
    TokenDataset.write(folder, documents, Characters(vocab_size), validation_fraction=0.0)
    return next(folder.glob("train_*"))


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    contestants: dict[str, Callable[[], None]],
    rounds: int,
    n_steps: int,
    device: torch.device,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Seconds a step, for each contestant one number a round; they take turns within a round."""
    for step in contestants.values():
        for _ in range(3):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, step in contestants.items():
            synchronize(device)
            start = clock()
            for _ in range(n_steps):
                step()
            synchronize(device)
            seconds[name].append((clock() - start) / n_steps)
    return seconds


def benchmark(name: str, arguments: argparse.Namespace, peaks: dict[str, float]) -> dict[str, Any]:
    device = torch.device(arguments.device)
    clock = time.process_time if device.type == "cpu" and arguments.threads == 1 else time.perf_counter
    shape = SHAPES[name]
    _, _, _, context, batch_size, vocab_size = shape
    n_tokens = batch_size * context
    n_steps = arguments.steps or (20 if name == "small" or device.type == "cuda" else 2)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "data"
        shard = write_data(folder, vocab_size)
        contestants = {}
        for precision in ("fp32", "bf16"):
            bf16 = precision == "bf16"
            contestants[f"minillm {precision}"] = ours(shape, folder, device, bf16, False)
            contestants[f"minimal {precision}"] = peer("minimal", shape, shard, device, bf16, False)
            contestants[f"transformers {precision}"] = peer("transformers", shape, shard, device, bf16, False)
            if arguments.compile:
                contestants[f"minillm {precision} compiled"] = ours(shape, folder, device, bf16, True)
                contestants[f"minimal {precision} compiled"] = peer("minimal", shape, shard, device, bf16, True)
        seconds = measure(contestants, arguments.rounds, n_steps, device, clock)
    flops_per_token = training_flops(our_config(shape), n_tokens) / n_tokens
    base = statistics.median(seconds["minimal fp32"])
    rows = {}
    print(f"\n{name}: {shape[0]} layers, {shape[1]} heads, width {shape[2]}, context {context}, batch {batch_size}")
    print(f"{'':28}{'tokens/s':>10}{'min':>10}{'max':>10}{'against minimal fp32':>22}{'share of peak':>15}")
    for contestant, values in seconds.items():
        median = statistics.median(values)
        peak = peaks["bf16" if "bf16" in contestant else "fp32"]
        row = {
            "tokens_per_second": n_tokens / median,
            "slowest": n_tokens / max(values),
            "fastest": n_tokens / min(values),
            "against_minimal_fp32": base / median,
            "share_of_matmul_peak": flops_per_token * n_tokens / median / peak,
        }
        rows[contestant] = {key: round(value, 4) for key, value in row.items()}
        print(
            f"{contestant:28}{row['tokens_per_second']:10,.0f}{row['slowest']:10,.0f}{row['fastest']:10,.0f}"
            f"{row['against_minimal_fp32']:21.2f}x{row['share_of_matmul_peak']:15.0%}"
        )
    return {"tokens_per_step": n_tokens, "training_flops_per_token": flops_per_token, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+", default=["small", "medium"], choices=list(SHAPES))
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; above 1 wall time is measured")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="steps in a round")
    parser.add_argument("--compile", action="store_true", help="also torch.compile: some minutes more")
    parser.add_argument("--output", type=Path, help="also write the JSON line to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    ceilings = measure_ceilings(device, dtypes=[torch.float32, torch.bfloat16])
    peaks = {"fp32": ceilings.flops_per_second[torch.float32], "bf16": ceilings.flops_per_second[torch.bfloat16]}
    print(
        f"torch {torch.__version__}, {arguments.device}, {arguments.threads} thread(s); matrix-product peak: ", end=""
    )
    print(", ".join(f"{precision} {peak / 1e9:,.0f} GFLOP/s" for precision, peak in peaks.items()))
    result = {
        "benchmark": "training",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "matmul_peak_flops": {precision: round(peak) for precision, peak in peaks.items()},
        "shapes": {name: benchmark(name, arguments, peaks) for name in arguments.shapes},
    }
    line = json.dumps(result)
    print(f"\n{line}")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(line + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
