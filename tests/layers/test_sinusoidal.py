"""Sinusoidal positions against the formula in float64 and transformers' Marian; a shift is a fixed rotation."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

from minillm.layers import LearnedPositions, SinusoidalPositions, sinusoidal_positions, sinusoidal_shift

widths = st.integers(1, 24).map(lambda half: 2 * half)


def formula(position, d_model, base=10000.0):
    row = []
    for pair in range(d_model // 2):
        angle = position / base ** (2 * pair / d_model)
        row += [math.sin(angle), math.cos(angle)]
    return torch.tensor(row, dtype=torch.float64)


@pytest.mark.parametrize("base", [10000.0, 100.0])
def test_equals_the_formula_in_float64(base):
    expected = torch.stack([formula(p, 22, base) for p in range(5, 305)])
    torch.testing.assert_close(
        sinusoidal_positions(300, 22, start=5, base=base, dtype=torch.float64), expected, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(sinusoidal_positions(300, 22, start=5, base=base).double(), expected, rtol=0, atol=6e-8)


def test_equals_marians_in_transformers():
    # Marian has all sines in front of all cosines; the paper, and this project, each sine beside its cosine.
    theirs = MarianSinusoidalPositionalEmbedding(600, 32).create_weight()
    ours = sinusoidal_positions(600, 32).view(600, 16, 2).transpose(1, 2).reshape(600, 32)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_far_positions_are_as_exact_as_near_ones(dtype):
    expected = torch.stack([formula(p, 16) for p in (0, 10**6, 10**9)]).to(dtype)
    layer = SinusoidalPositions(16).to(dtype)
    torch.testing.assert_close(layer(torch.tensor([0, 10**6, 10**9])), expected, rtol=0, atol=6e-8)
    torch.testing.assert_close(layer.span(10**9, 1), expected[2:], rtol=0, atol=6e-8)


@settings(max_examples=40, deadline=None)
@given(widths, st.integers(0, 5000), st.integers(-5000, 5000))
def test_a_shift_is_one_linear_map_for_all_positions(d_model, position, offset):
    position = max(position, -offset)
    shift = sinusoidal_shift(offset, d_model, dtype=torch.float64)
    here, there = (
        sinusoidal_positions(3, d_model, start=p, dtype=torch.float64) for p in (position, position + offset)
    )
    torch.testing.assert_close(here @ shift.T, there, rtol=0, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(widths, st.integers(-500, 500), st.integers(-500, 500))
def test_shifts_are_rotations_that_add_up(d_model, first, second):
    a, b, both = (sinusoidal_shift(k, d_model, dtype=torch.float64) for k in (first, second, first + second))
    torch.testing.assert_close(a @ b, both, rtol=0, atol=1e-10)
    torch.testing.assert_close(a @ a.T, torch.eye(d_model, dtype=torch.float64), rtol=0, atol=1e-12)
    blocks = torch.block_diag(*[torch.ones(2, 2)] * (d_model // 2))
    assert not a[blocks == 0].any()


@settings(max_examples=40, deadline=None)
@given(widths, st.integers(0, 5000), st.integers(0, 5000), st.integers(0, 300))
def test_an_inner_product_depends_on_the_distance_only(d_model, first, second, distance):
    def product(p):
        rows = sinusoidal_positions(distance + 1, d_model, start=p, dtype=torch.float64)
        return rows[0] @ rows[-1]

    cosines = sum(math.cos(distance / 10000 ** (2 * i / d_model)) for i in range(d_model // 2))
    torch.testing.assert_close(product(first), product(second), rtol=0, atol=1e-10)
    torch.testing.assert_close(product(first).item(), cosines, rtol=0, atol=1e-10)


def test_has_the_interface_of_learned_positions():
    layer, learned = SinusoidalPositions(8), LearnedPositions(20, 8)
    learned.weight.data = sinusoidal_positions(20, 8)
    positions = torch.tensor([[0, 3, 19], [7, 7, 1]])
    torch.testing.assert_close(layer(positions), learned(positions))
    torch.testing.assert_close(layer.span(2, 5), learned.span(2, 5))
    assert layer.span(3, 0).shape == (0, 8)
    torch.testing.assert_close(layer(torch.tensor(-3, dtype=torch.int32)), formula(-3, 8).float())


def test_a_span_is_a_slice_of_a_table_that_grows_seldom():
    layer = SinusoidalPositions(8)
    sizes = set()
    for step in range(1000):
        torch.testing.assert_close(layer.span(step, 1), sinusoidal_positions(1, 8, start=step), rtol=0, atol=0)
        sizes.add(layer.table.size(0))
    assert len(sizes) <= 11
    assert max(sizes) <= 2000
    assert layer.span(100, 300).data_ptr() == layer.table[100].data_ptr()
    layer.span(10**9, 2)
    assert layer.table.size(0) == max(sizes)


def test_there_is_nothing_to_learn_or_to_save():
    layer = SinusoidalPositions(8)
    layer.span(0, 4)
    assert not layer.state_dict()
    assert not list(layer.parameters())
    SinusoidalPositions(8).load_state_dict(layer.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_each_number_is_rounded_once_whatever_dtypes_the_module_goes_through(dtype):
    layer = SinusoidalPositions(8)
    layer.span(0, 50)
    layer.to(torch.bfloat16).to(dtype)
    torch.testing.assert_close(layer.span(0, 60), sinusoidal_positions(60, 8, dtype=dtype), rtol=0, atol=0)
    assert layer(torch.arange(4)).dtype is dtype
    layer.float()
    torch.testing.assert_close(layer.span(0, 50), sinusoidal_positions(50, 8), rtol=0, atol=0)


def test_survives_the_meta_device_and_copies():
    with torch.device("meta"):
        layer = SinusoidalPositions(8)
        assert layer.span(0, 5).is_meta
    layer.to_empty(device="cpu")
    torch.testing.assert_close(layer.span(0, 5), sinusoidal_positions(5, 8))
    torch.testing.assert_close(copy.deepcopy(layer).span(0, 5), layer.span(0, 5))


def test_a_table_made_while_generating_serves_in_training():
    layer = SinusoidalPositions(8)
    with torch.inference_mode():
        layer.span(0, 5)
    weight = torch.ones(8, requires_grad=True)
    (layer.span(0, 5) * weight).sum().backward()
    torch.testing.assert_close(weight.grad, layer.span(0, 5).sum(0))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: sinusoidal_positions(4, 7), ValueError, "d_model must be an even number of at least 2 .* got 7"),
        (lambda: SinusoidalPositions(0), ValueError, "d_model must be an even number of at least 2"),
        (lambda: sinusoidal_shift(1, 5), ValueError, "d_model must be an even number"),
        (lambda: SinusoidalPositions(8, base=0.0), ValueError, "base must be positive, got 0.0"),
        (lambda: sinusoidal_positions(-1, 8), ValueError, "length and start must be at least 0, got -1 and 0"),
        (lambda: SinusoidalPositions(8).span(-2, 3), ValueError, "length and start must be at least 0, got 3 and -2"),
        (lambda: SinusoidalPositions(8)(torch.zeros(3)), TypeError, "positions must be integers, got torch.float32"),
    ],
)
def test_bad_input_is_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()
