"""Split-KV decoding against attention written out in float64 and torch's: reference, kernels, compiler."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right

from minillm.kernels import split_kv_decode
from minillm.kernels.compile_only import SHARED_MEMORY, compile_only, recorded_launches
from minillm.kernels.flash_decode.launch import blocks, default_splits
from minillm.kernels.flash_decode.reference import merge_partial_attention, partial_attention
from minillm.kernels.testing import TOLERANCE, assert_untouched, guarded, relative_error, watched_memory

BACKENDS = ("reference", "torch", "triton")


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    lengths: Tensor | None = None,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One query at a time: the keys it sees, their softmax in float64, the weighted sum."""
    batch, n_heads, n_new, head_dim = query.shape
    group = n_heads // key.size(1)
    output = torch.zeros(query.shape, dtype=torch.float64, device=query.device)
    for b in range(batch):
        length = key.size(2) if lengths is None else int(lengths[b])
        for t in range(n_new):
            place = length - n_new + t
            first = 0 if window is None else max(0, place - window + 1)
            if place < 0:
                continue
            for h in range(n_heads):
                keys, values = (cache[b, h // group, first : place + 1].double() for cache in (key, value))
                scores = keys @ query[b, h, t].double() * (1 / math.sqrt(head_dim) if scale is None else scale)
                if alibi_slopes is not None:
                    scores -= alibi_slopes[h].double() * torch.arange(place - first, -1, -1, device=query.device)
                output[b, h, t] = scores.softmax(0) @ values
    return output


def tensors(
    shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key, value; ``shape``: batch, n_heads, n_kv_heads, n_new, capacity, head_dim."""
    batch, n_heads, n_kv_heads, n_new, capacity, head_dim = shape
    query = torch.randn(batch, n_heads, n_new, head_dim, device=device)
    key, value = torch.randn(2, batch, n_kv_heads, capacity, head_dim, device=device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


PLAIN: dict[str, Any] = {}
SLOPES = {"alibi_slopes": True, "scale": 0.5}
# One key head for all, groups of 3 with 3 new tokens (9 rows, no power of two), as many key heads as heads.
CASES = {
    "one-head": ((2, 4, 1, 1, 150, 16), {"lengths": [150, 71]}, 3),
    "groups": ((2, 6, 2, 3, 140, 32), {"lengths": [139, 2], "window": 50}, 2),  # 2 keys for 3 tokens: one sees none
    "slopes": ((3, 2, 2, 2, 70, 64), {"lengths": [70, 0, 1], **SLOPES}, 2),
    "unsplit": ((1, 4, 2, 1, 90, 32), PLAIN, 1),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_values(backend: str, dtype: torch.dtype, case: str, device: torch.device) -> None:
    shape, options, n_splits = CASES[case]
    query, key, value = tensors(shape, dtype, device)
    options = dict(options)
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.rand(shape[1], device=device)
    if "lengths" in options:
        lengths = options["lengths"] = torch.tensor(options["lengths"], device=device, dtype=torch.int32)
        for b, length in enumerate(lengths.tolist()):
            key[b, :, length:] = math.nan  # memory that was never filled
            value[b, :, length:] = math.nan
    expected = oracle(query, key, value, **options)
    query, key, value = guarded(query), guarded(key), guarded(value)
    with watched_memory():
        output = split_kv_decode(query, key, value, n_splits=n_splits, backend=backend, **options)
    assert output.dtype == dtype
    assert relative_error(output, expected) <= TOLERANCE[dtype]
    for tensor in (query, key, value):
        assert_untouched(tensor)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    n_new=st.integers(1, 4),
    capacity=st.integers(4, 30),
    n_splits=st.integers(1, 40),
)
def test_any_number_of_splits_gives_torchs_attention(seed, heads, n_new, capacity, n_splits):
    torch.manual_seed(seed)
    query, key, value = tensors((2, *heads, n_new, capacity, 8), torch.float64, torch.device("cpu"))
    query.requires_grad_(), key.requires_grad_(), value.requires_grad_()
    mask = causal_lower_right(n_new, capacity)
    expected = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    dout = torch.randn_like(expected)
    want = torch.autograd.grad(expected, (query, key, value), dout)
    for backend in ("reference", "torch"):
        output = split_kv_decode(query, key, value, n_splits=n_splits, backend=backend)
        torch.testing.assert_close(output, expected, atol=1e-12, rtol=1e-12)
        for a, b in zip(torch.autograd.grad(output, (query, key, value), dout), want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_partial_results_merge_into_the_whole_however_large_the_scores():
    scores = torch.randn(3, 10, dtype=torch.float64) * 1000
    scores[1, :4] = -math.inf  # a piece in which this row sees nothing
    scores[2] = -math.inf  # a row that sees nothing at all
    value = torch.randn(10, 4, dtype=torch.float64)
    pieces = [partial_attention(scores[:, part], value[part]) for part in (slice(4), slice(4, 5), slice(5, 10))]
    outputs, lses = (torch.stack(parts) for parts in zip(*pieces, strict=True))
    whole = torch.cat([scores[:2].softmax(1) @ value, torch.zeros(1, 4, dtype=torch.float64)])
    merged, lse = merge_partial_attention(outputs, lses)
    torch.testing.assert_close(merged, whole, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(lse, scores.logsumexp(1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_without_keys_and_nothing_to_do(backend: str, device: torch.device) -> None:
    query, key, value = tensors((2, 2, 1, 2, 20, 16), torch.float32, device)
    none = torch.zeros(2, dtype=torch.int64, device=device)
    zeros = torch.zeros_like(query)
    assert torch.equal(split_kv_decode(query, key, value, lengths=none, n_splits=3, backend=backend), zeros)
    assert torch.equal(split_kv_decode(query, key[:, :, :0], value[:, :, :0], backend=backend), zeros)
    assert split_kv_decode(query[:0], key[:0], value[:0], backend=backend).shape == (0, 2, 2, 16)
    assert split_kv_decode(query[:0], key[:0], value[:0], lengths=none[:0], backend=backend).shape == (0, 2, 2, 16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_of_any_kind(backend: str, device: torch.device) -> None:
    # A cache laid out token after token, queries cut out of a joint projection, every second sequence.
    key, value = torch.randn(2, 4, 50, 2, 16, device=device).transpose(2, 3)[:, ::2]
    query = torch.randn(2, 1, 12, 16, device=device).transpose(1, 2)[:, ::3]
    lengths = torch.tensor([50, 0, 33, 0], device=device)[::2]
    output = split_kv_decode(query, key, value, lengths=lengths, backend=backend)
    assert relative_error(output, oracle(query, key, value, lengths=lengths)) <= TOLERANCE[torch.float32]
    across = torch.randn(2, 2, 16, 50, device=device).transpose(2, 3)  # head_dim is not the innermost
    output = split_kv_decode(query, across, across, backend=backend)
    assert relative_error(output, oracle(query, across, across)) <= TOLERANCE[torch.float32]


def test_offsets_beyond_32_bits(device: torch.device) -> None:
    far = 2**30 + 8  # a stride within int32, twice which is not; only the pages that are written become memory
    memory = torch.empty(19 * (far // 9) + 400, dtype=torch.float16, device=device)
    for shape, strides in (((3, 1, 20), (far, 0, 16)), ((1, 3, 20), (0, far, 16)), ((1, 1, 20), (0, 0, far // 9))):
        cache = memory.as_strided((*shape, 16), (*strides, 1))
        query = memory.as_strided((*shape[:2], 1, 16), (*strides, 1), 20 * 16)
        for tensor in (cache, query):
            tensor.copy_(torch.randn(tensor.shape))
        with watched_memory(races=False):
            output = split_kv_decode(query, cache, cache, backend="triton")
        assert relative_error(output, oracle(query, cache, cache)) <= TOLERANCE[torch.float16]


def test_lengths_that_cannot_be_lead_nowhere(device: torch.device) -> None:
    query, key, value = (guarded(tensor) for tensor in tensors((3, 2, 1, 1, 40, 16), torch.float32, device))
    lengths = torch.tensor([-5, 45, 2**31 - 1], device=device)  # as on a GPU, where they cannot be refused
    with watched_memory(races=False):
        output = torch.ops.minillm.split_kv_decode(query, key, value, lengths, 2, 0.25, None, None)
    expected = oracle(query, key, value, lengths=lengths.clamp(0, 40), scale=0.25)
    assert relative_error(output, expected) <= TOLERANCE[torch.float32]


def test_pieces_are_as_many_as_fill_the_device():
    assert default_splits(1, 100_000, 132) == 128  # one sequence, one key head: the most there may be
    assert default_splits(8, 100_000, 132) == 33  # ceil(264 / 8)
    assert default_splits(8, 2_000, 132) == 8  # 256 keys at least
    assert default_splits(512, 100_000, 132) == 1
    assert default_splits(4, 100, 132) == 1
    assert default_splits(0, 0, 132) == 1
    for head_dim in (16, 32, 64, 128, 256):
        for dtype in (torch.float32, torch.bfloat16):
            rows, keys = blocks(1, head_dim, dtype)
            assert rows == 16
            assert 16 <= keys <= 128


def test_the_kernels_have_no_gradient_and_say_so(device: torch.device) -> None:
    query, key, value = tensors((1, 2, 1, 1, 10, 16), torch.float32, device)
    query.requires_grad_()
    with pytest.raises(ValueError, match="for inference and have no gradient"):
        split_kv_decode(query, key, value, backend="triton")
    with torch.no_grad():
        split_kv_decode(query, key, value, backend="triton")
    split_kv_decode(query, key, value).sum().backward()  # by default, a backend that has one
    assert query.grad is not None


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_with_lengths_window_and_slopes(backend: str) -> None:
    query, key, value = tensors((3, 2, 1, 2, 6, 3), torch.float64, torch.device("cpu"))
    options = {"lengths": torch.tensor([6, 0, 1]), "window": 3, "n_splits": 2}
    slopes = torch.rand(2, dtype=torch.float64)

    def decode(*args: Tensor) -> Tensor:
        return split_kv_decode(*args[:3], alibi_slopes=args[3], backend=backend, **options)

    for tensor in (query, key, value, slopes):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(decode, (query, key, value, slopes))


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_autocast_changes_nothing(backend: str, device: torch.device) -> None:
    query, key, value = tensors((2, 4, 2, 1, 20, 16), torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        output = split_kv_decode(query, key, value, backend=backend)
    assert output.dtype is torch.float32
    assert relative_error(output, oracle(query, key, value)) <= TOLERANCE[torch.float32]


def test_torch_compile_traces_through(device: torch.device) -> None:
    query, key, value = tensors((2, 2, 1, 1, 40, 16), torch.float32, device)
    lengths, slopes = torch.tensor([40, 20], device=device), torch.rand(2, device=device)
    arguments = (query, key, value, lengths, 2, 0.25, 9, slopes)
    torch.library.opcheck(torch.ops.minillm.split_kv_decode.default, arguments)
    compiled = torch.compile(
        lambda q: split_kv_decode(2 * q, key, value, lengths=lengths, backend="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    assert relative_error(compiled(query), oracle(2 * query, key, value, lengths=lengths)) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("error", "match", "changes"),
    [
        (ValueError, r"query must be \(batch, n_heads, n_new, head_dim\)", {"query": torch.zeros(2, 4, 16)}),
        (ValueError, r"got \(2, 4, 1, 8\), \(2, 2, 9, 16\)", {"query": torch.zeros(2, 4, 1, 8)}),
        (ValueError, r"heads of query \(3\) must be a multiple .* \(2\)", {"query": torch.zeros(2, 3, 1, 16)}),
        (ValueError, "1 to 16 new tokens a sequence, got 17", {"query": torch.zeros(2, 4, 17, 16)}),
        (TypeError, "one floating-point dtype, got torch.float16", {"query": torch.zeros(2, 4, 1, 16).half()}),
        (ValueError, r"n_splits must be in \[1, 128\], or None, got 0", {"n_splits": 0}),
        (TypeError, r"n_splits must be an integer, or None, got 2\.5", {"n_splits": 2.5}),
        (ValueError, "scale must be a finite number, or None, got nan", {"scale": float("nan")}),
        (ValueError, r"window must be at least 1 \(a token sees itself\), or None, got 0", {"window": 0}),
        (ValueError, "alibi_slopes must be floating point, one for each of the 4", {"alibi_slopes": torch.zeros(2)}),
        (TypeError, "lengths must be int32 or int64, got torch.float32", {"lengths": torch.zeros(2)}),
        (ValueError, "one number for each of the 2 sequences", {"lengths": torch.zeros(3).long()}),
        (ValueError, r"in \[0, capacity=9\], got \[3, 10\]", {"lengths": torch.tensor([3, 10])}),
        (
            ValueError,
            "'triton' cannot be used: head_dim must be one of 16, 32, 64, 128, 256, got 24",
            {
                "query": torch.zeros(2, 4, 1, 24),
                "key": torch.zeros(2, 2, 9, 24),
                "value": torch.zeros(2, 2, 9, 24),
                "backend": "triton",
            },
        ),
    ],
)
def test_wrong_input_is_refused(error: type[Exception], match: str, changes: dict[str, Any]) -> None:
    key = torch.zeros(2, 2, 9, 16)
    with pytest.raises(error, match=match):
        split_kv_decode(**({"query": torch.zeros(2, 4, 1, 16), "key": key, "value": key} | changes))


def test_the_compiler_accepts_it(device: torch.device) -> None:
    launches, lengths = [], torch.full((2,), 256, dtype=torch.int32)
    for capability, head_dim in ((80, 128), (90, 64)):
        query, key, value = tensors((2, 8, 2, 1, 256, head_dim), torch.bfloat16, torch.device("cpu"))
        with recorded_launches(capability) as recorded:
            split_kv_decode(query, key, value, lengths=lengths, window=99, n_splits=2, backend="triton")
        launches += recorded
    for compiled in compile_only(launches):
        assert compiled.spilled == 0
        assert compiled.shared <= min(SHARED_MEMORY.values())
        if "decode_splits" in compiled.kernel:
            assert compiled.count("mma.sync")  # 16 rows: too few for wgmma, which wants 64
            assert compiled.count("cp.async")
