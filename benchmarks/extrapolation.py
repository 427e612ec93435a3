"""Train short, test long: every position scheme trained on windows of 128 tokens and read at up to 2048.

    python benchmarks/extrapolation.py --json FILE       all schemes, three seeds: about 20 CPU-minutes, one thread
    python benchmarks/extrapolation.py --quick           the same in small, half a minute: shows that it runs, no more

The experiment of Press et al. 2022 ("Train short, test long", figure 1), in small: one decoder per scheme, alike in all
but ``TransformerConfig.positions``, trained on the sources of Python's standard library and evaluated on files that it
has not seen. A block is 2048 consecutive tokens of one such file. To evaluate at length L, all blocks are cut into
windows of L tokens that do not overlap; nothing is carried from one window to the next. So every length predicts the
same tokens, and only how much text stands before them differs. Two means of these losses:

    loss     over all tokens, as in the paper. It falls with L for two reasons: fewer tokens stand near the beginning of
             a window ("the early-token curse"), and more context may be of use.
    tail     over the last 128 tokens of the blocks, which at length L have L - 128 ... L - 1 tokens before them (at
             128: 0 ... 127). ``sliding`` is the loss of the same tokens when each has the 112 ... 127 tokens before it:
             the best that a model can do which was trained at 128 and is never shown more. Below it, longer context
             helps; between it and ``tail`` at 128, it only does away with the early-token curse.

RoPE is also evaluated with its angles rescaled by ``factor = L / 128`` (linear interpolation, NTK-aware, YaRN), without
training and, at the longest length, after fine-tuning there for a few steps.

The second half measures a training step of each scheme side by side: CPU time on one thread, the schemes taking turns,
and the peak of the bytes of tensors alive within a step, beside what Press et al. report of ALiBi over sinusoidal.

The file is written after every model; the same command goes on where an interrupted one stopped. Its keys:

    benchmark, torch, python, corpus
    settings             of `Settings`, by name
    held_out             {"blocks", "documents", "bytes_per_token"}: what is evaluated; nats per token over
                         (ln 2 * bytes_per_token) are bits per byte
    runs                 a list; of each model and way of evaluating it
        scheme           "none", "learned", "sinusoidal", "shaw", "t5", "rope", "alibi"
        variant          "" (as trained); for rope also "linear", "ntk", "yarn" (rescaled when evaluated, by L / 128),
                         "tuned", "linear tuned", "ntk tuned", "yarn tuned" (fine-tuned at the longest length with the
                         factor of that length, and evaluated with it at every length)
        seed, parameters, training_loss (nats per token, last 10 steps), cpu_seconds (of training)
        loss, tail       {"128": nats per token, ..., "2048": ...}; the rescaled variants begin at 256
        by_position      nats per token at the longest length, for tokens 0-127, 128-255, ... of the window
        sliding          nats per token of the tail's tokens with the 112-127 tokens before them; variant "" only
    summary              {"alibi": {"loss": {"128": [mean, least, greatest], ...}, "tail": ..., "sliding": [...]},
                         "rope linear": ..., ...}: over the seeds
    overhead             a list, one entry a length: {"d_model", ..., "length", "batch_size", "rounds", "paper": {...},
                         "rows": {scheme: row}}; "sinusoidal, mask" has its causal mask as a matrix, as every model had
                         in the paper's day; the others leave it to torch's kernel where they can. In a row
        cpu_ms           [median, least, greatest] of a training step
        over_sinusoidal  the median over the rounds of its time over sinusoidal's in the same round, less one
        peak_mib         the most bytes of tensors alive at once within a step, beyond parameters and optimizer state
        peak_over_sinusoidal_mib
"""

from __future__ import annotations

import sys
from pathlib import Path

if sys.path and Path(sys.path[0] or ".").resolve() == Path(__file__).resolve().parent:
    del sys.path[0]  # where tokenizers.py, which stands beside this file, would hide the library of that name

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minillm.data import TokenDataset, load_corpus
from minillm.data.split import split_documents
from minillm.layers import causal_mask
from minillm.layers.positions import LinearScaling, NTKScaling, YarnScaling
from minillm.layers.positions.rope_scaling import RopeScaling
from minillm.models import Transformer, TransformerConfig
from minillm.optim import AdamW, parameter_groups
from minillm.tokenizers import ByteBPETokenizer
from minillm.training import Trainer, TrainingConfig

SCHEMES = ("sinusoidal", "rope", "alibi", "learned", "t5", "none", "shaw")
CORPUS = "python-stdlib"
TAIL = 128
EVALUATION_TOKENS = 4096  # in a batch
PAPER = {"time": "0 to 0.7 %", "memory": "0 to 100 MB", "source": "Press et al. 2022, section 3, ALiBi over sinusoidal"}


@dataclass(frozen=True)
class Settings:
    """The experiment. Lengths are in tokens; ``tuning_steps`` are made at the longest length, one window a step."""

    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 4
    vocab_size: int = 512
    initializer_std: float = 0.125  # d_model**-0.5: embeddings as large as sinusoids, once multiplied by d_model**0.5
    shaw_distance: int = 16  # as in Shaw et al. 2018; at train_length or above, the vector of all farther is untrained
    train_length: int = 128
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    batch_size: int = 8
    steps: int = 1500
    learning_rate: float = 5e-3
    tuning_steps: int = 40
    tuning_rate: float = 1e-3
    n_blocks: int = 32
    blocks_per_document: int = 2

    def config(self, scheme: str) -> TransformerConfig:
        return TransformerConfig(
            vocab_size=self.vocab_size,
            context_length=self.lengths[-1],
            d_model=self.d_model,
            n_layers=self.n_layers,
            n_heads=self.n_heads,
            positions=scheme,  # type: ignore[arg-type]  # checked there
            initializer_std=self.initializer_std,
            relative_distance=self.shaw_distance if scheme == "shaw" else self.train_length,
        )


QUICK = Settings(
    lengths=(128, 256, 512), batch_size=4, steps=40, tuning_steps=2, n_blocks=4
)  # fmt: skip


@dataclass(frozen=True)
class Text:
    """A folder with the training tokens, and held-out blocks, int64 (n_blocks, longest length + 1)."""

    folder: Path
    blocks: Tensor
    n_documents: int
    bytes_per_token: float


def prepare(settings: Settings, folder: Path) -> Text:
    """Split the corpus by document, train the tokenizer on one side, cut the blocks from the other."""
    sides: dict[str, list[str]] = {"train": [], "validation": []}
    # Tables of character codes: a tenth of the library, each nearly a copy of the next, no use as held-out text.
    documents = (document for document in load_corpus(CORPUS) if "decoding_table" not in document)
    for side, document in split_documents(documents, 0.1):
        sides[side].append(document)
    tokenizer = ByteBPETokenizer.train(sides["train"], settings.vocab_size)
    TokenDataset.write(folder, sides["train"], tokenizer, validation_fraction=0.0)
    length, n_documents = settings.lengths[-1], 0
    blocks: list[list[int]] = []
    for document in sides["validation"]:
        tokens = tokenizer.encode(document)
        n_blocks = min((len(tokens) - 1) // length, settings.blocks_per_document, settings.n_blocks - len(blocks))
        blocks += [tokens[start * length : (start + 1) * length + 1] for start in range(n_blocks)]
        n_documents += n_blocks > 0
    if len(blocks) < settings.n_blocks:
        raise ValueError(f"{CORPUS} has {len(blocks)} held-out blocks of {length} tokens, wanted {settings.n_blocks}")
    n_bytes = sum(len(tokenizer.decode(block[1:]).encode()) for block in blocks)
    return Text(folder, torch.tensor(blocks), n_documents, n_bytes / (len(blocks) * length))


def train(settings: Settings, scheme: str, seed: int, text: Text) -> tuple[Transformer, dict[str, float]]:
    """A model of the scheme, trained at the training length, and how that went."""
    torch.manual_seed(seed)
    model = Transformer(settings.config(scheme))
    data = TokenDataset(
        text.folder, context_length=settings.train_length, batch_size=settings.batch_size, seed=seed
    )  # fmt: skip
    return model, _train(model, data, settings.steps, settings.learning_rate, seed)


def fine_tune(
    settings: Settings, model: Transformer, scaling: RopeScaling | None, seed: int, text: Text
) -> tuple[Transformer, dict[str, float]]:
    """A copy of a RoPE model with its angles rescaled, trained on at the longest length."""
    copy = rescaled(model, scaling)
    data = TokenDataset(text.folder, context_length=settings.lengths[-1], batch_size=1, seed=seed + 1)
    return copy, _train(copy, data, settings.tuning_steps, settings.tuning_rate, seed)


def _train(model: Transformer, data: TokenDataset, steps: int, rate: float, seed: int) -> dict[str, float]:
    config = TrainingConfig(
        max_steps=steps, learning_rate=rate, eval_every=None, checkpoint_every=None, precision="fp32", device="cpu",
        seed=seed,
    )  # fmt: skip
    started = time.process_time()
    result = Trainer(model, data, None, config, progress=False).train()
    assert result.loss is not None
    return {"training_loss": result.loss, "cpu_seconds": time.process_time() - started}


def rescaled(model: Transformer, scaling: RopeScaling | None) -> Transformer:
    """A copy of a RoPE model whose angles are rescaled."""
    copy = Transformer(model.config.replace(rope_scaling=scaling))
    copy.load_state_dict(model.state_dict())
    return copy


def scalings(factor: float, train_length: int) -> dict[str, RopeScaling]:
    return {
        "linear": LinearScaling(factor),
        "ntk": NTKScaling(factor),
        "yarn": YarnScaling(factor, original_context_length=train_length),
    }


@torch.no_grad()
def token_losses(model: Transformer, blocks: Tensor, length: int) -> Tensor:
    """Nats for each target of ``blocks`` (n_blocks, longest + 1), given the tokens before it in its window of
    ``length``: (n_blocks, longest)."""
    model.eval()
    inputs, targets = blocks[:, :-1].reshape(-1, length), blocks[:, 1:].reshape(-1, length)
    rows = max(1, EVALUATION_TOKENS // length)
    losses = [
        F.cross_entropy(model(some).flatten(0, 1), wanted.flatten(), reduction="none")
        for some, wanted in zip(torch.split(inputs, rows), torch.split(targets, rows), strict=True)
    ]
    return torch.cat(losses).view(len(blocks), -1)


@torch.no_grad()
def sliding_loss(model: Transformer, blocks: Tensor, length: int, *, stride: int = 16) -> float:
    """Mean nats of the last TAIL targets of the blocks, each given the ``length - stride`` to ``length - 1`` before."""
    model.eval()
    tokens = blocks[:, -(TAIL + length - stride + 1) :]
    inputs = tokens[:, :-1].unfold(1, length, stride).reshape(-1, length)
    targets = tokens[:, 1:].unfold(1, length, stride)[..., -stride:].reshape(-1, stride)
    total = 0.0
    rows = max(1, EVALUATION_TOKENS // length)
    for some, wanted in zip(torch.split(inputs, rows), torch.split(targets, rows), strict=True):
        logits = model(some)[:, -stride:]
        total += F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum").item()
    return total / targets.numel()


def measured(losses: dict[int, Tensor]) -> dict[str, Any]:
    """The numbers kept of `token_losses` at each length."""
    longest = losses[max(losses)]
    return {
        "loss": {str(length): loss.mean().item() for length, loss in losses.items()},
        "tail": {str(length): loss[:, -TAIL:].mean().item() for length, loss in losses.items()},
        "by_position": longest.view(len(longest), -1, TAIL).mean((0, 2)).tolist(),
    }


def runs_of(settings: Settings, scheme: str, seed: int, text: Text) -> list[dict[str, Any]]:
    """Train one model, evaluate it in every way that its scheme has."""
    model, training = train(settings, scheme, seed, text)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    common = {"scheme": scheme, "seed": seed, "parameters": parameters}
    base, lengths = settings.train_length, settings.lengths
    plain = measured({length: token_losses(model, text.blocks, length) for length in lengths})
    runs = [common | {"variant": ""} | training | plain | {"sliding": sliding_loss(model, text.blocks, base)}]
    if scheme != "rope":
        return runs
    for name in scalings(1.0, base):
        losses = {
            length: token_losses(rescaled(model, scalings(length / base, base)[name]), text.blocks, length)
            for length in lengths
            if length > base
        }
        runs.append(common | {"variant": name} | training | measured(losses))
    longest: dict[str, RopeScaling | None] = {"": None, **scalings(lengths[-1] / base, base)}
    for name, scaling in longest.items():
        tuned, tuning = fine_tune(settings, model, scaling, seed, text)
        losses = {length: token_losses(tuned, text.blocks, length) for length in lengths}
        runs.append(common | {"variant": f"{name} tuned".strip()} | tuning | measured(losses))
    return runs


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, least and greatest over the seeds, by scheme and variant."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(f"{run['scheme']} {run['variant']}".strip(), []).append(run)
    summary: dict[str, Any] = {}
    for name, group in groups.items():
        summary[name] = {
            key: {length: _spread([run[key][length] for run in group]) for length in group[0][key]}
            for key in ("loss", "tail")
        }
        if "sliding" in group[0]:
            summary[name]["sliding"] = _spread([run["sliding"] for run in group])
    return summary


def _spread(values: list[float]) -> list[float]:
    return [round(value, 4) for value in (statistics.fmean(values), min(values), max(values))]


@dataclass(frozen=True)
class OverheadSettings:
    """The model and the batch whose training step is measured."""

    d_model: int = 512
    n_layers: int = 4
    n_heads: int = 8
    vocab_size: int = 512
    length: int = 512
    batch_size: int = 2
    rounds: int = 7


OVERHEADS = (OverheadSettings(length=512, batch_size=2), OverheadSettings(length=1024, batch_size=1))
QUICK_OVERHEADS = (OverheadSettings(d_model=64, n_layers=2, length=128, rounds=2),)


def overhead(settings: OverheadSettings) -> dict[str, Any]:
    """Time and memory of a training step of each scheme, the schemes taking turns."""
    steps = {scheme: _step(settings, scheme) for scheme in SCHEMES}
    steps["sinusoidal, mask"] = _step(settings, "sinusoidal", masked=True)
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {scheme: [] for scheme in steps}
    for _ in range(settings.rounds):
        for scheme, step in steps.items():
            started = time.process_time()
            step()
            seconds[scheme].append(time.process_time() - started)
    peaks = {scheme: peak_bytes(step) / 2**20 for scheme, step in steps.items()}
    rows = {}
    for scheme, times in seconds.items():
        ratios = [time / reference for time, reference in zip(times, seconds["sinusoidal"], strict=True)]
        rows[scheme] = {
            "cpu_ms": [round(1000 * value, 1) for value in (statistics.median(times), min(times), max(times))],
            "over_sinusoidal": round(statistics.median(ratios) - 1, 4),
            "peak_mib": round(peaks[scheme], 1),
            "peak_over_sinusoidal_mib": round(peaks[scheme] - peaks["sinusoidal"], 1),
        }
    return asdict(settings) | {"paper": PAPER, "rows": rows}


def _step(settings: OverheadSettings, scheme: str, *, masked: bool = False) -> Callable[[], None]:
    torch.manual_seed(0)
    model = Transformer(
        TransformerConfig(
            vocab_size=settings.vocab_size,
            context_length=settings.length,
            d_model=settings.d_model,
            n_layers=settings.n_layers,
            n_heads=settings.n_heads,
            positions=scheme,  # type: ignore[arg-type]
        )
    )
    optimizer = AdamW(parameter_groups(model, 0.1), lr=1e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(settings.vocab_size, (settings.batch_size, settings.length + 1))

    def step() -> None:
        mask = causal_mask(settings.length, settings.length) if masked else None
        loss = F.cross_entropy(model(tokens[:, :-1], mask=mask).flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that operations make, while they live. What was there before does not count."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held, self.peak = 0, 0
        self._known = set[int]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._count((args, kwargs), made=False)
        result = func(*args, **(kwargs or {}))
        self._count(result, made=True)
        self.peak = max(self.peak, self.held)
        return result

    def _count(self, tensors: Any, *, made: bool) -> None:
        for tensor in tree_leaves(tensors):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if id(storage) not in self._known:
                self._known.add(id(storage))
                n_bytes = storage.nbytes() if made else 0
                self.held += n_bytes
                weakref.finalize(storage, self._forget, id(storage), n_bytes)

    def _forget(self, key: int, n_bytes: int) -> None:
        self._known.discard(key)
        self.held -= n_bytes


def peak_bytes(step: Callable[[], None]) -> int:
    """The most bytes of tensors that live at once within ``step``, beyond what there was before."""
    with _LiveBytes() as live:
        step()
    peak: int = live.peak
    return peak


def write(path: Path | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def show(summary: dict[str, Any], lengths: tuple[int, ...]) -> None:
    for key, title in (("loss", "all tokens"), ("tail", f"the last {TAIL} tokens of the blocks")):
        print(f"\n{f'nats per token, {title}, by length':>66}" + "".join(f"{length:>9}" for length in lengths))
        for name, row in summary.items():
            cells = "".join(f"{row[key][str(n)][0]:9.3f}" if str(n) in row[key] else " " * 9 for n in lengths)
            sliding = f"   sliding {row['sliding'][0]:.3f}" if key == "tail" and "sliding" in row else ""
            print(f"{name:>66}{cells}{sliding}")


def show_overhead(result: dict[str, Any]) -> None:
    print(
        f"\na training step, {result['n_layers']} layers, {result['n_heads']} heads, width {result['d_model']}, "
        f"{result['batch_size']} x {result['length']} tokens; ALiBi over sinusoidal in the paper: "
        f"{PAPER['time']}, {PAPER['memory']}"
    )
    print(f"{'':18}{'CPU ms':>9}{'min':>9}{'max':>9}{'over sinusoidal':>17}{'peak MiB':>10}{'more':>8}")
    for scheme, row in result["rows"].items():
        median, least, greatest = row["cpu_ms"]
        print(
            f"{scheme:18}{median:9.1f}{least:9.1f}{greatest:9.1f}{row['over_sinusoidal']:17.1%}"
            f"{row['peak_mib']:10.1f}{row['peak_over_sinusoidal_mib']:8.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here, and go on from what it holds")
    parser.add_argument("--seeds", type=int, default=3, help="models of each scheme (default: 3)")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--quick", action="store_true", help="everything in small, one seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = QUICK if arguments.quick else Settings()
    seeds = range(1 if arguments.quick else arguments.seeds)
    result: dict[str, Any] = {
        "benchmark": "extrapolation",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "settings": json.loads(json.dumps(asdict(settings))),
        "runs": [],
    }
    if arguments.json is not None and arguments.json.exists():
        earlier = json.loads(arguments.json.read_text(encoding="utf-8"))
        if any(earlier.get(key) != result[key] for key in ("torch", "python", "settings")):
            parser.error(f"{arguments.json} holds results of other settings or versions: name another file")
        result = earlier
    with tempfile.TemporaryDirectory() as temporary:
        text = prepare(settings, Path(temporary) / "data")
        result["corpus"] = load_corpus(CORPUS).description
        result["held_out"] = {
            "blocks": len(text.blocks),
            "documents": text.n_documents,
            "bytes_per_token": round(text.bytes_per_token, 4),
        }
        for seed in seeds:
            for scheme in arguments.schemes:
                if any(run["scheme"] == scheme and run["seed"] == seed for run in result["runs"]):
                    continue
                runs = runs_of(settings, scheme, seed, text)
                result["runs"] += runs
                result["summary"] = summarize(result["runs"])
                write(arguments.json, result)
                tail = "  ".join(f"{loss:.3f}" for loss in runs[0]["loss"].values())
                print(f"seed {seed}  {scheme:11}{runs[0]['cpu_seconds']:6.0f} CPU-s   {tail}", flush=True)
    show(result["summary"], settings.lengths)
    if "overhead" not in result:
        result["overhead"] = [overhead(case) for case in (QUICK_OVERHEADS if arguments.quick else OVERHEADS)]
        write(arguments.json, result)
    for case in result["overhead"]:
        show_overhead(case)


if __name__ == "__main__":
    main()
