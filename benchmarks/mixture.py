"""Why mixtures of experts: more parameters at equal compute, and what it takes to keep the experts at work.

    python benchmarks/mixture.py --json FILE       all four experiments, three seeds: 45 CPU-minutes, one thread
    python benchmarks/mixture.py --quick           the same in small, half a minute: shows that it runs, no more

Small decoders on the sources of Python's standard library (documents of the validation side are never trained on). Like
is compared with like: in one experiment all models see the same batches, with the same optimizer and schedule (that of
Vaswani et al. 2017, section 5.3, which does not depend on where training ends: every point of a curve counts).

    equal_flops      a dense model against 4, 8 and 16 experts in every layer (Fedus et al. 2022, figure 1). A token
                     uses one expert as large as the dense layer, or two of half the width: the operations a token costs
                     are equal but for the router's product, which is reported. The dense model is trained for twice as
                     many steps, to see how long it takes to catch up. Half and twice the rate: learning_rates.
    collapse         eight experts, each with room for 1.25 times its share; no balance loss, that of Switch from the
                     start, or from half time on. A router of this size moves little in so few steps, and does not
                     collapse by itself. So here it begins undecided and learns 10 times as fast as the rest. At the
                     "common rate" nothing is provoked; there no balance, the loss, and the bias of DeepSeek-V3 instead
                     of a loss are compared.
    capacity         capacity factors against tokens dropped and validation loss.
    specialisation   one model on prose and code, half and half: what an expert's choice says of corpus and token.

The file is written after every model; the same command goes on where an interrupted one stopped. Losses are nats per
token of the same held-out windows. Its keys:

    benchmark, torch, python, corpora, settings (of `Settings`, by name)
    held_out         {"tokens", "bytes_per_token"}: nats per token / (ln 2 * bytes_per_token) are bits per byte
    models           {"dense": {"parameters", "active_parameters", "flops_per_token" (forward), "overhead" (flops over
                     the dense model's, less one), "n_experts", "k", "d_ff"}, "4 experts": ...}
    learning_rates   a list: learning_rate, seed, loss (by model); those of settings.learning_rate are in equal_flops
    equal_flops      a list: model, seed, steps and losses (the curve, for the dense model to twice the steps), loss (at
                     the common last step), cpu_seconds, load (by layer, by expert: shares of the held-out tokens'
                     assignments, at the end)
    collapse         a list: regime, seed, steps and losses (curve), loss, watched (steps at which the following were
                     read from the training batch), and by layer lists over these: shares (of the assignments, by
                     expert), max_over_mean, entropy (of the router, nats), drop_rate
    capacity         a list: capacity_factor (null: dropless), seed, loss (with this factor in evaluation too),
                     loss_dropless (the same model evaluated without a limit), drop_rate (training, second half),
                     drop_rate_by_layer, drop_rate_evaluated
    specialisation   a list: n_layers, seed, loss (by corpus), layers (see `specialisation_of`), samples (by corpus, see
                     `sample`)
    summary          means with the least and the greatest of the seeds; see `summarize`
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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.costs import active_parameters, forward_flops_per_token, parameters
from minillm.data import TokenDataset, load_corpus
from minillm.layers import (
    RoutingStatistics,
    expert_information,
    expert_lift,
    expert_preferences,
    expert_token_counts,
    main_experts,
    routing_statistics,
)
from minillm.layers.moe import MoERecord
from minillm.layers.routers import SigmoidRouter
from minillm.models import MoEConfig, Transformer, TransformerConfig
from minillm.optim import AdamW, parameter_groups
from minillm.tokenizers import ByteBPETokenizer

PARTS = ("learning_rates", "equal_flops", "collapse", "capacity", "specialisation")
CODE, PROSE = "python-stdlib", "python-docs"
BALANCE = 0.01
REGIMES = (
    "no balance", "loss", "loss from half time",
    "no balance, common rate", "loss, common rate", "bias, common rate",
)  # fmt: skip
COMMON = 50
CAPACITY_FACTORS = (0.5, 0.75, 1.0, 1.25, 2.0, None)
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Settings:
    """The experiments. ``short_steps`` are those of collapse and capacity; ``deep_layers`` and ``deep_steps`` those of
    specialisation."""

    d_model: int = 32
    n_heads: int = 4
    n_layers: int = 2
    deep_layers: int = 4
    vocab_size: int = 512
    context_length: int = 64
    batch_size: int = 16
    initializer_std: float = 0.08
    router_std: float = 0.15
    learning_rate: float = 8e-3
    learning_rates: tuple[float, ...] = (4e-3, 16e-3)  # tried beside that one
    warmup_steps: int = 100
    steps: int = 2400
    short_steps: int = 800
    deep_steps: int = 2000
    n_evaluations: int = 16
    n_watched: int = 50
    held_out_windows: int = 768
    n_experts: tuple[int, ...] = (4, 8, 16)
    router_rate: float = 10.0  # of the collapse: the router's learning rate over that of the rest
    collapse_router_std: float = 0.02
    bias_rate: float = 0.003

    def config(self, n_layers: int, moe: MoEConfig | None = None) -> TransformerConfig:
        return TransformerConfig(
            vocab_size=self.vocab_size,
            context_length=self.context_length,
            d_model=self.d_model,
            n_layers=n_layers,
            n_heads=self.n_heads,
            positions="rope",
            bias=False,
            initializer_std=self.initializer_std,
            moe=moe,
        )

    def models(self) -> dict[str, TransformerConfig]:
        """Of equal_flops, by name: one expert of the dense layer's width a token, or two of half that width."""
        dense = self.config(self.n_layers)
        models = {"dense": dense}
        for n_experts in self.n_experts:
            models[f"{n_experts} experts"] = dense.replace(moe=switch(n_experts))
        n_halves = 2 * self.n_experts[1]
        models[f"{n_halves} half experts, top 2"] = dense.replace(moe=top_2(n_halves, dense.d_ff // 2))
        return models


QUICK = Settings(
    deep_layers=2, learning_rates=(4e-3,), warmup_steps=10, steps=60, short_steps=40, deep_steps=40,
    n_evaluations=3, n_watched=8, held_out_windows=64, n_experts=(4, 8),
)  # fmt: skip


def top_2(n_experts: int, d_ff: int) -> MoEConfig:
    """Softmax routing to two experts, their weights renormalised, nothing dropped (Mixtral)."""
    return MoEConfig(n_experts=n_experts, k=2, d_ff=d_ff, balance_loss=BALANCE)


def switch(n_experts: int, *, capacity_factor: float | None = None, balance_loss: float = BALANCE) -> MoEConfig:
    """Switch routing to one expert (Fedus et al. 2022)."""
    return MoEConfig(
        n_experts=n_experts,
        k=1,
        router="switch",
        balance_loss=balance_loss,
        capacity_factor=capacity_factor,
        eval_capacity_factor=capacity_factor,
    )


@dataclass(frozen=True)
class Text:
    """The code, and code beside prose: training tokens in folders, held-out windows in memory."""

    folder: Path
    tokenizer: ByteBPETokenizer
    held_out: list[Batch]
    held_out_by_corpus: dict[str, list[Batch]]
    bytes_per_token: float


def prepare(settings: Settings, folder: Path) -> Text:
    """Both corpora split by document and tokenised by a tokenizer of both."""
    # Tables of character codes: a tenth of the library, each nearly a copy of the next, no use as held-out text.
    corpora = {
        CODE: [document for document in load_corpus(CODE) if "decoding_table" not in document],
        PROSE: list(load_corpus(PROSE)),
    }
    tokenizer = ByteBPETokenizer.train([text for corpus in corpora.values() for text in corpus], settings.vocab_size)
    held_out = {}
    for name, documents in corpora.items():
        # Prose is short: of a tenth there would be too little to count experts in.
        TokenDataset.write(folder / name, documents, tokenizer, validation_fraction=0.3 if name == PROSE else 0.1)
        held_out[name] = windows(settings, folder / name)
    n_bytes = sum(len(tokenizer.decode(row.tolist()).encode()) for _, targets in held_out[CODE] for row in targets)
    n_tokens = sum(targets.numel() for _, targets in held_out[CODE])
    return Text(folder, tokenizer, held_out[CODE], held_out, n_bytes / n_tokens)


def windows(settings: Settings, folder: Path) -> list[Batch]:
    """Held-out windows from all over the validation split, in batches of 64."""
    length = settings.context_length
    data = TokenDataset(folder, "validation", context_length=length, batch_size=1)
    whole = [batch for batch in data.evaluation_batches() if batch[0].size(1) == length]
    chosen = whole[:: max(1, len(whole) // settings.held_out_windows)][: settings.held_out_windows]
    inputs, targets = (torch.cat(side) for side in zip(*chosen, strict=True))
    return list(zip(torch.split(inputs, 64), torch.split(targets, 64), strict=True))


def build(settings: Settings, config: TransformerConfig, seed: int, *, router_std: float | None = None) -> Transformer:
    """A new model; ``router_std`` is that of the routers' initial weights in place of the settings'."""
    torch.manual_seed(seed)
    model = Transformer(config)
    for mixture in model.mixtures():
        nn.init.normal_(mixture.router.weight, std=settings.router_std if router_std is None else router_std)
    return model


def training(
    settings: Settings,
    model: Transformer,
    next_batch: Callable[[], Batch],
    steps: int,
    *,
    learning_rate: float | None = None,
    router_rate: float = 1.0,
) -> Iterator[tuple[int, list[MoERecord]]]:
    """Train; give after each update its number, from 1, and what the experts did."""
    peak = settings.learning_rate if learning_rate is None else learning_rate
    groups = [group | {"times": 1.0} for group in parameter_groups(model, 0.1)]
    if router_rate != 1.0:
        routers = [mixture.router.weight for mixture in model.mixtures()]
        of_routers = {id(weight) for weight in routers}
        for group in groups:
            group["params"] = [weight for weight in group["params"] if id(weight) not in of_routers]
        groups.append({"params": routers, "weight_decay": 0.0, "times": router_rate})
    optimizer = AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=True)
    for step in range(1, steps + 1):
        rate = peak * min(step / settings.warmup_steps, (settings.warmup_steps / step) ** 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["times"]
        model.train()
        inputs, targets = next_batch()
        logits, records = model(inputs, return_records=True)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss = loss + sum(added for record in records for added in record.losses.values())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for mixture, record in zip(model.mixtures(), records, strict=True):
            if isinstance(mixture.router, SigmoidRouter):
                mixture.router.update_bias(record.routing.assigned, settings.bias_rate)
        yield step, records


def batches_of(settings: Settings, text: Text, seed: int) -> Callable[[], Batch]:
    return TokenDataset(
        text.folder / CODE, context_length=settings.context_length, batch_size=settings.batch_size, seed=seed
    ).next_batch


@torch.no_grad()
def evaluate(model: Transformer, batches: list[Batch]) -> tuple[float, list[RoutingStatistics]]:
    """Mean nats per token, and by layer of experts its statistics."""
    model.eval()
    total, seen = 0.0, []
    for inputs, targets in batches:
        logits, records = model(inputs, return_records=True)
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        seen.append([routing_statistics(record) for record in records])
    n_tokens = sum(targets.numel() for _, targets in batches)
    return total / n_tokens, [RoutingStatistics.merge(layer) for layer in zip(*seen, strict=True)]


def learning_rate_run(settings: Settings, rate: float, seed: int, text: Text) -> dict[str, Any]:
    """The dense model and the one of as many experts as the other experiments have, at another rate."""
    losses = {}
    for name in ("dense", f"{settings.n_experts[1]} experts"):
        model = build(settings, settings.models()[name], seed)
        for _ in training(settings, model, batches_of(settings, text, seed), settings.steps, learning_rate=rate):
            pass
        losses[name] = evaluate(model, text.held_out)[0]
    return {"learning_rate": rate, "seed": seed, "loss": losses}


def equal_flops_run(settings: Settings, name: str, seed: int, text: Text) -> dict[str, Any]:
    started = time.process_time()
    model = build(settings, settings.models()[name], seed)
    steps = settings.steps * (2 if name == "dense" else 1)
    curve: dict[int, float] = {}
    layers: list[RoutingStatistics] = []
    for step, _ in training(settings, model, batches_of(settings, text, seed), steps):
        if step % (settings.steps // settings.n_evaluations) == 0:
            curve[step], layers = evaluate(model, text.held_out)
    return {
        "model": name,
        "seed": seed,
        "steps": list(curve),
        "losses": list(curve.values()),
        "loss": curve[settings.steps],
        "cpu_seconds": round(time.process_time() - started, 1),
        "load": [layer.share for layer in layers],
    }


def collapse_run(settings: Settings, regime: str, seed: int, text: Text) -> dict[str, Any]:
    common, balance_loss = regime.endswith("common rate"), BALANCE if regime.startswith("loss") else 0.0
    moe = switch(settings.n_experts[1], capacity_factor=1.25, balance_loss=balance_loss)
    if regime.startswith("bias"):
        moe = replace(moe, router="sigmoid", router_options={"renormalise": False})
    config = settings.config(settings.n_layers, moe)
    model = build(settings, config, seed, router_std=None if common else settings.collapse_router_std)
    late = regime == "loss from half time"
    set_balance(model, 0.0 if late else balance_loss)
    steps = settings.short_steps
    curve: dict[int, float] = {}
    watched: dict[int, list[RoutingStatistics]] = {}
    router_rate = 1.0 if common else settings.router_rate
    for step, records in training(settings, model, batches_of(settings, text, seed), steps, router_rate=router_rate):
        if step == 1 or step % (steps // settings.n_watched) == 0:
            watched[step] = [routing_statistics(record) for record in records]
        if step % (steps // settings.n_evaluations) == 0 or step == steps:
            curve[step], _ = evaluate(model, text.held_out)
        if late and step == steps // 2:
            set_balance(model, balance_loss)
    by_layer = list(zip(*watched.values(), strict=True))
    return {
        "regime": regime,
        "seed": seed,
        "steps": list(curve),
        "losses": list(curve.values()),
        "loss": curve[steps],
        "watched": list(watched),
        "shares": [[[round(share, 5) for share in seen.share] for seen in layer] for layer in by_layer],
        "max_over_mean": [[round(seen.max_over_mean, 4) for seen in layer] for layer in by_layer],
        "entropy": [[round(seen.entropy, 4) for seen in layer] for layer in by_layer],
        "drop_rate": [[round(seen.drop_rate, 5) for seen in layer] for layer in by_layer],
    }


def set_balance(model: Transformer, coefficient: float) -> None:
    for mixture in model.mixtures():
        mixture.router.balance_loss = coefficient


def capacity_run(settings: Settings, factor: float | None, seed: int, text: Text) -> dict[str, Any]:
    moe = switch(settings.n_experts[1], capacity_factor=factor)
    model = build(settings, settings.config(settings.n_layers, moe), seed)
    seen = []
    for step, records in training(settings, model, batches_of(settings, text, seed), settings.short_steps):
        if 2 * step > settings.short_steps:
            seen.append([routing_statistics(record) for record in records])
    layers = [RoutingStatistics.merge(layer) for layer in zip(*seen, strict=True)]
    loss, evaluated = evaluate(model, text.held_out)
    for mixture in model.mixtures():
        mixture.eval_capacity_factor = None
    return {
        "capacity_factor": factor,
        "seed": seed,
        "loss": loss,
        "loss_dropless": evaluate(model, text.held_out)[0],
        "drop_rate": RoutingStatistics.merge(layers).drop_rate,
        "drop_rate_by_layer": [layer.drop_rate for layer in layers],
        "drop_rate_evaluated": RoutingStatistics.merge(evaluated).drop_rate,
    }


def specialisation_run(settings: Settings, n_layers: int, seed: int, text: Text) -> dict[str, Any]:
    """Eight experts, half of each batch code and half prose; then each held-out token's expert, by layer."""
    dense = settings.config(n_layers)
    model = build(settings, dense.replace(moe=top_2(settings.n_experts[1], dense.d_ff // 2)), seed)
    half = settings.batch_size // 2
    sides = [
        TokenDataset(text.folder / name, context_length=settings.context_length, batch_size=half, seed=seed)
        for name in (CODE, PROSE)
    ]

    def next_batch() -> Batch:
        (inputs, targets), (more_inputs, more_targets) = (side.next_batch() for side in sides)
        return torch.cat((inputs, more_inputs)), torch.cat((targets, more_targets))

    for _ in training(settings, model, next_batch, settings.deep_steps):
        pass
    return {
        "n_layers": n_layers,
        "seed": seed,
        "loss": {name: evaluate(model, batches)[0] for name, batches in text.held_out_by_corpus.items()},
        "layers": specialisation_of(model, text),
        "samples": {name: sample(model, text, batches[0][0][:1]) for name, batches in text.held_out_by_corpus.items()},
    }


@torch.no_grad()
def specialisation_of(model: Transformer, text: Text) -> list[dict[str, Any]]:
    """Of each layer, over held-out code and prose, as many tokens of each:

    assignments        by expert, {corpus: tokens}
    lift               by expert, {corpus: P(expert | corpus) / P(expert)}
    information        nats that the expert tells of the "corpus", of the "token" (its id), and of "corpus given token":
                       what it tells of the corpus to one who knows the token. The latter over ids that occur COMMON
                       times in each corpus, a fraction "covered" of the tokens. "chance" beside each is about what a
                       choice independent of them would seem to tell in a sample of this size
    top_tokens         by expert, the most preferred tokens: [text, times seen at this expert, lift]
    """
    names = list(text.held_out_by_corpus)
    n_batches = min(map(len, text.held_out_by_corpus.values()))
    vocab_size, n_layers = model.config.vocab_size, len(model.mixtures())
    counts = [torch.zeros(mixture.router.n_experts, 2 * vocab_size, dtype=torch.int64) for mixture in model.mixtures()]
    model.eval()
    for corpus, name in enumerate(names):
        for inputs, _ in text.held_out_by_corpus[name][:n_batches]:
            _, records = model(inputs, return_records=True)
            for layer in range(n_layers):
                counts[layer] += expert_token_counts(records[layer], inputs + corpus * vocab_size, 2 * vocab_size)
    layers = []
    for both in counts:
        by_part = both.view(-1, 2, vocab_size)
        corpora, tokens = by_part.sum(2), by_part.sum(1)
        common = by_part[:, :, (by_part.sum(0) >= COMMON).all(0)]
        of_corpus, of_token = expert_information(corpora), expert_information(tokens)
        of_common, of_both = expert_information(common.sum(1)), expert_information(common.flatten(1))
        lift = expert_lift(corpora)
        layers.append(
            {
                "assignments": [dict(zip(names, row, strict=True)) for row in corpora.tolist()],
                "lift": [dict(zip(names, row, strict=True)) for row in lift.tolist()],
                "information": {
                    "corpus": {"nats": of_corpus.nats, "chance": of_corpus.chance},
                    "token": {"nats": of_token.nats, "chance": of_token.chance},
                    "corpus given token": {
                        "nats": of_both.nats - of_common.nats,
                        "chance": of_both.chance - of_common.chance,
                        "covered": int(common.sum()) / int(both.sum()),
                    },
                },
                "top_tokens": [
                    [[text.tokenizer.decode([each.label]), each.n_tokens, round(each.lift, 3)] for each in preferred]
                    for preferred in expert_preferences(tokens, top=12, min_count=30)
                ],
            }
        )
    return layers


@torch.no_grad()
def sample(model: Transformer, text: Text, inputs: Tensor) -> dict[str, Any]:
    """A held-out window: its pieces, and by layer the expert of each."""
    model.eval()
    _, records = model(inputs, return_records=True)
    pieces = [text.tokenizer.decode([token]) for token in inputs[0].tolist()]
    return {"pieces": pieces, "experts": [main_experts(record) for record in records]}


def summarize(settings: Settings, result: dict[str, Any]) -> dict[str, Any]:
    """Over the seeds, [mean, least, greatest]:

    equal_flops      by model: loss; standard_deviation of it; over_dense (its loss less the dense one's of the same
                     seed, which had the same batches); curve {step: ...}; speed_up (the common number of steps over
                     those after which this model has the loss that the dense one of the same seed ends with; Fedus et
                     al. 2022, figure 1); dense_steps (steps after which the dense one has this model's loss, over the
                     common number; null where one of them does not within twice as many)
    collapse         by regime: loss; max_over_mean, entropy and drop_rate, each {"half time": by layer, "end": by
                     layer}: means over what was watched in the tenth of the training before
    capacity         by factor ("none"): loss, loss_dropless, drop_rate
    specialisation   by layer: information, chance taken off
    """
    summary: dict[str, Any] = {}
    runs = grouped(result["equal_flops"], "model")
    if runs:
        dense = {run["seed"]: run for run in runs["dense"]}
        summary["equal_flops"] = {
            name: {
                "loss": spread([run["loss"] for run in group]),
                "standard_deviation": statistics.stdev([run["loss"] for run in group]) if len(group) > 1 else None,
                "over_dense": spread([run["loss"] - dense[run["seed"]]["loss"] for run in group]),
                "speed_up": spread([inverse(reached(settings, run, dense[run["seed"]]["loss"])) for run in group]),
                "dense_steps": spread([reached(settings, dense[run["seed"]], run["loss"]) for run in group]),
                "curve": {
                    str(step): spread([run["losses"][place] for run in group])
                    for place, step in enumerate(group[0]["steps"])
                },
            }
            for name, group in runs.items()
        }
    summary["collapse"] = {
        regime: {
            "loss": spread([run["loss"] for run in group]),
            **{
                key: {
                    when: [
                        spread([before(run, key, layer, part) for run in group]) for layer in range(settings.n_layers)
                    ]
                    for when, part in (("half time", 0.5), ("end", 1.0))
                }
                for key in ("max_over_mean", "entropy", "drop_rate")
            },
        }
        for regime, group in grouped(result["collapse"], "regime").items()
    }
    summary["capacity"] = {
        str(factor).lower(): {
            key: spread([run[key] for run in group]) for key in ("loss", "loss_dropless", "drop_rate")
        }
        for factor, group in grouped(result["capacity"], "capacity_factor").items()
    }
    trained = result["specialisation"]
    summary["specialisation"] = [
        {
            key: spread([layer["information"][key]["nats"] - layer["information"][key]["chance"] for layer in layers])
            for key in layers[0]["information"]
        }
        for layers in zip(*(run["layers"] for run in trained), strict=True)
    ]
    return summary


def grouped(runs: list[dict[str, Any]], key: str) -> dict[Any, list[dict[str, Any]]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault(run[key], []).append(run)
    return groups


def spread(values: list[float | None]) -> list[float] | None:
    numbers = [value for value in values if value is not None]
    if len(numbers) < len(values):
        return None
    return [round(value, 4) for value in (statistics.fmean(numbers), min(numbers), max(numbers))]


def reached(settings: Settings, run: dict[str, Any], loss: float) -> float | None:
    """Where the curve first comes down to ``loss``, straight between its points, over the common number of steps."""
    points = list(zip(run["steps"], run["losses"], strict=True))
    for (before, above), (after, below) in pairwise(points):
        if below <= loss:
            return float(before + (after - before) * (above - loss) / (above - below)) / settings.steps
    return None


def inverse(value: float | None) -> float | None:
    return None if value is None else 1.0 / value


def before(run: dict[str, Any], key: str, layer: int, part: float) -> float:
    """The mean of a layer's figure over the tenth of the training that ends with this part of it."""
    end = part * run["watched"][-1]
    start = end - 0.1 * run["watched"][-1]
    return statistics.fmean(
        value for step, value in zip(run["watched"], run[key][layer], strict=True) if start < step <= end
    )


def show(result: dict[str, Any]) -> None:
    summary = result["summary"]
    for run in result["learning_rates"]:
        print(
            f"rate {run['learning_rate']:g}: " + ", ".join(f"{name} {loss:.4f}" for name, loss in run["loss"].items())
        )
    print(f"\n{'equal operations a token':28}{'nats a token':>13}{'least - greatest':>19}{'over dense':>12}"
          f"{'speed-up':>10}{'dense needs':>13}{'parameters':>12}{'active':>10}{'operations':>12}")  # fmt: skip
    for name, row in summary.get("equal_flops", {}).items():
        (loss, least, greatest), model = row["loss"], result["models"][name]
        sooner = f"{row['speed_up'][0]:.2f}x" if row["speed_up"] else "-"
        times = f"{row['dense_steps'][0]:.2f}x" if row["dense_steps"] else "> 2x"
        print(f"{name:28}{loss:13.4f}{f'{least:.4f} - {greatest:.4f}':>19}{row['over_dense'][0]:12.4f}{sooner:>10}"
              f"{times:>13}"
              f"{model['parameters']:12,}{model['active_parameters']:10,}{1 + model['overhead']:11.3f}x")  # fmt: skip
    print(f"\n{'balance (by layer: half time, end)':46}{'nats a token':>13}{'dropped':>26}{'busiest / mean':>28}")
    for name, row in summary["collapse"].items():
        drops, busiest = (
            "  ".join(", ".join(form.format(layer[0]) for layer in row[key][when]) for when in ("half time", "end"))
            for key, form in (("drop_rate", "{:.0%}"), ("max_over_mean", "{:.1f}"))
        )
        print(f"{name:46}{row['loss'][0]:13.4f}{drops:>26}{busiest:>28}")
    print(f"\n{'capacity factor':28}{'nats a token':>13}{'evaluated dropless':>20}{'dropped':>10}")
    for name, row in summary["capacity"].items():
        print(f"{name:28}{row['loss'][0]:13.4f}{row['loss_dropless'][0]:20.4f}{row['drop_rate'][0]:10.1%}")
    print(f"\n{'nats the expert tells of':28}{'corpus':>13}{'token':>10}{'corpus given token':>20}")
    for layer, row in enumerate(summary["specialisation"]):
        print(f"layer {layer:<22}{row['corpus'][0]:13.3f}{row['token'][0]:10.3f}{row['corpus given token'][0]:20.3f}")


def write(path: Path | None, result: dict[str, Any]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".partial")
    beside.write_text(json.dumps(result) + "\n", encoding="utf-8")
    os.replace(beside, path)


def costs(settings: Settings) -> dict[str, Any]:
    models = settings.models()
    flops = {name: forward_flops_per_token(config, settings.context_length) for name, config in models.items()}
    return {
        name: {
            "parameters": parameters(config),
            "active_parameters": active_parameters(config),
            "flops_per_token": flops[name],
            "overhead": round(flops[name] / flops["dense"] - 1, 5),
            "n_experts": 1 if config.moe is None else config.moe.n_experts,
            "k": 1 if config.moe is None else config.moe.k,
            "d_ff": config.d_ff if config.moe is None else config.moe.d_ff or config.d_ff,
        }
        for name, config in models.items()
    }


Run = Callable[[Settings, Any, int, Text], dict[str, Any]]


def plan(settings: Settings, part: str, n_seeds: int) -> list[tuple[dict[str, Any], Callable[[Text], dict[str, Any]]]]:
    """The runs of a part: what identifies one, and how it is made."""
    kinds: dict[str, tuple[str, Iterable[Any], Run]] = {
        "learning_rates": ("learning_rate", settings.learning_rates, learning_rate_run),
        "equal_flops": ("model", settings.models(), equal_flops_run),
        "collapse": ("regime", REGIMES, collapse_run),
        "capacity": ("capacity_factor", CAPACITY_FACTORS, capacity_run),
        "specialisation": ("n_layers", [settings.deep_layers], specialisation_run),
    }
    key, values, run = kinds[part]
    seeds = range(1 if part == "learning_rates" else n_seeds)
    return [({key: value, "seed": seed}, partial(run, settings, value, seed)) for seed in seeds for value in values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the results here, and go on from what it holds")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default: 3)")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--quick", action="store_true", help="everything in small, one seed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    settings = QUICK if arguments.quick else Settings()
    result: dict[str, Any] = {
        "benchmark": "mixture",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "settings": json.loads(json.dumps(asdict(settings))),
        **{part: [] for part in PARTS},
    }
    if arguments.json is not None and arguments.json.exists():
        earlier = json.loads(arguments.json.read_text(encoding="utf-8"))
        if any(earlier.get(key) != result[key] for key in ("torch", "python", "settings")):
            parser.error(f"{arguments.json} holds results of other settings or versions: name another file")
        result = earlier
    with tempfile.TemporaryDirectory() as temporary:
        text = prepare(settings, Path(temporary))
        result["corpora"] = {name: load_corpus(name).description for name in (CODE, PROSE)}
        result["held_out"] = {
            "tokens": sum(targets.numel() for _, targets in text.held_out),
            "bytes_per_token": round(text.bytes_per_token, 4),
        }
        result["models"] = costs(settings)
        for part in arguments.parts:
            for identity, run in plan(settings, part, 1 if arguments.quick else arguments.seeds):
                if any(identity.items() <= done.items() for done in result[part]):
                    continue
                started = time.process_time()
                made = run(text)
                result[part].append(made)
                result["summary"] = summarize(settings, result)
                write(arguments.json, result)
                label = ", ".join(f"{key} {value}" for key, value in identity.items())
                print(f"{time.process_time() - started:5.0f} CPU-s   {part}: {label}: {made['loss']}", flush=True)
    show(result)


if __name__ == "__main__":
    main()
