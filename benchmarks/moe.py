"""A mixture of experts beside a dense layer of equal active FLOPs, a loop over experts, and transformers' Mixtral.

    python benchmarks/moe.py [--rounds 3] [--tokens 4096 8192] [--experts 8 64] [--device cpu] [--dtype float32]
    python benchmarks/moe.py --smoke                 a few seconds: shows that it runs, no more

Each token uses 2 experts. The sides take turns in one process, on one thread; on a CPU the time is the process's own
CPU time, so other work on the machine disturbs it less. Before anything is timed, all mixtures must give the same
output from the same weights.

    dense         SwiGLU as wide as the two experts a token uses
    sorted        MixtureOfExperts, dropless: the router, its balance loss and the dispatch included
    einsum        MixtureOfExperts with the papers' one-hot matrices and as many places as the fullest expert needs,
                  where each of these matrices stays under 1 GiB
    loop          a list of SwiGLU layers, for each expert torch.where, the layer, index_add
    hf eager      transformers' MixtralSparseMoeBlock, its own loop
    hf grouped_mm the same with experts_implementation="grouped_mm"

"ratio" is the median over the rounds of that side / dense. "peak" is the rate of the active products over that of one
large matrix product, timed in the same turns. Gradients are those of the input and of all weights; they are dropped
after each step, as ``optimizer.zero_grad()`` does. Writes benchmarks/results/moe.json (--json FILE: another file);
--smoke writes only where --json says so.
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
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from minillm.layers import MixtureOfExperts, SwiGLU

K = 2
RESULTS = Path(__file__).parent / "results" / "moe.json"


class Loop(nn.Module):
    """As people write it."""

    def __init__(self, like: MixtureOfExperts) -> None:
        super().__init__()
        self.gate = nn.Linear(like.experts.d_model, like.experts.n_experts, bias=False)
        self.experts = nn.ModuleList(
            SwiGLU(like.experts.d_model, like.experts.d_ff) for _ in range(like.experts.n_experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = F.linear(x.float(), self.gate.weight.float()).softmax(-1).topk(K)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(chosen == number)
            out = out.index_add(0, token, expert(x[token]) * weights[token, choice, None])
        return out


def sides(
    d_model: int, d_ff: int, n_experts: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]], Tensor]:
    """Layers with the same weights, how each is called, and tokens to call them with."""
    with torch.device(device):
        ours = MixtureOfExperts(d_model, d_ff, n_experts, K).to(dtype)
        x = torch.randn(tokens, d_model, dtype=dtype)
        loop, dense = Loop(ours).to(dtype), SwiGLU(d_model, K * d_ff).to(dtype)
    result: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
        "dense": (dense, dense),
        "sorted": (ours, lambda x: ours(x)[0]),
    }
    with torch.no_grad():
        record = ours(x)[1]
        loop.gate.weight.copy_(ours.router.weight)
        for number, expert in enumerate(loop.experts):
            for name in ("gate", "up", "down"):
                getattr(expert, name).weight.copy_(getattr(ours.experts, name)[number])
    fullest = int(record.load.max())
    if 4 * tokens * n_experts * fullest < 2**30:
        factor = fullest * n_experts / (K * tokens)
        with torch.device(device):
            einsum = MixtureOfExperts(d_model, d_ff, n_experts, K, dispatch="einsum", capacity_factor=factor).to(dtype)
        einsum.load_state_dict(ours.state_dict())
        result["einsum"] = (einsum, lambda x: einsum(x)[0])
    result["loop"] = (loop, loop)
    for implementation in ("eager", "grouped_mm"):
        config = MixtralConfig(
            hidden_size=d_model,
            intermediate_size=d_ff,
            num_local_experts=n_experts,
            num_experts_per_tok=K,
            experts_implementation=implementation,
        )
        with torch.device(device):
            block = MixtralSparseMoeBlock(config).to(dtype)
        with torch.no_grad():
            block.gate.weight.copy_(ours.router.weight)
            block.experts.gate_up_proj.copy_(torch.cat((ours.experts.gate, ours.experts.up), dim=1))
            block.experts.down_proj.copy_(ours.experts.down)
        result[f"hf {implementation}"] = (block, lambda x, block=block: block(x.unsqueeze(0)).squeeze(0))
    with torch.no_grad():
        expected = result["sorted"][1](x)
        scale = float(expected.float().abs().max())
        for name, (_, run) in result.items():
            if name != "dense":
                tolerance = (1e-4 if dtype is torch.float32 else 5e-2) * scale
                torch.testing.assert_close(run(x), expected, atol=tolerance, rtol=0.0)
    return result, x


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


def measure(
    shape: dict[str, int], rounds: int, device: torch.device, dtype: torch.dtype, *, without: list[str]
) -> list[dict[str, Any]]:
    layers, x = sides(**shape, device=device, dtype=dtype)
    layers = {name: layer for name, layer in layers.items() if name not in without}
    gradient, leaf = torch.randn_like(x), x.clone().requires_grad_()
    a, b = (torch.randn(n, 2048, device=device, dtype=dtype) for n in (4096, 2048))

    def forward(layer: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
        with torch.no_grad():
            run(x)

    def step(layer: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
        leaf.grad = None
        layer.zero_grad()
        run(leaf).backward(gradient)

    rows = []
    for what, way, passes in (("forward", forward, 1), ("forward + backward", step, 3)):
        times: dict[str, list[float]] = {"product": [], **{name: [] for name in layers}}
        for number in range(rounds + 1):
            turn = {"product": seconds(lambda: a @ b.t(), device)}
            for name, (layer, run) in layers.items():
                turn[name] = seconds(lambda layer=layer, run=run, way=way: way(layer, run), device)
                layer.zero_grad()  # no side holds memory while another has its turn
            if number:  # the first is to warm up
                for name, value in turn.items():
                    times[name].append(value)
        flops = passes * 2 * shape["tokens"] * 3 * shape["d_model"] * K * shape["d_ff"]
        peak = 2 * 4096 * 2048 * 2048 / statistics.median(times["product"])
        for name in layers:
            median = statistics.median(times[name])
            over = statistics.median(one / dense for one, dense in zip(times[name], times["dense"], strict=True))
            rows.append(
                {
                    **shape,
                    "what": what,
                    "side": name,
                    "ratio": round(over, 3),
                    "peak": round(flops / median / peak, 3),
                    "seconds": times[name],
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "d_model  d_ff experts tokens  what                side            ms, median [least, greatest]   ratio  peak"
    ]
    for row in rows:
        times = [1e3 * t for t in row["seconds"]]
        spread = f"{statistics.median(times):9.1f} [{min(times):.1f}, {max(times):.1f}]"
        lines.append(
            f"{row['d_model']:7} {row['d_ff']:5} {row['n_experts']:7} {row['tokens']:6}  {row['what']:18}"
            f"  {row['side']:13} {spread:30} {row['ratio']:6.2f}  {row['peak']:.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side (default: 3)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192], help="default: 4096 8192")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 64], help="default: 8 64")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[512], help="d_model (default: 512); d_ff is twice that"
    )
    parser.add_argument("--device", type=torch.device, help="default: cuda where torch sees it, else cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--without", nargs="+", default=[], metavar="SIDE", help="sides to leave out (not dense)")
    parser.add_argument("--smoke", action="store_true", help="small and once")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    device = arguments.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    rounds = 1 if arguments.smoke else arguments.rounds
    widths, tokens = ([64], [256]) if arguments.smoke else (arguments.widths, arguments.tokens)
    dtype = getattr(torch, arguments.dtype)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for d_model in widths:
        for n_experts in arguments.experts:
            for n_tokens in tokens:
                shape = {"d_model": d_model, "d_ff": 2 * d_model, "n_experts": n_experts, "tokens": n_tokens}
                measured = measure(shape, rounds, device, dtype, without=arguments.without)
                print(table(measured), flush=True)
                rows += measured
    result = {
        "benchmark": "moe",
        "k": K,
        "dtype": arguments.dtype,
        "threads": 1,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": {"machine": platform.machine(), "cores": os.cpu_count()},
        "versions": {"torch": torch.__version__},
        "rows": rows,
    }
    file = arguments.json or (None if arguments.smoke else RESULTS)
    if file:
        file.write_text(json.dumps(result) + "\n", encoding="utf-8")
    print("\nall:\n" + table(rows))


if __name__ == "__main__":
    main()
