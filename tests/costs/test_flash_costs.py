"""What flash attention moves: the formulas against loads and stores counted one by one, and the paper's Theta."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from minillm.costs import live_pairs
from minillm.costs.flash import (
    AttentionSize,
    arithmetic_intensity,
    flash_1_tiles,
    flash_1_traffic,
    flash_2_traffic,
    flash_backward_traffic,
    flash_extra_elements,
    flash_flops,
    live_tiles,
    standard_attention_backward_traffic,
    standard_attention_traffic,
)
from minillm.layers.flash_loops import flash_attention_1_forward, flash_attention_2_forward, flash_attention_backward
from minillm.layers.flash_tiles import FlashSettings, Record


def _inputs(size: AttentionSize) -> list[torch.Tensor]:
    return [
        torch.randn(size.batch_size, heads, length, width)
        for heads, length, width in (
            (size.n_heads, size.query_length, size.head_dim),
            (size.kv_heads, size.key_length, size.head_dim),
            (size.kv_heads, size.key_length, size.width),
        )
    ]


SIZES = st.builds(
    AttentionSize,
    st.integers(0, 50),
    st.integers(0, 50),
    st.integers(1, 5),
    st.none() | st.integers(1, 5),
    st.just(4),
    st.sampled_from([None, 2, 1]),
    st.integers(1, 2),
    st.booleans(),
    st.none() | st.integers(1, 60),
)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 20), st.integers(1, 20))
def test_formulas_are_what_the_loops_load_and_store(size, query_tile, key_tile):
    inputs = _inputs(size)
    chosen = FlashSettings(size.causal, size.window, query_tile=query_tile, key_tile=key_tile)
    for forward, formula in (
        (flash_attention_1_forward, flash_1_traffic),
        (flash_attention_2_forward, flash_2_traffic),
    ):
        record, traffic = Record(), formula(size, query_tile, key_tile)
        output, log_sums = forward(*inputs, chosen, record)
        assert record.loaded == Counter(traffic.loaded)
        assert record.stored == Counter(traffic.stored)
        assert traffic.elements == record.loaded.total() + record.stored.total()
    record, traffic = Record(), flash_backward_traffic(size, query_tile, key_tile)
    flash_attention_backward(*inputs, output, log_sums, torch.ones_like(output), None, chosen, record)
    assert record.loaded == Counter(traffic.loaded)
    assert record.stored == Counter(traffic.stored)
    live = live_tiles(size, query_tile, key_tile)
    assert live.count == len(record.tiles)
    assert live.pairs == sum((t.queries.stop - t.queries.start) * (t.keys.stop - t.keys.start) for t in record.tiles)


@settings(max_examples=30, deadline=None)
@given(SIZES.filter(lambda size: size.query_length and size.key_length), st.integers(1, 20), st.integers(1, 20))
def test_operations_are_those_of_the_live_tiles(size, query_tile, key_tile):
    inputs = _inputs(size)
    chosen = FlashSettings(size.causal, size.window, query_tile=query_tile, key_tile=key_tile)
    with FlopCounterMode(display=False) as forward:
        output, log_sums = flash_attention_2_forward(*inputs, chosen)
    assert forward.get_total_flops() == flash_flops(size, query_tile, key_tile)
    with FlopCounterMode(display=False) as backward:
        flash_attention_backward(*inputs, output, log_sums, torch.ones_like(output), None, chosen)
    assert backward.get_total_flops() == flash_flops(size, query_tile, key_tile, backward=True)


def test_tiles_of_one_pair_are_the_pairs():
    for lengths in ((30, 30), (10, 25)):
        for window in (None, 7):
            size = AttentionSize(*lengths, 4, causal=True, window=window)
            assert live_tiles(size, 1, 1).pairs == live_pairs(*lengths, window=window)


class _Operands(TorchDispatchMode):
    """Counts the elements that each matrix product and each softmax reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten._softmax, torch.ops.aten._softmax_backward_data):
            operands = [argument for argument in args if isinstance(argument, torch.Tensor)]
            self.elements += sum(tensor.numel() for tensor in operands) + result.numel()
        return result


def test_written_out_it_moves_what_torchs_products_and_softmax_move():
    size = AttentionSize(40, 60, 8, 5, n_heads=3, batch_size=2)
    query, key, value = (tensor.flatten(0, 1).requires_grad_() for tensor in _inputs(size))
    with _Operands() as forward:
        output = torch.bmm(torch.bmm(query, key.mT).softmax(-1), value)
    assert forward.elements == standard_attention_traffic(size).elements
    with _Operands() as backward:
        output.backward(torch.randn_like(output))
    # Torch's softmax reads its result once more than Algorithm 3, which reads P and dP and writes dS: the same three.
    assert backward.elements == standard_attention_backward_traffic(size).elements


def test_written_out_it_grows_as_n_d_plus_n_squared():
    d = 64
    for n in (512, 2048, 8192):
        assert standard_attention_traffic(AttentionSize(n, n, d)).elements == 4 * n * d + 4 * n * n


@pytest.mark.parametrize("d", [32, 64, 128])
def test_flash_attention_1_grows_as_n_squared_d_squared_over_m(d):
    """Theorem 2: halving M doubles it, doubling d quadruples it, doubling N quadruples it; the constant is 12."""

    def elements(n: int, d: int, fast_memory: int) -> int:
        return flash_1_traffic(AttentionSize(n, n, d), *flash_1_tiles(fast_memory, d)).elements

    n, m = 2**16, 2**15
    for one, other, factor in (
        (elements(n, d, m), elements(2 * n, d, m), 4),
        (elements(n, d, m), elements(n, d, m // 2), 2),
        (elements(n, d, m), elements(n, 2 * d, m), 4),
    ):
        assert math.isclose(other / one, factor, rel_tol=0.03)
    assert math.isclose(elements(n, d, m) / (n**2 * d**2 / m), 12, rel_tol=0.05 + 3 / d)
    standard = standard_attention_traffic(AttentionSize(n, n, d)).elements
    assert (elements(n, d, m) < standard) == (12 * d * d < 4 * m)  # wins where d^2 is well below M


def test_flash_attention_2_moves_two_thirds_of_it_with_the_same_fast_memory():
    n, d, m = 2**16, 64, 2**16
    query_tile = key_tile = m // (4 * d)
    second = flash_2_traffic(AttentionSize(n, n, d), query_tile, key_tile)
    assert math.isclose(second.elements / (n**2 * d**2 / m), 8, rel_tol=0.01)
    first = flash_1_traffic(AttentionSize(n, n, d), *flash_1_tiles(m, d))
    assert math.isclose(second.elements / first.elements, 2 / 3, rel_tol=0.03)


def test_the_papers_own_tiles():
    # 100 KiB of SRAM in 16 bits and heads of 64: Br and Bc of Algorithm 1, line 1.
    assert flash_1_tiles(51200, 64) == (64, 200)
    assert flash_1_tiles(1000, 64) == (4, 4)
    with pytest.raises(ValueError, match="fast_memory must be at least 64"):
        flash_1_tiles(63, 64)


def test_bytes_and_intensity():
    size = AttentionSize(4096, 4096, 128, n_heads=2)
    traffic = flash_2_traffic(size, 128, 64)
    statistics = traffic.stored["log_sum"]
    assert statistics == 2 * 4096
    assert traffic.bytes() == 2 * (traffic.elements - statistics) + 4 * statistics
    assert traffic.bytes(4) == 4 * traffic.elements
    # Two operations a pair and number, of K and V of 2 bytes, for each of the 128 queries of a tile: about 128 a byte.
    assert math.isclose(arithmetic_intensity(flash_flops(size, 128, 64), traffic), 128, rel_tol=0.05)
    standard = arithmetic_intensity(4 * 4096**2 * 128 * 2, standard_attention_traffic(size))
    assert math.isclose(standard, 4 * 128 / (4 * 2), rel_tol=0.05)  # d / 2 however long the text


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("length", [512, 2048])
def test_extra_memory_is_the_formulas(length, backward):
    size = AttentionSize(length, length, 16, n_heads=2)
    inputs, chosen = _inputs(size), FlashSettings(query_tile=128, key_tile=256)
    output, log_sums = flash_attention_2_forward(*inputs, chosen)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        if backward:
            flash_attention_backward(*inputs, output, log_sums, output, None, chosen)
        else:
            flash_attention_2_forward(*inputs, chosen)
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    results = 3 * output.numel() if backward else output.numel()
    extra = peak / 4 - results + (log_sums.numel() if backward else 0)  # that was there before
    assert 0.8 < extra / flash_extra_elements(size, 128, 256, backward=backward) < 1.3


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: AttentionSize(-1, 4, 8), "query_length must be at least 0"),
        (lambda: AttentionSize(4, 4, 0), "head_dim must be at least 1"),
        (lambda: AttentionSize(4, 4, 8, n_heads=3, n_kv_heads=2), "n_kv_heads must divide n_heads"),
        (lambda: AttentionSize(4, 4, 8, window=0), "window must be at least 1"),
        (lambda: flash_2_traffic(AttentionSize(4, 4, 8), 0, 4), "query_tile must be at least 1"),
        (lambda: flash_extra_elements(AttentionSize(4, 4, 8), 4, 0), "key_tile must be at least 1"),
        (lambda: standard_attention_traffic(AttentionSize(4, 4, 8)).bytes(0), "bytes_per_value must be positive"),
    ],
)
def test_refuses_what_does_not_fit(run, words):
    with pytest.raises(ValueError, match=words):
        run()
