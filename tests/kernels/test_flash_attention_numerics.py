"""The flash attention kernels against float64: output, log-sum-exp and every gradient."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minillm.kernels.flash_attention import triton_flash_attention
from minillm.kernels.testing import TOLERANCE, assert_untouched, guarded, relative_error, watched_memory


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, *, causal=False, window=None, alibi_slopes=None, scale=None
) -> tuple[Tensor, Tensor]:
    """Torch's own attention over the whole matrix of scores, and their log-sum-exp."""
    place = torch.arange(query.size(2), device=query.device)[:, None] + key.size(2) - query.size(2)
    distance = place - torch.arange(key.size(2), device=query.device)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if causal:
        hidden = hidden | (distance < 0)
    if window is not None:
        hidden = hidden | (distance.abs() >= window)
    bias = query.new_zeros(query.size(1), *distance.shape)
    if alibi_slopes is not None:
        bias = -alibi_slopes[:, None, None] * distance.abs()
    bias = bias.masked_fill(hidden, -torch.inf)
    scale = 1 / math.sqrt(query.size(3)) if scale is None else scale
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None], scale=scale, enable_gqa=True)
    group = query.size(1) // key.size(1)
    scores = query @ key.repeat_interleave(group, 1).mT * scale + bias
    seen = ~hidden.all(1)  # of a row of -inf alone the derivative would be NaN
    lse = torch.full_like(scores[..., 0], -torch.inf)
    lse[:, :, seen] = scores[:, :, seen].logsumexp(-1)
    return output, lse


def tensors(
    device, dtype=torch.float32, *, batch=1, n_heads=2, n_kv_heads=1, query_length=70, key_length=70, head_dim=32
) -> list[Tensor]:
    """Query, key and value between guards, and the gradients of output and log-sum-exp."""
    shapes = [(batch, n_heads, query_length, head_dim), *[(batch, n_kv_heads, key_length, head_dim)] * 2]
    inputs = [guarded(torch.randn(shape, dtype=dtype, device=device)).requires_grad_() for shape in shapes]
    d_output = guarded(torch.randn(shapes[0], dtype=dtype, device=device))
    return [*inputs, d_output, torch.randn(shapes[0][:3], device=device)]


def check(given: list[Tensor], *, tolerance=None, races=False, **settings) -> None:
    *inputs, d_output, d_lse = given
    with watched_memory(races=races):
        output, lse = triton_flash_attention(*inputs, **settings)
        gradients = torch.autograd.grad([output, lse], inputs, [d_output, d_lse.to(lse.dtype)])
    wide = [x.detach().double().requires_grad_() for x in inputs]
    slopes = settings.pop("alibi_slopes", None)
    expected, expected_lse = dense_attention(
        *wide, **settings, alibi_slopes=None if slopes is None else slopes.double()
    )
    seen = expected_lse.isfinite()
    expected_gradients = torch.autograd.grad(
        [expected, expected_lse[seen]], wide, [d_output.double(), d_lse.double()[seen]]
    )
    for name, mine, right in zip(
        ("output", "log-sum-exp", "dQ", "dK", "dV"),
        (output, lse, *gradients),
        (expected, expected_lse, *expected_gradients),
        strict=True,
    ):
        assert relative_error(mine, right) <= (tolerance or TOLERANCE[inputs[0].dtype]), name
    assert (output.dtype, lse.dtype) == (inputs[0].dtype, torch.promote_types(inputs[0].dtype, torch.float32))
    for tensor in (*inputs, d_output):
        assert_untouched(tensor)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_equal_to_float64_attention(device, dtype, causal):
    check(tensors(device, dtype), causal=causal)


@pytest.mark.parametrize(("query_length", "key_length"), [(33, 75), (75, 33), (1, 65), (65, 1)])
def test_last_query_at_last_key(device, query_length, key_length):
    """More keys than queries, as after a cache; and more queries than keys, of which the first see nothing."""
    check(tensors(device, query_length=query_length, key_length=key_length), causal=True)


@pytest.mark.parametrize(("causal", "window"), [(True, 1), (True, 20), (False, 40), (True, 2**40)])
def test_window(device, causal, window):
    check(tensors(device, n_heads=1), causal=causal, window=window)


def test_window_beside_the_keys(device):
    """A window that the first queries' places, before the first key, do not reach, and tiles without any pair."""
    check(tensors(device, query_length=100, key_length=30), causal=False, window=5)


@pytest.mark.parametrize("causal", [False, True])
def test_alibi(device, causal):
    slopes = torch.tensor([0.5, 0.125], device=device)
    check(tensors(device, query_length=40), causal=causal, alibi_slopes=slopes)


@pytest.mark.parametrize(("batch", "n_heads", "n_kv_heads"), [(1, 4, 1), (1, 4, 2), (2, 2, 2)])
def test_grouped_heads(device, batch, n_heads, n_kv_heads):
    shape = {"batch": batch, "n_heads": n_heads, "n_kv_heads": n_kv_heads}
    check(tensors(device, **shape, query_length=20, key_length=40), causal=True)


@pytest.mark.parametrize("head_dim", [1, 20, 80])
def test_head_dim(device, head_dim):
    check(tensors(device, n_heads=1, query_length=34, head_dim=head_dim), causal=True)


@pytest.mark.parametrize("scale", [0.0, -0.5, 3.0])
def test_scale(device, scale):
    check(tensors(device, query_length=40), scale=scale)


def test_large_scores_do_not_overflow(device):
    given = tensors(device, query_length=40)
    with torch.no_grad():
        given[0] *= 300
    check(given, tolerance=2e-5)  # the scores themselves are known to 1e-7 of some 1000


def test_no_program_is_in_another_ones_way(device):
    check(tensors(device, batch=2, n_heads=2, query_length=40, key_length=50), races=True, causal=True)


def test_gradcheck(device):
    if device.type == "cuda":
        pytest.skip("float64 is for the interpreter only")
    query, key, value = (
        torch.randn(1, n_heads, length, 4, dtype=torch.float64, requires_grad=True)
        for n_heads, length in ((2, 3), (1, 5), (1, 5))
    )
    slopes = torch.tensor([0.5, 0.25])
    assert torch.autograd.gradcheck(
        lambda *inputs: triton_flash_attention(*inputs, causal=True, window=4, alibi_slopes=slopes, scale=0.5),
        (query, key, value),
        fast_mode=True,
    )


@pytest.mark.parametrize(("batch", "query_length", "key_length"), [(0, 3, 3), (1, 0, 5), (1, 5, 0), (1, 0, 0)], ids=str)
def test_empty(device, batch, query_length, key_length):
    query = torch.randn(batch, 2, query_length, 16, device=device, requires_grad=True)
    key, value = (torch.randn(batch, 1, key_length, 16, device=device, requires_grad=True) for _ in range(2))
    output, lse = triton_flash_attention(query, key, value)
    assert output.shape == query.shape
    assert torch.equal(output, torch.zeros_like(output))
    assert torch.equal(lse, torch.full((batch, 2, query_length), -torch.inf, device=device))
    for x, gradient in zip((query, key, value), torch.autograd.grad(output.sum(), [query, key, value]), strict=True):
        assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("order", ["sequence first", "last dimension strided", "expanded"])
def test_strides(device, order):
    def arrange(x: Tensor) -> Tensor:
        if order == "sequence first":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if order == "last dimension strided":
            return x.mT.contiguous().mT
        return x[:, :1].expand_as(x)

    given = [arrange(torch.randn(1, 2, 40, 16, device=device)) for _ in range(4)]
    given = [x.detach().requires_grad_(i < 3) for i, x in enumerate(given)]
    output, _ = triton_flash_attention(*given[:3])
    gradients = torch.autograd.grad(output, given[:3], given[3])
    wide = [x.detach().double().requires_grad_() for x in given[:3]]
    expected, _ = dense_attention(*wide)
    expected_gradients = torch.autograd.grad(expected, wide, given[3].double())
    for mine, right in zip((output, *gradients), (expected, *expected_gradients), strict=True):
        assert relative_error(mine, right) <= TOLERANCE[torch.float32]
    if order == "sequence first":
        assert output.stride() == given[0].stride()  # so that the heads can be joined without a copy


@pytest.mark.parametrize(
    ("shape", "n_kv_heads", "strides"),
    [((3, 1, 5), 1, (1, 0, 0)), ((1, 3, 5), 3, (0, 1, 0)), ((1, 3, 5), 1, (0, 1, 0)), ((1, 1, 33), 1, (0, 0, 16))],
)
def test_offsets_beyond_int32(shape, n_kv_heads, strides, device):
    """Strides within int32, whose products with an index are not; the memory between the numbers is never touched."""
    far = 2**30 + 8
    strides = [far // stride if stride else 0 for stride in strides]
    memory = torch.empty(2 * far + 400, dtype=torch.float16, device=device)
    strides = [strides[0], strides[1], strides[2] or 64, 1]
    heads = [shape[1], n_kv_heads, n_kv_heads, shape[1]]
    query, key, value, d_output = (
        memory.as_strided((shape[0], n_heads, shape[2], 16), strides, 16 * number)
        for number, n_heads in enumerate(heads)
    )
    for tensor in (query, key, value, d_output):
        tensor.copy_(torch.randn(tensor.shape))
    inputs = [tensor.requires_grad_() for tensor in (query, key, value)]
    with watched_memory(races=False):
        output, _ = triton_flash_attention(*inputs)
        gradients = torch.autograd.grad(output, inputs, d_output)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    expected, _ = dense_attention(*exact)
    assert relative_error(output, expected) <= TOLERANCE[torch.float16]
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, exact, d_output.double()), strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE[torch.float16]
