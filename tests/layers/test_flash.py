"""Flash attention, by both orders of its loops, is torch's attention under explicit masks, and keeps no scores."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from minillm.layers import MultiHeadAttention, alibi_bias, alibi_slopes
from minillm.layers.counter_random import attention_dropout_kept
from minillm.layers.flash import FlashAttention, flash_attention
from minillm.layers.flash_autograd import tiled_flash_attention
from minillm.layers.flash_loops import flash_attention_1_forward, flash_attention_2_forward
from minillm.layers.flash_tiles import FlashSettings, Record
from minillm.layers.online_softmax import merge_partial_attention
from minillm.layers.sparse_compounds import big_bird, longformer, star
from minillm.layers.sparse_patterns import band, causal, sliding_window

Inputs = list[Tensor]
reference = partial(flash_attention, backend="reference")


def _inputs(
    query_length: int,
    key_length: int,
    *,
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (8, 6),
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    shapes = [
        (batch, heads[0], query_length, dims[0]),
        (batch, heads[1], key_length, dims[0]),
        (batch, heads[1], key_length, dims[1]),
    ]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def _bias(
    inputs: Inputs, *, is_causal: bool, window: int | None, slopes: Tensor | None, allowed: Tensor | None
) -> Tensor:
    """Everything that flash attention computes in a tile as one matrix, pair by pair: (n_heads, query, key)."""
    heads, query_length, key_length = inputs[0].size(1), inputs[0].size(2), inputs[1].size(2)
    back = torch.arange(query_length)[:, None] + key_length - query_length - torch.arange(key_length)
    seen = torch.ones_like(back, dtype=torch.bool) if allowed is None else allowed.clone()
    if is_causal:
        seen &= back >= 0
    if window is not None:
        seen &= back.abs() < window
    penalty = torch.zeros(heads, 1, 1) if slopes is None else slopes[:, None, None]
    return (-penalty.double() * back.abs()).masked_fill(~seen, -math.inf)


def _expected(
    inputs: Inputs, bias: Tensor, *, scale: float | None = None, kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp in float64: torch's softmax of all scores, with zeros and -inf where nothing is seen."""
    query, key, value = (tensor.double() for tensor in inputs)
    groups = query.size(1) // key.size(1)
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (query.size(3) ** -0.5 if scale is None else scale) + bias
    empty = (scores == -math.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    log_sums = scores.masked_fill(empty, 0.0).logsumexp(-1).masked_fill(empty[..., 0], -math.inf)
    return (weights if kept is None else weights * kept) @ value, log_sums


def _close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Relative to the largest number of the whole tensor, and infinities in the same places."""
    hidden = expected == -math.inf
    assert torch.equal(actual == -math.inf, hidden)
    actual, expected = actual.double().masked_fill(hidden, 0.0), expected.masked_fill(hidden, 0.0)
    assert actual.shape == expected.shape
    assert actual.isfinite().all()
    if expected.numel():
        assert (actual - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item())


def _check(
    ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], inputs: Inputs, tolerance: float = 1e-12
) -> None:
    """Values and gradients, through output and log-sum-exp."""
    for one, other in zip(ours, theirs, strict=True):
        _close(one, other.detach(), tolerance)
    weights = torch.randn_like(ours[0]), torch.randn_like(ours[1])

    def total(output: Tensor, log_sums: Tensor) -> Tensor:
        finite = log_sums.masked_fill(log_sums == -math.inf, 0.0)  # of the others there is no derivative
        return (output.double() * weights[0].double()).sum() + (finite.double() * weights[1].double()).sum()

    gradients = torch.autograd.grad(total(*ours), inputs), torch.autograd.grad(total(*theirs), inputs)
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == other.dtype
        _close(one, other.double(), tolerance)


LENGTHS = st.integers(0, 40)
HEADS = st.sampled_from([(1, 1), (3, 3), (4, 2), (4, 1)])


@settings(max_examples=60, deadline=None)
@given(
    st.tuples(LENGTHS, LENGTHS),
    HEADS,
    st.booleans(),
    st.none() | st.integers(1, 45),
    st.booleans(),
    st.sampled_from([0.0, 0.3]),
    st.tuples(st.integers(1, 50), st.integers(1, 50)),
    st.integers(0, 2**20),
)
def test_any_lengths_heads_variants_and_tiles(lengths, heads, is_causal, window, alibi, dropout, tiles, seed):
    torch.manual_seed(seed)
    inputs = _inputs(*lengths, heads=heads)
    slopes = torch.rand(heads[0]) if alibi else None
    kept = None
    if dropout:
        numbers = (torch.arange(n).view(-1, *(1,) * (3 - axis)) for axis, n in enumerate((2, heads[0], *lengths)))
        kept = attention_dropout_kept(*numbers, p=dropout, seed=seed).double() / (1 - dropout)
    chosen = FlashSettings(is_causal, window, slopes, None, None, dropout, seed, *tiles)
    bias = _bias(inputs, is_causal=is_causal, window=window, slopes=slopes, allowed=None)
    expected = _expected(inputs, bias, kept=kept)
    _check(tiled_flash_attention(*inputs, chosen), expected, inputs)
    with torch.no_grad():
        for one, other in zip(flash_attention_1_forward(*inputs, chosen), expected, strict=True):
            _close(one, other)


PATTERNS = {
    "Longformer": longformer(6, global_places=[0, 9]),
    "BigBird": big_bird(4),
    "causal BigBird": big_bird(4) & causal(),
    "Star": star(),
    "nothing": ~band(1000),
    "everything": band(1000),
}


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(PATTERNS)),
    st.tuples(LENGTHS, LENGTHS),
    HEADS,
    st.booleans(),
    st.none() | st.integers(1, 20),
    st.booleans(),
    st.integers(1, 20),
    st.integers(0, 2**20),
)
def test_block_sparse_with_causality_window_and_alibi(name, lengths, heads, is_causal, window, alibi, block_size, seed):
    torch.manual_seed(seed)
    inputs, pattern = _inputs(*lengths, heads=heads), PATTERNS[name]
    slopes = torch.rand(heads[0]) if alibi else None
    ours = reference(
        *inputs,
        causal=is_causal,
        window=window,
        alibi_slopes=slopes,
        layout=pattern.blocks(*lengths, block_size),
        return_lse=True,
    )
    bias = _bias(inputs, is_causal=is_causal, window=window, slopes=slopes, allowed=pattern.dense(*lengths))
    _check(ours, _expected(inputs, bias), inputs)


@pytest.mark.parametrize("query_length", [1, 7, 20])
def test_it_is_torchs_causal_attention_of_the_last_queries(query_length):
    inputs = _inputs(query_length, 20, heads=(4, 4), dims=(8, 8))
    theirs = F.scaled_dot_product_attention(*inputs, causal_lower_right(query_length, 20))
    ours = reference(*inputs, causal=True)
    _close(ours, theirs.detach())
    for one, other in zip(
        torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(theirs.sum(), inputs), strict=True
    ):
        _close(one, other)


def test_alibi_is_the_bias_of_the_positions_chapter():
    inputs = _inputs(20, 33)
    bias = alibi_bias(4, 20, 33, dtype=torch.float64)
    theirs = F.scaled_dot_product_attention(
        *inputs, bias.masked_fill(torch.ones(20, 33).tril(13) == 0, -math.inf)[None], enable_gqa=True
    )
    _close(reference(*inputs, causal=True, alibi_slopes=alibi_slopes(4)), theirs.detach())
    symmetric = alibi_bias(4, 20, 33, dtype=torch.float64, symmetric=True)
    theirs = F.scaled_dot_product_attention(*inputs, symmetric[None], enable_gqa=True)
    _close(reference(*inputs, alibi_slopes=alibi_slopes(4)), theirs.detach())


@pytest.mark.parametrize("variant", ["plain", "everything at once", "block-sparse"])
def test_gradcheck(variant):
    inputs = _inputs(6, 9, batch=1, heads=(2, 1), dims=(3, 2))
    chosen = {
        "plain": FlashSettings(query_tile=4, key_tile=2),
        "everything at once": FlashSettings(
            causal=True,
            window=5,
            alibi_slopes=torch.tensor([0.5, 0.1]),
            scale=0.7,
            dropout=0.3,
            seed=5,
            query_tile=4,
            key_tile=4,
        ),
        "block-sparse": FlashSettings(layout=longformer(4).blocks(6, 9, 2)),
    }[variant]
    assert torch.autograd.gradcheck(lambda *tensors: tiled_flash_attention(*tensors, chosen), inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_narrow_dtypes_are_computed_in_float32(dtype, tolerance):
    inputs = _inputs(150, 170, dims=(32, 32), dtype=dtype)
    slopes = alibi_slopes(4)
    ours = reference(*inputs, causal=True, window=90, alibi_slopes=slopes, return_lse=True)
    assert ours[0].dtype == dtype
    assert ours[1].dtype == torch.float32
    bias = _bias(inputs, is_causal=True, window=90, slopes=slopes, allowed=None)
    _check(ours, _expected(inputs, bias), inputs, tolerance)


def test_scores_far_apart_stay_finite():
    query, key, value = (t.detach() for t in _inputs(20, 20, heads=(1, 1), dims=(64, 8), dtype=torch.float16))
    inputs = [query * 60, key * 20, value]  # in float16 the products would overflow
    expected = _expected(inputs, torch.zeros(1, 20, 20))[0]
    _close(reference(*inputs), expected, 2e-3)
    query, key, value = (t.detach() for t in _inputs(70, 70))
    inputs = [query * 1000, key * 1000, value]  # the maximum jumps from tile to tile
    chosen = FlashSettings(query_tile=16, key_tile=3)
    _close(flash_attention_2_forward(*inputs, chosen)[0], _expected(inputs, torch.zeros(4, 70, 70))[0], 1e-9)


def test_queries_before_the_first_key_see_nothing():
    inputs = _inputs(30, 10)
    output, log_sums = reference(*inputs, causal=True, return_lse=True)
    assert output[:, :, :20].eq(0).all()
    assert log_sums[:, :, :20].eq(-math.inf).all()
    assert log_sums[:, :, 20:].isfinite().all()
    gradients = torch.autograd.grad(output.sum() + log_sums[:, :, 20:].sum(), inputs)
    assert gradients[0][:, :, :20].eq(0).all()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("batch", "lengths"), [(0, (5, 5)), (2, (0, 5)), (2, (5, 0)), (2, (0, 0))])
def test_nothing_to_attend_from_or_to(backend, batch, lengths):
    inputs = _inputs(*lengths, batch=batch, dims=(8, 8))
    output = flash_attention(*inputs, backend=backend)
    assert torch.equal(output, torch.zeros(batch, 4, lengths[0], 8, dtype=torch.float64))
    for gradient in torch.autograd.grad(output.sum(), inputs):
        assert gradient.eq(0).all()


def test_strided_and_expanded_inputs_and_gradients():
    base = torch.randn(2, 24, 3, 4, 8, dtype=torch.float64, requires_grad=True)  # as one projection makes them
    query, key, value = base.permute(2, 0, 3, 1, 4)
    everything = torch.zeros(4, 24, 24)
    for columns in (slice(None), slice(None, None, 2)):
        parts = [tensor[..., columns] for tensor in (query, key, value)]
        for backend in ("auto", "reference"):
            _close(flash_attention(*parts, backend=backend), _expected(parts, everything)[0].detach())
        _check(reference(*parts, return_lse=True), _expected(parts, everything), [base])
    shared = [query, key[:1, :1].expand(2, 4, 24, 8), value]
    output = reference(*shared)
    _close(output, _expected(shared, everything)[0].detach())
    (ours,) = torch.autograd.grad(output, base, torch.ones(()).double().expand(output.shape))
    _close(ours, torch.autograd.grad(_expected(shared, everything)[0].sum(), base)[0])


def test_the_same_weights_are_dropped_whatever_the_tiles_and_others_for_another_seed():
    inputs = [t.detach() for t in _inputs(33, 40)]
    one = reference(*inputs, dropout=0.4, seed=9)
    for tiles in ((7, 64), (64, 5)):
        chosen = FlashSettings(dropout=0.4, seed=9, query_tile=tiles[0], key_tile=tiles[1])
        _close(flash_attention_2_forward(*inputs, chosen)[0], one)
    assert not torch.equal(one, reference(*inputs, dropout=0.4, seed=10))
    torch.manual_seed(3)
    first, second = reference(*inputs, dropout=0.4), reference(*inputs, dropout=0.4)
    assert not torch.equal(first, second)  # a seed of its own each time
    torch.manual_seed(3)
    assert torch.equal(first, reference(*inputs, dropout=0.4))


def test_parts_of_the_keys_merge_to_the_whole_with_its_gradients():
    inputs = _inputs(10, 36)
    query, key, value = inputs
    outputs, log_sums = [], []
    for part in (slice(0, 5), slice(5, 29), slice(29, 36)):
        output, log_sum = reference(query, key[:, :, part], value[:, :, part], return_lse=True)
        outputs.append(output)
        log_sums.append(log_sum)
    merged = merge_partial_attention(torch.stack(outputs), torch.stack(log_sums))
    _check(merged, _expected(inputs, torch.zeros(4, 10, 36)), inputs)


# Tiles, memory -------------------------------------------------------------------------------------------------------


def _grid(record: Record, rows: int, columns: int) -> list[str]:
    grid = [["·"] * columns for _ in range(rows)]
    for tile in record.tiles:
        assert grid[tile.row][tile.column] == "·"  # none is visited twice
        grid[tile.row][tile.column] = "▒" if tile.masked else "█"
    return ["".join(row) for row in grid]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["████", "████", "████"]),
        ({"causal": True}, ["█▒··", "██▒·", "███▒"]),
        ({"causal": True, "window": 5}, ["▒▒··", "·▒▒·", "··▒▒"]),
        ({"causal": True, "window": 8}, ["█▒··", "▒█▒·", "·▒█▒"]),
        ({"causal": True, "window": 7}, ["▒▒··", "▒▒▒·", "·▒▒▒"]),  # one pair of the farther tiles is too far
        ({"window": 4}, ["▒█▒·", "·▒█▒", "··▒█"]),
        ({"window": 5}, ["▒█▒·", "·▒█▒", "··▒█"]),
        ({"window": 7}, ["▒█▒▒", "▒▒█▒", "·▒▒█"]),
    ],
)
def test_dead_tiles_are_skipped_and_only_edges_are_masked(options, expected):
    inputs = [t.detach() for t in _inputs(12, 16)]
    chosen = FlashSettings(**options, query_tile=4, key_tile=4)
    for forward in (flash_attention_1_forward, flash_attention_2_forward):
        record = Record()
        forward(*inputs, chosen, record)
        assert _grid(record, 3, 4) == expected
        by_row = [(tile.row, tile.column) for tile in record.tiles]
        assert by_row == sorted(by_row, key=lambda at: at if forward is flash_attention_2_forward else at[::-1])


def test_tiles_are_narrow_for_narrow_windows_and_small_for_many_heads():
    def first_tile(heads: int, **options: Any) -> tuple[int, int]:
        record = Record()
        flash_attention_2_forward(*[torch.zeros(1, heads, 600, 1)] * 3, FlashSettings(**options), record)
        return record.tiles[0].queries.stop, record.tiles[0].keys.stop

    assert first_tile(1) == (128, 256)
    assert first_tile(1, causal=True, window=100) == (128, 100)
    assert first_tile(1, window=3) == (128, 64)
    assert first_tile(32) == (128, 128)
    assert first_tile(100) == (64, 64)  # 2**19 scores and no more, down to this size


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_layouts_dead_tiles_are_not_computed(is_causal):
    inputs = [t.detach() for t in _inputs(40, 40)]
    layout = big_bird(4).blocks(40, 40, 4)
    record = Record()
    flash_attention_2_forward(*inputs, FlashSettings(causal=is_causal, layout=layout), record)
    allowed = big_bird(4).dense(40, 40)
    live = (allowed.tril() if is_causal else allowed).view(10, 4, 10, 4).transpose(1, 2).flatten(2)
    visited = {(tile.row, tile.column) for tile in record.tiles}
    assert {tuple(at) for at in live.any(-1).nonzero().tolist()} <= visited
    assert visited <= {tuple(at) for at in (layout.states > 0).nonzero().tolist()}
    assert {(t.row, t.column) for t in record.tiles if not t.masked} == {
        tuple(at) for at in live.all(-1).nonzero().tolist()
    }


@pytest.mark.parametrize(
    "options", [{}, {"causal": True, "alibi_slopes": torch.ones(1)}, {"causal": True, "window": 100}]
)
def test_memory_grows_with_the_length_and_not_its_square(options, peak_bytes):
    def peaks(length: int) -> tuple[int, int]:
        inputs = _inputs(length, length, batch=1, heads=(1, 1), dims=(8, 8), dtype=torch.float32)

        def step() -> None:
            torch.autograd.grad(reference(*inputs, **options).sum(), inputs)

        with torch.no_grad():
            forward = peak_bytes(lambda: reference(*inputs, **options))
        return forward, peak_bytes(step)

    lengths = (1024, 2048, 4096)
    forward, backward = zip(*(peaks(length) for length in lengths), strict=True)
    for measured in (forward, backward):
        # The same step from 1k to 2k as a half of that from 2k to 4k: a straight line, tiles are the constant.
        assert abs((measured[2] - measured[1]) / (measured[1] - measured[0]) - 2) < 0.1
        assert measured[2] < 4096 * 4096  # a quarter of the scores


def test_what_is_kept_for_the_backward_pass_is_a_number_a_query():
    inputs = _inputs(300, 300, heads=(4, 2), dims=(8, 8), dtype=torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = reference(*inputs, causal=True)
    beyond = [tensor for tensor in kept if all(tensor is not known for known in inputs)]
    assert sum(tensor.numel() for tensor in beyond) == output.numel() + 2 * 4 * 300


# Autograd and compilation ---------------------------------------------------------------------------------------------


def test_a_second_derivative_is_refused_rather_than_wrong():
    inputs = _inputs(9, 9)
    (gradient,) = torch.autograd.grad(reference(*inputs).sum(), inputs[0], create_graph=True)
    _close(gradient.detach(), torch.autograd.grad(reference(*inputs).sum(), inputs[0])[0])
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()
    output, log_sums = reference(*inputs, return_lse=True)
    for result in (output, log_sums):  # by what comes from above, too: a backward pass twice is a forward derivative
        above = torch.ones_like(result, requires_grad=True)
        (gradient,) = torch.autograd.grad(result, inputs[0], above, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(gradient.sum(), above)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at it
def test_functional_gradients_checkpoints_and_compilation_agree():
    inputs = _inputs(20, 20)
    expected = torch.autograd.grad(reference(*inputs, causal=True).sum(), inputs)
    functional = torch.func.grad(lambda *tensors: reference(*tensors, causal=True).sum(), argnums=(0, 1, 2))(
        *(tensor.detach() for tensor in inputs)
    )
    again = checkpoint(partial(reference, causal=True), *inputs, use_reentrant=False)
    compiled = torch.compile(partial(reference, causal=True), backend="eager")(*inputs)
    for gradients in (functional, *(torch.autograd.grad(output.sum(), inputs) for output in (again, compiled))):
        for one, other in zip(gradients, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_changes_nothing_inside(backend):
    inputs = _inputs(30, 30, dims=(8, 8), dtype=torch.float32)
    plain = flash_attention(*inputs, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = flash_attention(*inputs, backend=backend)
        gradients = torch.autograd.grad(under.sum(), inputs)
    assert torch.equal(under, plain)
    for one, other in zip(gradients, torch.autograd.grad(plain.sum(), inputs), strict=True):
        assert torch.equal(one, other)


def test_frozen_inputs_get_no_gradient():
    query, key, value = _inputs(8, 8)
    output, log_sums = reference(query.detach(), key, value.detach(), return_lse=True)
    assert torch.autograd.grad(output.sum() + log_sums.sum(), key)[0].abs().max() > 0
    _, log_sums = reference(query, key, value, return_lse=True)
    gradients = torch.autograd.grad(log_sums.sum(), (query, key, value))  # of the log-sum-exp alone
    assert gradients[2].eq(0).all()
    for one, other in zip(
        gradients[:2],
        torch.autograd.grad(_expected([query, key, value], torch.zeros(4, 8, 8))[1].sum(), (query, key)),
        strict=True,
    ):
        _close(one, other)


# The door ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"window": 3}, "window as a matrix"),
        ({"alibi_slopes": torch.ones(4)}, "alibi_slopes as a matrix"),
        ({"layout": causal().blocks(12, 16, 4)}, "layout as a matrix"),
        ({"return_lse": True}, "log-sum-exp"),
        ({"dropout": 0.1}, "its own dropout"),
        ({"causal": True}, "12 queries and 16 keys"),
    ],
)
def test_torch_is_refused_by_reason_and_the_reference_takes_over(options, reason, monkeypatch):
    inputs = [t.detach() for t in _inputs(12, 16, dims=(8, 8))]
    with pytest.raises(ValueError, match=reason):
        flash_attention(*inputs, backend="torch", **options)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # would not be callable
    flash_attention(*inputs, **options)


def test_torch_computes_what_it_computes_without_scores(monkeypatch):
    calls: list[dict[str, Any]] = []
    fused = F.scaled_dot_product_attention

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(options)
        query, key, value = args[:3]
        choice = torch._fused_sdp_choice(query, key, value, enable_gqa=query.size(1) != key.size(1))
        assert choice != 0  # 0 is the one that writes all scores to memory
        return fused(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    for lengths, options in (((12, 12), {"causal": True}), ((12, 16), {}), ((1, 16), {"causal": True, "scale": 0.3})):
        inputs = [t.detach() for t in _inputs(*lengths, dims=(8, 8))]
        bias = _bias(inputs, is_causal="causal" in options, window=None, slopes=None, allowed=None)
        expected = _expected(inputs, bias, scale=options.get("scale"))[0]
        for backend in ("auto", "torch"):
            _close(flash_attention(*inputs, backend=backend, **options), expected)
        strided = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in inputs]
        _close(flash_attention(*strided, backend="torch", **options), expected)
    assert len(calls) == 9
    inputs = [t.detach() for t in _inputs(12, 12, dims=(8, 6))]
    with pytest.raises(ValueError, match="value_dim"):
        flash_attention(*inputs, backend="torch")
    flash_attention(*inputs)
    assert len(calls) == 9


@pytest.mark.parametrize(
    "options",
    [
        {"causal": True, "window": 30, "alibi_slopes": torch.tensor([0.5, 0.2, 0.1, 0.01]), "scale": 0.4},
        {"window": 20},
        {"layout": big_bird(16).blocks(40, 56, 16), "causal": True},
    ],
)
def test_the_kernels_are_the_loops_twins(options):
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [
        t.detach().to(device).requires_grad_() for t in _inputs(40, 56, batch=1, dims=(16, 16), dtype=torch.float32)
    ]
    options = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in options.items()}
    expected = reference(*inputs, return_lse=True, **options)
    _check(flash_attention(*inputs, return_lse=True, backend="triton", **options), expected, inputs, 1e-5)
    with pytest.raises(ValueError, match="the kernels have no dropout"):
        flash_attention(*inputs, backend="triton", dropout=0.1, **options)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_kernels_and_torch_compile_into_one_graph(backend):
    if backend == "triton":
        pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = [t.detach().to(device).requires_grad_() for t in _inputs(20, 20, dims=(16, 16), dtype=torch.float32)]
    attend = partial(flash_attention, causal=True, backend=backend)
    torch._dynamo.reset()  # what other tests compiled would decide which sizes stand in the graph
    output, expected = torch.compile(attend, backend="aot_eager", fullgraph=True)(*inputs), attend(*inputs)
    for one, other in zip(
        (output, *torch.autograd.grad(output.sum(), inputs)),
        (expected, *torch.autograd.grad(expected.sum(), inputs)),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def _wrong(**change: object) -> dict[str, object]:
    return {name: torch.randn(1, 2, 4, 2) for name in ("query", "key", "value")} | change


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (_wrong(query=torch.randn(1, 3, 4, 2)), ValueError, "multiple of the heads"),
        (_wrong(key=torch.randn(1, 2, 4, 3)), ValueError, "agree in batch and head_dim"),
        (_wrong(value=torch.randn(1, 2, 4, 2).half()), TypeError, "one floating-point dtype"),
        (_wrong(causal=1), TypeError, "causal must be True or False"),
        (_wrong(return_lse="yes"), TypeError, "return_lse must be True or False"),
        (_wrong(window=0), ValueError, "window must be at least 1"),
        (_wrong(window=2.0), TypeError, "window must be an integer"),
        (_wrong(scale="large"), TypeError, "scale must be a number, got 'large'"),
        (_wrong(scale=torch.ones(1)), TypeError, "scale must be a number"),
        (_wrong(scale=math.nan), ValueError, "scale must be finite, got nan"),
        (_wrong(scale=-math.inf), ValueError, "scale must be finite, got -inf"),
        (_wrong(alibi_slopes=torch.ones(3)), ValueError, r"alibi_slopes must be .* \(2,\)"),
        (_wrong(alibi_slopes=torch.ones(2).long()), ValueError, "alibi_slopes must be floating point"),
        (_wrong(alibi_slopes=torch.ones(2, requires_grad=True)), ValueError, "must not require a gradient"),
        (_wrong(dropout=1.0), ValueError, "dropout must be in"),
        (_wrong(dropout=0.5, seed=-1), ValueError, "seed must be in"),
        (_wrong(dropout=0.5, seed=1.5), TypeError, "seed must be an integer"),
        (_wrong(layout=causal()), TypeError, "layout must be a BlockLayout"),
        (_wrong(layout=causal().blocks(4, 5, 2)), ValueError, "made for 4 queries and 4 keys"),
        (_wrong(backend="cuda"), ValueError, "backend must be one of"),
    ],
)
def test_refuses_what_does_not_fit(arguments, error, words):
    with pytest.raises(error, match=words):
        flash_attention(**arguments)


def test_a_layouts_tiles_are_its_own():
    inputs = [t.detach() for t in _inputs(8, 8)]
    with pytest.raises(ValueError, match="tiles are its own, of 4"):
        flash_attention_2_forward(*inputs, FlashSettings(layout=causal().blocks(8, 8, 4), query_tile=8))
    with pytest.raises(ValueError, match="key_tile must be at least 1"):
        flash_attention_2_forward(*inputs, FlashSettings(key_tile=0))


# In a layer ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_attends_inside_multi_head_attention(backend):
    layer = MultiHeadAttention(16, 4, n_kv_heads=2).double()
    x = torch.randn(2, 33, 16, dtype=torch.float64)
    gradient = torch.randn_like(x)
    slopes = alibi_slopes(4)
    mask = sliding_window(9).dense(33, 33)
    for attend, options in (
        (FlashAttention(backend=backend), {"causal": True}),
        (FlashAttention(window=9), {"causal": True, "mask": mask}),
        (FlashAttention(alibi_slopes=slopes), {"causal": True, "bias": alibi_bias(4, 33, 33, dtype=torch.float64)}),
    ):
        flash, plain = layer(x, causal=True, attend=attend), layer(x, **options)
        torch.testing.assert_close(flash, plain)
        parameters = list(layer.parameters())
        for one, other in zip(
            torch.autograd.grad(flash, parameters, gradient),
            torch.autograd.grad(plain, parameters, gradient),
            strict=True,
        ):
            torch.testing.assert_close(one, other)


def test_what_a_layer_passes_on_arrives():
    inputs = [t.detach() for t in _inputs(12, 16, dims=(8, 8))]
    attend, options = FlashAttention(window=5, backend="reference"), {"causal": True, "scale": 0.3, "dropout": 0.4}
    torch.manual_seed(5)
    output = attend(*inputs, **options)
    torch.manual_seed(5)
    assert torch.equal(output, flash_attention(*inputs, **options, window=5))
    for left_out in options:
        torch.manual_seed(5)
        others = {name: value for name, value in options.items() if name != left_out}
        assert not torch.equal(output, reference(*inputs, **others, window=5))


@pytest.mark.parametrize("name", ["mask", "bias", "return_weights"])
def test_matrices_of_all_pairs_are_refused_in_a_layer(name):
    layer, x = MultiHeadAttention(8, 2), torch.randn(1, 4, 8)
    given = {"mask": torch.ones(4, 4).bool(), "bias": torch.zeros(4, 4), "return_weights": True}[name]
    with pytest.raises(ValueError, match=f"{name} must be .* flash attention never holds"):
        layer(x, attend=FlashAttention(), **{name: given})


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 40}])
def test_on_a_gpu_too(dtype, backend, options):
    inputs = [t.detach().cuda().requires_grad_() for t in _inputs(150, 150, dims=(32, 32), dtype=dtype)]
    bias = _bias(inputs, is_causal="causal" in options, window=options.get("window"), slopes=None, allowed=None).cuda()
    ours = flash_attention(*inputs, return_lse=True, backend=backend, **options)
    _check(ours, _expected(inputs, bias), inputs, 3e-2 if dtype is torch.bfloat16 else 1e-5)
