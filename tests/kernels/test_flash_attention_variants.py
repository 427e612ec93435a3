"""Packed sequences, block-sparse patterns, torch.compile and refusals of the flash attention kernels."""

import re

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from minillm.kernels.flash_attention import BlockSparse, triton_flash_attention, triton_refuses
from minillm.kernels.flash_attention.block_tables import block_tables
from minillm.kernels.flash_attention.launch import flash_attention_forward
from minillm.kernels.runtime import interpreted
from minillm.kernels.testing import TOLERANCE, assert_untouched, guarded, relative_error, watched_memory


def masked_attention(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Torch's attention of (heads, length, head_dim) under a mask, in float64, and the log-sum-exp."""
    bias = torch.zeros(allowed.shape, dtype=query.dtype, device=query.device).masked_fill(~allowed, -torch.inf)
    output = F.scaled_dot_product_attention(query[None], key[None], value[None], attn_mask=bias, enable_gqa=True)[0]
    key = key.repeat_interleave(query.size(0) // key.size(0), 0)
    scores = query @ key.mT / query.size(-1) ** 0.5 + bias
    return output, scores.masked_fill(~allowed.any(1, keepdim=True), 0).logsumexp(-1)


def band(query_length: int, key_length: int, causal: bool, window: int | None) -> Tensor:
    distance = torch.arange(query_length)[:, None] + key_length - query_length - torch.arange(key_length)
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return allowed if window is None else allowed & (distance.abs() < window)


def check_gradients(output: Tensor, expected: Tensor, inputs: list[Tensor], wide: list[Tensor], dtype) -> None:
    assert relative_error(output, expected) <= TOLERANCE[dtype]
    d_output = torch.randn_like(output)
    with watched_memory(races=False):
        gradients = torch.autograd.grad(output, inputs, d_output)
    expected_gradients = torch.autograd.grad(expected, wide, d_output.double())
    for name, mine, right in zip(("dQ", "dK", "dV"), gradients, expected_gradients, strict=True):
        assert relative_error(mine, right) <= TOLERANCE[dtype], name
    for tensor in inputs:
        assert_untouched(tensor)


@pytest.mark.parametrize(
    ("dtype", "causal", "window"),
    [(torch.float32, False, 12), (torch.bfloat16, True, None)],
)
def test_packed_sequences(device, dtype, causal, window):
    """Lengths of none, one, a tile and more; queries without keys, keys without queries; rows of no sequence."""
    query_lengths, key_lengths = [3, 0, 40, 5, 1], [9, 4, 33, 0, 40]
    shapes = [(2, sum(query_lengths) + 2, 16), *[(1, sum(key_lengths), 16)] * 2]
    inputs = [guarded(torch.randn(shape, dtype=dtype, device=device)).requires_grad_() for shape in shapes]
    offsets = [
        torch.tensor([0, *lengths], dtype=integer, device=device).cumsum(0, dtype=integer)
        for lengths, integer in ((query_lengths, torch.int32), (key_lengths, torch.int64))
    ]
    with watched_memory():
        output, lse = triton_flash_attention(
            *inputs, causal=causal, window=window, query_offsets=offsets[0], key_offsets=offsets[1]
        )
    wide = [x.detach().double().requires_grad_() for x in inputs]
    parts = []
    for i, (m, n) in enumerate(zip(query_lengths, key_lengths, strict=True)):
        rows = slice(int(offsets[0][i]), int(offsets[0][i + 1]))
        columns = slice(int(offsets[1][i]), int(offsets[1][i + 1]))
        allowed = band(m, n, causal, window).to(device)
        if m and n:
            part, part_lse = masked_attention(wide[0][:, rows], wide[1][:, columns], wide[2][:, columns], allowed)
            seen = allowed.any(1)
            assert relative_error(lse[:, rows][:, seen], part_lse[:, seen]) <= TOLERANCE[torch.float32]
        else:
            part = wide[0][:, rows] * 0
        parts.append(part)
    parts.append(wide[0][:, -2:] * 0)
    assert lse.shape == (2, sum(query_lengths) + 2)
    assert torch.equal(lse[:, -2:], torch.full_like(lse[:, -2:], -torch.inf))
    check_gradients(output, torch.cat(parts, 1), inputs, wide, dtype)


def test_packed_sequences_of_one_kind_need_one_list_of_offsets(device):
    x = torch.randn(2, 7, 16, device=device)
    offsets = torch.tensor([0, 4, 7], device=device)
    packed, _ = triton_flash_attention(x, x, x, causal=True, query_offsets=offsets)
    one, _ = triton_flash_attention(x[None, :, :4], x[None, :, :4], x[None, :, :4], causal=True)
    other, _ = triton_flash_attention(x[None, :, 4:], x[None, :, 4:], x[None, :, 4:], causal=True)
    assert torch.equal(packed, torch.cat([one, other], 2)[0])
    nothing, _ = triton_flash_attention(x[:, :0], x[:, :0], x[:, :0], query_offsets=offsets[:1])
    assert nothing.shape == (2, 0, 16)


def layout(allowed: Tensor, block_size: int) -> BlockSparse:
    """The tiles of a mask, one by one."""
    rows, columns = (-(-length // block_size) for length in allowed.shape)
    states, numbers = torch.zeros(rows, columns, dtype=torch.int8), torch.full((rows, columns), -1)
    masks = []
    for i in range(rows):
        for j in range(columns):
            tile = allowed[i * block_size : (i + 1) * block_size, j * block_size : (j + 1) * block_size]
            if tile.all():
                states[i, j] = 2
            elif tile.any():
                states[i, j], numbers[i, j] = 1, len(masks)
                masks.append(F.pad(tile, (0, block_size - tile.size(1), 0, block_size - tile.size(0))))
    stacked = torch.stack(masks) if masks else torch.zeros(0, block_size, block_size, dtype=torch.bool)
    return BlockSparse(states, numbers, stacked, block_size)


@pytest.mark.parametrize(
    ("query_length", "key_length", "block_size", "causal", "window"),
    [(70, 70, 16, False, None), (70, 70, 32, True, None), (40, 100, 48, False, 30), (100, 75, 64, True, 50)],
)
def test_block_sparse(device, query_length, key_length, block_size, causal, window):
    """Random tiles, dead, full and partial, that do not fit into the lengths; the band hides more on top."""
    kinds = torch.randint(0, 3, (-(-query_length // 16), -(-key_length // 16)))
    kinds[1] = 0  # queries that see nothing
    spread = kinds.repeat_interleave(16, 0).repeat_interleave(16, 1)[:query_length, :key_length]
    allowed = (spread == 2) | ((spread == 1) & (torch.rand(spread.shape) < 0.3))
    sparse = layout(allowed, block_size)
    sparse = BlockSparse(*(part.to(device) for part in (sparse.states, sparse.mask_numbers, sparse.masks)), block_size)
    shapes = [(1, 2, query_length, 16), *[(1, 1, key_length, 16)] * 2]
    inputs = [guarded(torch.randn(shape, device=device)).requires_grad_() for shape in shapes]
    with watched_memory():
        output, lse = triton_flash_attention(*inputs, causal=causal, window=window, sparse=sparse)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    allowed = (allowed & band(query_length, key_length, causal, window)).to(device)
    expected, expected_lse = masked_attention(*(x[0] for x in wide), allowed)
    seen = allowed.any(1)
    assert relative_error(lse[0][:, seen], expected_lse[:, seen]) <= TOLERANCE[torch.float32]
    assert bool((lse[0][:, ~seen] == -torch.inf).all())
    check_gradients(output, expected[None], inputs, wide, torch.float32)


def test_block_sparse_with_alibi(device):
    """Everything at once; a layout without a single live tile gives zeros."""
    x = torch.randn(1, 2, 40, 16, device=device, requires_grad=True)
    slopes = torch.tensor([0.5, 1.0], device=device)
    full = layout(torch.ones(40, 40, dtype=torch.bool), 16)
    full = BlockSparse(*(part.to(device) for part in (full.states, full.mask_numbers, full.masks)), 16)
    one, _ = triton_flash_attention(x, x, x, causal=True, alibi_slopes=slopes, sparse=full)
    other, _ = triton_flash_attention(x, x, x, causal=True, alibi_slopes=slopes)
    assert relative_error(one, other) <= TOLERANCE[torch.float32]
    dead = BlockSparse(torch.zeros_like(full.states), full.mask_numbers, full.masks, 16)
    output, lse = triton_flash_attention(x, x, x, sparse=dead)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    assert not output.any()
    assert not gradient.any()
    assert bool((lse == -torch.inf).all())


def test_torch_compile_traces_through(device):
    query, key, value = (torch.randn(1, n, 20, 16, device=device, requires_grad=True) for n in (2, 1, 1))
    slopes = torch.tensor([0.5, 0.25], device=device)

    def attend(query, key, value):
        output, lse = triton_flash_attention(2 * query, key, value, causal=True, window=7, alibi_slopes=slopes)
        return output.transpose(1, 2).flatten(2), lse

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results, expected = compiled(query, key, value), attend(query, key, value)
    gradients, expected_gradients = (
        torch.autograd.grad(output.square().sum() + lse.sum(), [query, key, value])
        for output, lse in (results, expected)
    )
    for mine, right in zip((*results, *gradients), (*expected, *expected_gradients), strict=True):
        assert relative_error(mine, right) <= TOLERANCE[torch.float32]
    for length in (33, 41):  # lengths are symbols from the second one on
        longer = [torch.randn(1, n, length, 16, device=device) for n in (2, 1, 1)]
        for mine, right in zip(compiled(*longer), attend(*longer), strict=True):
            assert relative_error(mine, right) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", ["packed", "sparse"])
def test_operators_keep_their_promises(device, kind):
    """Schema, fake version and gradient, checked by torch."""
    x = torch.randn(2, 18, 16, device=device)
    offsets, tables = None, []
    if kind == "packed":
        offsets = torch.tensor([0, 7, 18], device=device)
    else:  # laid out as (batch, length, heads, head_dim)
        x = x.transpose(0, 1).contiguous().transpose(0, 1)[None]
    if kind == "sparse":
        tables = block_tables(layout(torch.rand(18, 18) < 0.7, 16), 16, 18, 18, None, None)
        tables = [table.to(device) for table in tables]
    inputs = [x.detach().clone().requires_grad_() for _ in range(3)]
    torch.library.opcheck(flash_attention_forward, (*inputs, None, offsets, offsets, tables, 0.25, None, 0, 18, 18))


def test_a_second_derivative_is_refused(device):
    x = torch.randn(1, 1, 5, 16, device=device, requires_grad=True)
    output, _ = triton_flash_attention(x, x, x)
    (gradient,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), x)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"key": torch.zeros(1, 1, 4, 16, dtype=torch.float16)}, "one dtype, got torch.float32, torch.float16"),
        ({"value": torch.zeros(1, 1, 4, 8)}, "value_dim must equal head_dim = 16, got 8"),
        ({"block_size": 24}, "block_size must be a multiple of 16, .* got 24"),
    ],
)
def test_what_the_kernels_refuse(changes, problem):
    given = {"query": torch.zeros(1, 2, 4, 16), "key": torch.zeros(1, 1, 4, 16), "value": torch.zeros(1, 1, 4, 16)}
    assert triton_refuses(**given) is None
    assert re.search(problem, str(triton_refuses(**{**given, **changes})))


def test_wrong_shapes_are_refused(device):
    x = torch.zeros(1, 2, 4, 16)
    wide = torch.zeros(1, 2, 4, 512)
    assert "head_dim must be in 1 ... 256, got 512" in str(triton_refuses(wide, wide, wide))
    if not interpreted():
        assert "float64" in str(triton_refuses(x.double(), x.double(), x.double()))
    with pytest.raises(ValueError, match=r"4 dimensions, got query \(2, 4, 16\)"):
        triton_flash_attention(x[0], x[0], x[0])
    with pytest.raises(ValueError, match="heads of key must divide those of query, got 2 and 3"):
        triton_flash_attention(torch.zeros(1, 3, 4, 16), x, x)
    with pytest.raises(ValueError, match="key must be shaped as value"):
        triton_flash_attention(x, x[:, :, :3], x)
    with pytest.raises(ValueError, match=r"alibi_slopes must have shape \(2,\), got \(3,\)"):
        triton_flash_attention(x, x, x, alibi_slopes=torch.ones(3))
    sparse = layout(torch.ones(4, 4, dtype=torch.bool), 16)
    with pytest.raises(ValueError, match="sparse must be None for packed"):
        triton_flash_attention(x[0], x[0], x[0], sparse=sparse, query_offsets=torch.tensor([0, 4]))
