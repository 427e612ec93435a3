"""What Triton's compiler makes of the norms, RoPE, the gated units and AdamW's step."""

import torch

from minillm.kernels import adamw_step, geglu, layer_norm, rms_norm, rope, swiglu
from minillm.kernels.compile_only import SHARED_MEMORY, Launch, compile_only, recorded_launches


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def launches_of(capability: int, n_columns: int) -> list[Launch]:
    x, weight, head, angles = empty(64, n_columns), empty(n_columns), empty(2, 8, 512, 128), torch.empty(512, 64)
    with recorded_launches(capability) as launches:
        torch.autograd.grad(rms_norm(x, weight, residual=x, backend="triton"), (x, weight), (x, x))
        torch.autograd.grad(layer_norm(x, weight, weight, backend="triton"), (x, weight), x)
        torch.autograd.grad(rope(head, angles, angles, backend="triton"), head, head)
        rope(head, angles, angles, interleaved=True, backend="triton")
        for gated in (swiglu(x, x, backend="triton"), geglu(x, x, backend="triton")):
            torch.autograd.grad(gated, x, x)
        geglu(x, x, approximate="tanh", backend="triton")
        adamw_step(x, x, *[x.detach().float()] * 2, step=1, backend="triton")
    return launches


def test_nothing_spills_and_numbers_are_loaded_sixteen_bytes_at_a_time(device: torch.device) -> None:
    short, long = launches_of(80, 4096), launches_of(90, 100_000)
    assert len({launch.kernel for launch in short}) == 8
    assert len({launch.kernel for launch in long}) == 10
    for compiled in compile_only([*short, *long]):
        assert compiled.spilled == 0
        assert compiled.shared <= min(SHARED_MEMORY.values())
        assert compiled.count("ld.global.v4") > 0
