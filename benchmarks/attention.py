"""Attention: the module's own cost, block-sparse against dense with a mask, and a rolling cache against a full one.

    python benchmarks/attention.py [--rounds 5] [--lengths 4096 8192 16384] [--device cpu] [--json FILE]
    python benchmarks/attention.py --smoke           a few seconds: shows that it runs, no more

Three questions, float32, one thread. The sides take turns in one process; on a CPU the time is the process's own CPU
time, so other work on the machine disturbs it less. Before anything is timed, both sides must give the same output.

    module    What ``MultiHeadAttention`` costs over ``F.scaled_dot_product_attention`` with the same two projections
              written out by hand: causal, as many key heads as query heads and a quarter of them.
    sparse    ``block_sparse_attention`` beside ``F.scaled_dot_product_attention`` with the pattern's boolean matrix:
              three patterns, set so that an eighth of the tiles is live. Torch computes every pair whatever the matrix
              hides, so one dense run a round stands beside all three. Bytes are the most that the allocator held at one
              time beyond the inputs; the dense side's matrix and the sparse side's search for live tiles are in them,
              in the times they are not (both are made once for all layers and steps).
    decode    A token from a sliding window of 1024: a cache of all tokens with a mask, and a rolling one.

Prints tables and one JSON line. "ratio" is a median over the rounds: of ours / by hand, then of dense / block-sparse,
then of full / rolling.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from minillm.layers import KVCache, MultiHeadAttention, Pattern, block_sparse_attention, causal_mask
from minillm.layers.block_layout import block_layout
from minillm.layers.sparse_compounds import big_bird, sparse_transformer_strided
from minillm.layers.sparse_patterns import sliding_window

BLOCK, LIVE = 64, 0.125
HEADS, HEAD_DIM = 8, 64
WINDOW = 1024


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """To the microsecond."""
    if device.type == "cpu":
        start = time.process_time()
        run()
        return round(time.process_time() - start, 6)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return round(time.perf_counter() - start, 6)


def take_turns(
    runs: dict[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 1
) -> dict[str, list[float]]:
    for _ in range(warm_up):
        for run in runs.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, device))
    return times


def ratio(one: list[float], other: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(one, other, strict=True)), 3)


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes held at one time beyond what was held before: counted by the allocator, not sampled."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def by_hand(layer: MultiHeadAttention, x: Tensor) -> Tensor:
    """What a user would write with torch alone: one product, three views, the fused kernel, one product."""
    batch, seq, _ = x.shape
    query, key, value = (
        part.view(batch, seq, -1, layer.head_dim).transpose(1, 2)
        for part in layer.qkv(x).split(layer.qkv_sizes, dim=-1)
    )
    gqa = layer.n_kv_heads < layer.n_heads
    heads = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=gqa)
    result: Tensor = layer.output(heads.transpose(1, 2).reshape(batch, seq, -1))
    return result


def both_ways(run: Callable[[], Tensor], inputs: tuple[Tensor, ...], gradient: Tensor) -> dict[str, Callable[[], None]]:
    """``run`` as inference and as a training step."""

    @torch.no_grad()
    def forward() -> None:
        run()

    def step() -> None:
        torch.autograd.grad(run(), inputs, gradient)

    return {"forward": forward, "forward + backward": step}


def module(name: str, n_kv_heads: int, rounds: int, smoke: bool, device: torch.device) -> list[dict[str, Any]]:
    d_model, seq, batch = (64, 64, 1) if smoke else (512, 1024, 2)
    layer = MultiHeadAttention(d_model, 8, n_kv_heads=n_kv_heads).to(device)
    x = torch.randn(batch, seq, d_model, device=device, requires_grad=True)
    torch.testing.assert_close(layer(x, causal=True), by_hand(layer, x))
    inputs, gradient = (x, *layer.parameters()), torch.randn_like(x)
    ours = both_ways(lambda: layer(x, causal=True), inputs, gradient)
    theirs = both_ways(lambda: by_hand(layer, x), inputs, gradient)
    rows = []
    for what in ours:
        times = take_turns({"ours": ours[what], "by hand": theirs[what]}, rounds, device, warm_up=2)
        over = ratio(times["ours"], times["by hand"])
        print(f"  {name:8} {what:18}  ours {_ms(times['ours'])}  by hand {_ms(times['by hand'])}  {over:.3f}")
        rows.append({"heads": name, "what": what, "ratio": over, "seconds": times})
    return rows


def nearest(candidates: Iterable[Pattern], length: int) -> Pattern:
    """The pattern whose live part of the tiles is nearest to an eighth."""
    return min(candidates, key=lambda pattern: abs(pattern.blocks(length, length, BLOCK).live_fraction - LIVE))


def eighths(length: int) -> dict[str, Pattern]:
    tiles = length // BLOCK
    return {
        "sliding window": nearest((sliding_window(BLOCK * n) for n in range(1, tiles)), length),
        "BigBird": nearest((big_bird(BLOCK, n_random_blocks=n) for n in range(tiles // 4)), length),
        "strided": nearest((sparse_transformer_strided(BLOCK * n) for n in range(1, tiles // 2)), length),
    }


def sparse(length: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    inputs = tuple(torch.randn(1, HEADS, length, HEAD_DIM, device=device, requires_grad=True) for _ in range(3))
    gradient = torch.randn_like(inputs[0])
    patterns = eighths(length)
    mask = patterns["sliding window"].dense(length, length, device=device)

    def ours(pattern: Pattern) -> Tensor:
        return block_sparse_attention(*inputs, pattern, block_size=BLOCK)

    def dense_from_the_pattern() -> Tensor:
        return F.scaled_dot_product_attention(*inputs, patterns["sliding window"].dense(length, length, device=device))

    def ours_from_the_pattern(pattern: Pattern) -> Tensor:
        block_layout.cache_clear()
        return ours(pattern)

    for pattern in patterns.values():
        with torch.no_grad():
            expected = F.scaled_dot_product_attention(*inputs, pattern.dense(length, length, device=device))
            torch.testing.assert_close(ours(pattern), expected, atol=1e-4, rtol=1e-4)
    sides = {"dense": both_ways(lambda: F.scaled_dot_product_attention(*inputs, mask), inputs, gradient)}
    whole = {"dense": both_ways(dense_from_the_pattern, inputs, gradient)}
    for name, pattern in patterns.items():
        sides[name] = both_ways(partial(ours, pattern), inputs, gradient)
        whole[name] = both_ways(partial(ours_from_the_pattern, pattern), inputs, gradient)

    rows = []
    for what in sides["dense"]:
        times = take_turns({side: ways[what] for side, ways in sides.items()}, rounds, device)
        peaks = {side: peak_bytes(ways[what], device) for side, ways in whole.items()}
        print(f"  {length:>6} {what:18} dense           {_s(times['dense'])}  {peaks['dense'] / 2**20:8.1f}")
        for name, pattern in patterns.items():
            layout = pattern.blocks(length, length, BLOCK)
            faster, smaller = ratio(times["dense"], times[name]), peaks["dense"] / peaks[name]
            print(
                f"  {length:>6} {what:18} {name:15} {_s(times[name])}  {peaks[name] / 2**20:8.1f}"
                f"  {100 * layout.live_fraction:4.1f} % live: {faster:5.2f} times faster, {smaller:5.1f} times less"
            )
            rows.append(
                {
                    "length": length,
                    "what": what,
                    "pattern": name,
                    "rule": repr(pattern),
                    "live_tiles": round(layout.live_fraction, 4),
                    "live_pairs": round(layout.live_pairs / length**2, 4),
                    "ratio": faster,
                    "seconds": {"dense": times["dense"], "block-sparse": times[name]},
                    "peak_bytes": {"dense": peaks["dense"], "block-sparse": peaks[name]},
                }
            )
    return rows


def decode(context: int, rounds: int, device: torch.device) -> dict[str, Any]:
    """One layer, one token at a time, after ``context`` tokens."""
    window, steps = min(WINDOW, context // 2), 32
    layer = MultiHeadAttention(512, 8).to(device)
    room = context + (rounds + 2) * steps
    caches = {
        "full": KVCache(1, 1, 8, 64, room, device=device),
        "rolling": KVCache(1, 1, 8, 64, room, window=window, device=device),
    }
    before = torch.randn(2, 1, 8, context, 64, device=device)
    tokens = torch.randn(steps, 1, 1, 512, device=device)

    @torch.no_grad()
    def generate(cache: KVCache) -> Tensor:
        outputs = []
        for token in tokens:
            mask = causal_mask(1, cache.n_keys(1), window=window, device=device)
            outputs.append(layer(token, mask=mask, cache=cache.layers[0]))
        return torch.cat(outputs)

    for cache in caches.values():
        cache.layers[0].append(*before)
    torch.testing.assert_close(generate(caches["full"]), generate(caches["rolling"]))
    times = take_turns({name: partial(generate, cache) for name, cache in caches.items()}, rounds, device)
    times = {name: [round(t / steps, 8) for t in side] for name, side in times.items()}
    faster = ratio(times["full"], times["rolling"])
    for name, cache in caches.items():
        print(f"  {context:>6} {name:8} {_ms(times[name])}  {cache.nbytes / 2**20:7.1f}")
    print(f"  {context:>6} rolling is {faster:.2f} times faster")
    return {
        "context": context,
        "window": window,
        "ratio": faster,
        "seconds_per_token": times,
        "cache_bytes": {name: cache.nbytes for name, cache in caches.items()},
    }


def _ms(times: list[float]) -> str:
    return f"{1e3 * statistics.median(times):8.3f} [{1e3 * min(times):.3f}, {1e3 * max(times):.3f}]"


def _s(times: list[float]) -> str:
    return f"{statistics.median(times):7.3f} [{min(times):.3f}, {max(times):.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384], help="tokens (4096 8192 16384)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    parser.add_argument("--smoke", action="store_true", help="small and once")
    parser.add_argument("--json", type=Path, help="also write the JSON line to this file")
    arguments = parser.parse_args()
    device, rounds = arguments.device, 1 if arguments.smoke else arguments.rounds
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    lengths = [512] if arguments.smoke else arguments.lengths
    torch.set_num_threads(1)
    torch.manual_seed(0)
    results: dict[str, list[dict[str, Any]]] = {"module": [], "sparse": [], "decode": []}
    print("module: d_model 512, 8 heads, 2 x 1024 tokens, causal; ms, median [least, greatest]")
    for name, n_kv_heads in (("MHA", 8), ("GQA 8:2", 2)):
        results["module"] += module(name, n_kv_heads, 5 * rounds, arguments.smoke, device)
    print(f"\nsparse: 1 x {HEADS} x length x {HEAD_DIM}, tiles of {BLOCK}; seconds, median [least, greatest]; peak MiB")
    for length in lengths:
        results["sparse"] += sparse(length, rounds, device)
    print(f"\ndecode: one layer, 8 heads of 64, window {WINDOW}; ms a token, median [least, greatest]; cache MiB")
    for length in lengths:
        results["decode"].append(decode(length, rounds, device))
    line = {
        "benchmark": "attention",
        "dtype": "float32",
        "threads": 1,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": {"machine": platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__},
        **results,
    }
    print(json.dumps(line))
    if arguments.json:
        arguments.json.write_text(json.dumps(line) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
