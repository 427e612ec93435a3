"""The fused operators, each beside what torch has: eager, and compiled where torch.compile fuses the same."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.kernel_parts.measuring import OURS, Aim, Case, Results, Work, in_float64, wider
from minillm.kernels import (
    adamw_step,
    cross_entropy,
    grouped_matmul,
    layer_norm,
    linear_activation,
    linear_cross_entropy,
    rms_norm,
    rope,
    softmax,
    split_kv_decode,
    swiglu,
)


def operator_cases(device: torch.device, smoke: bool) -> dict[str, Callable[[], Case]]:
    """By name. A case is made, and its inputs with it, only when it is called."""
    make = _Maker(device, smoke)
    return {
        "rms_norm": make.rms_norm,
        "layer_norm": make.layer_norm,
        "softmax": make.softmax,
        "swiglu": make.swiglu,
        "rope": make.rope,
        "cross_entropy": make.cross_entropy,
        "linear_cross_entropy": make.linear_cross_entropy,
        "linear_activation": make.linear_activation,
        "grouped_matmul": make.grouped_matmul,
        "adamw_step": make.adamw_step,
        "split_kv_decode, many sequences": lambda: make.split_kv_decode(16, 4096),
        "split_kv_decode, one long sequence": lambda: make.split_kv_decode(1, 65536),
    }


class _Maker:
    def __init__(self, device: torch.device, smoke: bool) -> None:
        self.device, self.smoke = device, smoke
        self.dtype = torch.float32 if smoke else torch.bfloat16

    def random(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return (torch.randn(shape, device=self.device) * std).to(dtype or self.dtype)

    def learned(self, *shape: int, std: float = 1.0) -> Tensor:
        return self.random(*shape, std=std).requires_grad_()

    def sides(self, torch_side: Callable[..., Tensor], ours: Callable[..., Tensor]) -> dict[str, Callable[..., Any]]:
        return {"eager": torch_side, OURS: ours, "compiled": self.compiled(torch_side)}

    def compiled(self, side: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``side`` compiled at its first call. Its gradient is asked for many times from one forward pass."""

        def run(*inputs: Any) -> Tensor:
            import torch._functorch.config as config

            with config.patch(donated_buffer=False):
                result: Tensor = compiled(*inputs)
            return result

        compiled = torch.compile(side, backend="aot_eager" if self.smoke else "inductor", dynamic=False)
        return run

    # Rows ------------------------------------------------------------------------------------------------------------

    def rms_norm(self) -> Case:
        rows, width = (3, 40) if self.smoke else (16384, 4096)
        x, weight = self.learned(rows, width), self.learned(width)

        def by_torch(x: Tensor, weight: Tensor) -> Tensor:
            return F.rms_norm(x, weight.shape, weight, 1e-5)

        return Case(
            "rms_norm",
            f"{rows} x {width}",
            (x, weight),
            self.sides(by_torch, lambda x, weight: rms_norm(x, weight, backend="triton")),
            {"forward": Work(0, 2 * x.nbytes), "backward": Work(0, 3 * x.nbytes)},
            in_float64(by_torch),
            aims={"forward": Aim(2.4, "TB/s")},
        )

    def layer_norm(self) -> Case:
        rows, width = (3, 40) if self.smoke else (16384, 4096)
        x, weight, bias = self.learned(rows, width), self.learned(width), self.learned(width)

        def by_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.layer_norm(x, weight.shape, weight, bias)

        return Case(
            "layer_norm",
            f"{rows} x {width}",
            (x, weight, bias),
            self.sides(by_torch, lambda x, weight, bias: layer_norm(x, weight, bias, backend="triton")),
            {"forward": Work(0, 2 * x.nbytes), "backward": Work(0, 3 * x.nbytes)},
            in_float64(by_torch),
        )

    def softmax(self) -> Case:
        rows, width = (3, 40) if self.smoke else (16384, 4096)
        x = self.learned(rows, width)

        def by_torch(x: Tensor) -> Tensor:
            return x.softmax(-1)

        return Case(
            "softmax",
            f"{rows} x {width}",
            (x,),
            self.sides(by_torch, lambda x: softmax(x, backend="triton")),
            {"forward": Work(0, 2 * x.nbytes), "backward": Work(0, 3 * x.nbytes)},
            in_float64(by_torch),
        )

    def swiglu(self) -> Case:
        rows, width = (3, 40) if self.smoke else (8192, 3072)
        gate, up = self.learned(rows, width), self.learned(rows, width)

        def by_torch(gate: Tensor, up: Tensor) -> Tensor:
            return F.silu(gate) * up

        return Case(
            "swiglu",
            f"{rows} x {width}",
            (gate, up),
            self.sides(by_torch, lambda gate, up: swiglu(gate, up, backend="triton")),
            {"forward": Work(0, 3 * gate.nbytes), "backward": Work(0, 5 * gate.nbytes)},
            in_float64(by_torch),
            aims={"forward": Aim(0.063, "ms")},
        )

    def rope(self) -> Case:
        batch, heads, seq, head_dim = (1, 2, 5, 16) if self.smoke else (4, 32, 4096, 128)
        x = self.learned(batch, heads, seq, head_dim)
        speeds = 10000.0 ** -(torch.arange(head_dim // 2, device=self.device) / (head_dim // 2))
        angles = torch.arange(seq, device=self.device)[:, None] * speeds  # (seq, head_dim / 2)

        def by_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            first, second = x.chunk(2, dim=-1)
            return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)

        def by_complex_numbers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            turned = torch.complex(*x.chunk(2, dim=-1)) * torch.complex(cos, sin)
            return torch.cat((turned.real, turned.imag), dim=-1)

        return Case(
            "rope",
            f"{batch} x {heads} x {seq} x {head_dim}",
            (x, angles.cos(), angles.sin()),
            self.sides(by_torch, lambda x, cos, sin: rope(x, cos, sin, backend="triton")),
            {"forward": Work(0, 2 * x.nbytes), "backward": Work(0, 2 * x.nbytes)},
            in_float64(by_complex_numbers),
        )

    # Losses ----------------------------------------------------------------------------------------------------------

    def cross_entropy(self) -> Case:
        rows, n_classes = (3, 70) if self.smoke else (8192, 128256)
        logits = self.learned(rows, n_classes, std=2.0)
        targets = torch.randint(n_classes, (rows,), device=self.device)
        compared = slice(-256, None)

        def in_float32(logits: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(logits.float(), targets)

        def exact(logits: Tensor, targets: Tensor) -> Results:
            """The loss, and the gradient of the last rows: in float64 the logits alone would be 8 GB."""
            loss = torch.zeros((), dtype=torch.float64, device=logits.device)
            for some in torch.arange(rows, device=logits.device).split(512):
                loss += F.cross_entropy(logits[some].detach().double(), targets[some], reduction="sum") / rows
            last = logits[compared].detach().double().requires_grad_()
            share = F.cross_entropy(last, targets[compared], reduction="sum") / rows
            return (loss, *torch.autograd.grad(share, last))

        return Case(
            "cross_entropy",
            f"{rows} x {n_classes}",
            (logits, targets),
            {
                "eager": F.cross_entropy,
                "eager in float32": in_float32,
                OURS: lambda logits, targets: cross_entropy(logits, targets, backend="triton"),
                "compiled": self.compiled(in_float32),
            },
            {"forward + backward": Work(0, 3 * logits.nbytes)},
            exact,
            part=lambda tensor: tensor if tensor.dim() == 0 else tensor[compared],
            aims={"forward + backward": Aim(3.0, "ms")},
        )

    def linear_cross_entropy(self) -> Case:
        rows, d_model, n_classes = (5, 16, 70) if self.smoke else (8192, 4096, 128256)
        x, weight = self.learned(rows, d_model), self.learned(n_classes, d_model, std=d_model**-0.5)
        targets = torch.randint(n_classes, (rows,), device=self.device)

        def with_logits(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, weight).float(), targets)

        flops = 3 * 2.0 * rows * d_model * n_classes  # logits, and the gradients of x and weight from theirs
        return Case(
            "linear_cross_entropy",
            f"{rows} x {d_model} x {n_classes}",
            (x, weight, targets),
            self.sides(with_logits, lambda *inputs: linear_cross_entropy(*inputs, backend="triton")),
            {"forward + backward": Work(flops, 2 * (x.nbytes + weight.nbytes))},
            loss_in_float64,
        )

    # Products --------------------------------------------------------------------------------------------------------

    def linear_activation(self) -> Case:
        rows, d_in, d_out = (5, 16, 24) if self.smoke else (8192, 8192, 8192)
        x, weight, bias = self.learned(rows, d_in), self.learned(d_out, d_in, std=d_in**-0.5), self.learned(d_out)

        def by_torch(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.gelu(F.linear(x, weight, bias))

        flops, n_bytes = 2.0 * rows * d_in * d_out, x.nbytes + weight.nbytes + rows * d_out * x.element_size()
        return Case(
            "linear_activation",
            f"{rows} x {d_in} x {d_out} gelu",
            (x, weight, bias),
            self.sides(by_torch, lambda *inputs: linear_activation(*inputs, activation="gelu", backend="triton")),
            {"forward": Work(flops, n_bytes), "backward": Work(2 * flops, 2 * n_bytes)},
            in_float64(by_torch),
            aims={"forward": Aim(500, "TFLOP/s")},
        )

    def grouped_matmul(self) -> Case:
        n_groups, n_rows, d_in, d_out = (3, 12, 16, 24) if self.smoke else (8, 16384, 4096, 14336)
        rows, weights = self.learned(n_rows, d_in), self.learned(n_groups, d_out, d_in, std=d_in**-0.5)
        # Uneven, as routers are: the fullest expert has several times as many rows as the emptiest.
        popular = torch.rand(n_rows, device=self.device).square() * n_groups
        counts = torch.bincount(popular.long(), minlength=n_groups)
        sizes = counts.tolist()

        def loop(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
            return torch.cat([part @ weight.T for part, weight in zip(rows.split(sizes), weights, strict=True)])

        def grouped_mm(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
            return F.grouped_mm(rows, weights.mT, offs=counts.cumsum(0).to(torch.int32))

        flops, n_bytes = (
            2.0 * n_rows * d_in * d_out,
            rows.nbytes + weights.nbytes + n_rows * d_out * rows.element_size(),
        )
        return Case(
            "grouped_matmul",
            f"{n_rows} x {d_in} x {d_out}, {n_groups} experts",
            (rows, weights, counts),
            {
                "loop over experts": loop,
                "F.grouped_mm": grouped_mm,
                OURS: lambda *inputs: grouped_matmul(*inputs, backend="triton"),
            },
            {"forward": Work(flops, n_bytes), "backward": Work(2 * flops, 2 * n_bytes)},
            in_float64(loop),
            aims={"forward": Aim(250, "TFLOP/s")},
        )

    # A step of the optimizer -----------------------------------------------------------------------------------------

    def adamw_step(self) -> Case:
        n = 1000 if self.smoke else 100_000_000
        numbers = [self.random(n, dtype=torch.float32) for _ in range(4)]
        numbers[3].square_()  # exp_avg_sq
        hyperparameters = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        before = 7  # steps
        compared = slice(2**20)

        def optimizer(**options: bool) -> Callable[..., Callable[[], Tensor]]:
            def side(*inputs: Tensor) -> Callable[[], Tensor]:
                parameter, gradient, exp_avg, exp_avg_sq = (one.clone() for one in inputs)
                parameter.grad = gradient
                adamw = torch.optim.AdamW([parameter], **hyperparameters, **options)
                count = torch.tensor(float(before), device=parameter.device if options.get("fused") else "cpu")
                adamw.state[parameter].update(step=count, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)

                def step() -> Tensor:
                    adamw.step()
                    return parameter

                return step

            return side

        def ours(*inputs: Tensor) -> Callable[[], Tensor]:
            state, count = [one.clone() for one in inputs], before

            def step() -> Tensor:
                nonlocal count
                count += 1
                adamw_step(*state, step=count, **hyperparameters, backend="triton")
                return state[0]

            return step

        def exact(*inputs: Tensor) -> Results:
            return (optimizer(foreach=False)(*(one[compared].double() for one in inputs))(),)

        return Case(
            "adamw_step",
            f"{n} parameters",
            tuple(numbers),
            {
                "loop": optimizer(foreach=False),
                "foreach": optimizer(foreach=True),
                "fused": optimizer(fused=True),
                OURS: ours,
            },
            {"step": Work(0, 7 * numbers[0].nbytes)},
            exact,
            part=lambda tensor: tensor[compared],
            aims={"step": Aim(1.2, "ms")},
        )

    # A token at a time -----------------------------------------------------------------------------------------------

    def split_kv_decode(self, batch: int, length: int) -> Case:
        n_heads, n_kv_heads, head_dim = (4, 2, 16) if self.smoke else (32, 8, 128)
        batch, length = (1, 40) if self.smoke else (batch, length)
        query = self.random(batch, n_heads, 1, head_dim)
        key, value = (self.random(batch, n_kv_heads, length, head_dim) for _ in range(2))

        def gqa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

        def heads_as_rows(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            """The heads that share a key head as the rows of one product: no query sees another, so nothing changes."""
            grouped = query.view(batch, n_kv_heads, n_heads // n_kv_heads, head_dim)
            return F.scaled_dot_product_attention(grouped, key, value).view(query.shape)

        def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            grouped = query.view(batch, n_kv_heads, n_heads // n_kv_heads, head_dim)
            return ((grouped @ key.mT / math.sqrt(head_dim)).softmax(-1) @ value).view(query.shape)

        flops = 4.0 * batch * n_heads * head_dim * length
        return Case(
            "split_kv_decode",
            f"{batch} x {n_heads}:{n_kv_heads} x {length} x {head_dim}",
            (query, key, value),
            {
                "sdpa": gqa,
                "sdpa, heads as rows": heads_as_rows,
                OURS: lambda *inputs: split_kv_decode(*inputs, backend="triton"),
            },
            {"forward": Work(flops, key.nbytes + value.nbytes)},
            in_float64(written_out),
            aims={"forward": Aim(60, "%")},
        )


def loss_in_float64(x: Tensor, weight: Tensor, targets: Tensor) -> Results:
    """Cross-entropy of ``x weight^T`` and both gradients, in chunks of rows, as all logits in float64 are large."""
    wide = wider(weight)
    loss = torch.zeros((), dtype=torch.float64, device=x.device)
    d_x = []
    for rows in torch.arange(len(x), device=x.device).split(512):
        chunk = x.detach()[rows].double().requires_grad_()
        share = F.cross_entropy(chunk @ wide.T, targets[rows], reduction="sum") / len(x)
        share.backward()  # adds to the weight's gradient
        loss += share.detach()
        d_x.append(chunk.grad)
    return loss, torch.cat(d_x), wide.grad
