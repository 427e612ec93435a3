"""RoPE against complex multiplication in float64 and transformers' Llama and GPT-J: reference and kernel."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj_apply
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama_apply

from minillm.kernels import rope
from minillm.kernels.testing import TOLERANCE, assert_untouched, guarded, relative_error, watched_memory
from minillm.layers.positions import RotaryEmbedding, rotate

BACKENDS = ("reference", "triton")


def oracle(x: Tensor, angles: Tensor, *, interleaved: bool) -> Tensor:
    """Each pair as a complex number, times exp(i angle), in float64; (seq, pairs) or (batch, seq, pairs) of angles."""
    angles, wide = angles.double().unsqueeze(-3), x.double()
    real, imaginary = (wide[..., 0::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    if interleaved:
        return torch.stack((turned.real, turned.imag), dim=-1).flatten(-2)
    return torch.cat((turned.real, turned.imag), dim=-1)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    return guarded(torch.randn(shape, device=device).to(dtype)).requires_grad_()


def check(x: Tensor, angles: Tensor, *, interleaved: bool, backend: str = "triton") -> None:
    """Value and gradient; the gradient of a rotation is the rotation back."""
    tolerance = TOLERANCE[x.dtype]
    cos, sin = (guarded(t.to(torch.promote_types(x.dtype, torch.float32))) for t in (angles.cos(), angles.sin()))
    dy = guarded(torch.randn(x.shape, device=x.device).to(x.dtype))
    with watched_memory():
        y = rope(x, cos, sin, interleaved=interleaved, backend=backend)
        (dx,) = torch.autograd.grad(y, x, dy)
    assert y.dtype == dx.dtype == x.dtype
    assert relative_error(y, oracle(x, angles, interleaved=interleaved)) <= tolerance
    assert relative_error(dx, oracle(dy, -angles, interleaved=interleaved)) <= tolerance
    for tensor in (x, cos, sin, dy):
        assert_untouched(tensor)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_and_gradients(
    dtype: torch.dtype, interleaved: bool, batched: bool, backend: str, device: torch.device
) -> None:
    shape = (2, 7, 10) if batched else (7, 10)
    angles = torch.randn(shape, dtype=torch.float64, device=device) * 10
    check(drawn(2, 3, 7, 20, dtype=dtype, device=device), angles, interleaved=interleaved, backend=backend)


@pytest.mark.parametrize("shape", [(1, 1, 300, 64), (3, 2, 1, 128), (1, 2, 2, 2)])
def test_many_places_one_and_the_smallest_head(shape: tuple[int, ...], device: torch.device) -> None:
    angles = torch.randn(shape[2], shape[3] // 2, dtype=torch.float64, device=device)
    check(drawn(*shape, device=device), angles, interleaved=False)


@settings(max_examples=15, deadline=None)
@given(
    *(st.integers(low, high) for low, high in ((0, 3), (0, 3), (0, 20), (1, 12))),
    st.booleans(),
    st.sampled_from([1, 32]),
)
def test_any_shape(batch: int, heads: int, seq: int, pairs: int, interleaved: bool, block: int) -> None:
    pytest.importorskip("triton")
    from minillm.kernels.rope import launch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    x, angles = torch.randn(batch, heads, seq, 2 * pairs, device=device), torch.randn(seq, pairs, device=device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_PAIRS", block)
        y = rope(x, angles.cos(), angles.sin(), interleaved=interleaved, backend="triton")
    torch.testing.assert_close(y.double(), oracle(x, angles, interleaved=interleaved), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_transformers(backend: str, device: torch.device) -> None:
    query, key = torch.randn(2, 4, 9, 16, device=device), torch.randn(2, 2, 9, 16, device=device)
    cos, sin = (t.to(device) for t in RotaryEmbedding(16).cos_sin(torch.arange(9)))
    twice = (torch.cat([t, t], dim=-1).expand(2, 9, 16) for t in (cos, sin))
    for ours, theirs in zip((query, key), llama_apply(query, key, *twice), strict=True):
        torch.testing.assert_close(rope(ours, cos, sin, backend=backend), theirs, rtol=1e-6, atol=1e-6)
    theirs = gptj_apply(query.transpose(1, 2), sin.expand(2, 9, 8), cos.expand(2, 9, 8)).transpose(1, 2)
    torch.testing.assert_close(rope(query, cos, sin, interleaved=True, backend=backend), theirs, rtol=1e-6, atol=1e-6)


def test_twin_of_the_layers_rotation(device: torch.device) -> None:
    x, angles = torch.randn(2, 3, 5, 8, device=device), torch.randn(2, 5, 4, device=device)
    cos, sin = angles.cos(), angles.sin()
    torch.testing.assert_close(
        rope(x, cos, sin, backend="triton"), rotate(x, cos.unsqueeze(1), sin.unsqueeze(1)), rtol=1e-6, atol=1e-6
    )


def test_the_result_lies_in_memory_as_the_input_does(device: torch.device) -> None:
    projected = torch.randn(2, 9, 3 * 4 * 6, device=device)  # queries, keys and values of one projection
    query, key, _ = (part.unflatten(-1, (4, 6)).transpose(1, 2) for part in projected.chunk(3, dim=-1))
    angles = torch.randn(9, 3, device=device)
    for x in (query, key, query.mT.contiguous().mT, query[:1].expand(2, 4, 9, 6)):
        before = x.clone()
        y = rope(x, angles.cos(), angles.sin(), backend="triton")
        assert y.stride() == torch.empty_like(x).stride()
        assert relative_error(y, oracle(x, angles, interleaved=False)) <= TOLERANCE[torch.float32]
        assert torch.equal(x, before)  # not in place


def test_cosines_of_any_stride(device: torch.device) -> None:
    x, angles = torch.randn(2, 3, 9, 6, device=device), torch.randn(3, 9, device=device).T
    y = rope(x, angles.cos(), angles.contiguous().sin(), backend="triton")
    assert relative_error(y, oracle(x, angles, interleaved=False)) <= TOLERANCE[torch.float32]


def test_offsets_beyond_two_billion(device: torch.device) -> None:
    far = 2**31 - 8  # only the pages that are written become memory
    memory, angles = torch.empty(far + 64, dtype=torch.float16, device=device), torch.randn(2, 2, device=device)
    for strides in ((far, 8, 4, 1), (8, far, 4, 1), (8, 4, far, 1)):
        x = memory.as_strided((2, 2, 2, 4), strides)
        x.copy_(torch.randn(2, 2, 2, 4))
        y = torch.ops.minillm.rope(x.unflatten(-1, (4,)), angles.cos(), angles.sin(), False, False)
        assert relative_error(y, oracle(x, angles, interleaved=False)) <= TOLERANCE[torch.float16]


def test_gradients_of_every_order(device: torch.device) -> None:
    x = torch.randn(1, 2, 2, 4, dtype=torch.float64, device=device, requires_grad=True)
    cos, sin = torch.randn(2, 2, 2, dtype=torch.float64, device=device)
    for interleaved in (False, True):
        arguments = {"interleaved": interleaved, "backend": "triton"}
        assert torch.autograd.gradcheck(lambda x, k=arguments: rope(x, cos, sin, **k), (x,), fast_mode=True)
        assert torch.autograd.gradgradcheck(lambda x, k=arguments: rope(x, cos, sin, **k), (x,), fast_mode=True)


def test_angles_that_learn(device: torch.device) -> None:
    x = torch.randn(1, 2, 2, 4, dtype=torch.float64, device=device)
    cos, sin = (torch.randn(2, 2, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    with pytest.raises(ValueError, match="the kernel has no gradient for cos and sin, and one of them requires it"):
        rope(x, cos, sin, backend="triton")
    assert torch.autograd.gradcheck(lambda cos, sin: rope(x, cos, sin), (cos, sin))  # so "auto" takes the reference
    with torch.no_grad():
        rope(x, cos, sin, backend="triton")


def test_torch_compile_traces_through(device: torch.device) -> None:
    x, angles = torch.randn(2, 3, 5, 8, device=device, requires_grad=True), torch.randn(5, 4, device=device)
    cos, sin = angles.cos(), angles.sin()
    torch.library.opcheck(torch.ops.minillm.rope.default, (x, cos, sin, False, False))
    torch.library.opcheck(torch.ops.minillm.rope.default, (x.detach().mT.contiguous().mT, cos, sin, True, True))
    compiled = torch.compile(lambda x: rope(2 * x, cos, sin, backend="triton"), fullgraph=True, backend="aot_eager")
    y, dy = compiled(x), torch.randn_like(x)
    assert relative_error(y, oracle(2 * x, angles, interleaved=False)) <= TOLERANCE[torch.float32]
    (dx,) = torch.autograd.grad(y, x, dy)
    assert relative_error(dx, 2 * oracle(dy, -angles, interleaved=False)) <= TOLERANCE[torch.float32]


def test_wrong_input_is_refused() -> None:
    x, cos = torch.ones(2, 3, 5, 8), torch.ones(5, 4)
    with pytest.raises(TypeError, match=r"x must be floating point, got torch\.int64"):
        rope(x.long(), cos, cos)
    with pytest.raises(TypeError, match=r"sin must be floating point, got torch\.int64"):
        rope(x, cos, cos.long())
    with pytest.raises(TypeError, match="interleaved must be True or False, got 'no'"):
        rope(x, cos, cos, interleaved="no")
    with pytest.raises(ValueError, match=r"x must be \(batch, heads, seq, head_dim\) with an even head_dim, got shape"):
        rope(x[..., :7], cos, cos)
    with pytest.raises(ValueError, match=r"cos must be \(5, 4\) or \(2, 5, 4\) for x \(2, 3, 5, 8\)"):
        rope(x, torch.ones(1, 4), cos)  # would be broadcast
    with pytest.raises(ValueError, match=r"sin must be \(5, 4\) or \(2, 5, 4\)"):
        rope(x, cos, cos.expand(2, 5, 4))
    with pytest.raises(ValueError, match="backend='torch' cannot be used: PyTorch has no operator for rotary"):
        rope(x, cos, cos, backend="torch")
