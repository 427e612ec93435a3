"""Sparse patterns are what the papers' formulas say, pair by pair, and their tiles are the reduction of the matrix."""

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask

from minillm.layers.block_layout import DEAD, FULL, PARTIAL
from minillm.layers.sparse_algebra import Pattern
from minillm.layers.sparse_compounds import (
    longformer,
    sparse_transformer_fixed,
    sparse_transformer_strided,
    star,
)
from minillm.layers.sparse_patterns import (
    band,
    block_local,
    causal,
    dilated,
    global_tokens,
    random_blocks,
    sliding_window,
)

# Each pattern beside its definition: may the query at place i look at key j, of n keys in all?
ATOMS: dict[str, tuple[Pattern, Callable[[int, int, int], bool]]] = {
    "causal": (causal(), lambda i, j, n: j <= i),
    "band": (band(3), lambda i, j, n: abs(i - j) <= 3),
    "one-sided band": (band(1, 4), lambda i, j, n: i - 1 <= j <= i + 4),
    "sliding window": (sliding_window(4), lambda i, j, n: i - 4 < j <= i),
    "dilated": (dilated(3, 2, 3), lambda i, j, n: j in {i - 3 * k for k in range(-2, 4)}),
    "dilated without end": (dilated(None, 0, 5), lambda i, j, n: j <= i and (i - j) % 5 == 0),
    "block-local": (block_local(4), lambda i, j, n: i // 4 == j // 4),
    "neighbouring blocks": (block_local(3, behind=1, ahead=2), lambda i, j, n: -1 <= j // 3 - i // 3 <= 2),
    "first tokens": (global_tokens(2), lambda i, j, n: j < 2 or 0 <= i < 2),
    "first and last token": (global_tokens([0, -1]), lambda i, j, n: {i, j} & {0, n - 1} != set()),
    "sinks": (global_tokens(2, symmetric=False), lambda i, j, n: j < 2),
    "summaries": (global_tokens([3, 4], every=5, symmetric=False), lambda i, j, n: j % 5 in (3, 4)),
    "global blocks": (
        global_tokens([0, -1], block_size=4),
        lambda i, j, n: any(x >= 0 and x // 4 in (0, (n - 1) // 4) for x in (i, j)),
    ),
}
COMPOUNDS: dict[str, tuple[Pattern, Callable[[int, int, int], bool]]] = {
    # Child et al. 2019, section 4.3: A1 = {max(0, i - l), ..., i}, A2 = {j : (i - j) mod l = 0}.
    "strided": (
        sparse_transformer_strided(5),
        lambda i, j, n: j <= i and (max(0, i - 5) <= j or (i - j) % 5 == 0),
    ),
    # A1 = {j : floor(j / l) = floor(i / l)}, A2 = {j : j mod l in {t, ..., l}} with t = l - c.
    "fixed": (
        sparse_transformer_fixed(6, 2),
        lambda i, j, n: j <= i and (j // 6 == i // 6 or j % 6 >= 6 - 2),
    ),
    # Beltagy et al. 2020, section 3.1: w / 2 on each side, gaps d; global attention is symmetric.
    "Longformer": (
        longformer(6, global_places=[0, 7], dilation=2),
        lambda i, j, n: (i - j) in (-6, -4, -2, 0, 2, 4, 6) or i in (0, 7) or j in (0, 7),
    ),
    # Guo et al. 2019, section 3.1: relay 0; satellites 1 .. n - 1 in a closed ring.
    "Star": (
        star(),
        lambda i, j, n: i == 0 or j == 0 or abs(i - j) <= 1 or (n > 1 and {i, j} == {1, n - 1}),
    ),
}
DEFINED = ATOMS | COMPOUNDS
LENGTHS = [(1, 1), (7, 7), (17, 17), (20, 20), (5, 19), (1, 13), (16, 9)]


@pytest.mark.parametrize("name", DEFINED)
@pytest.mark.parametrize(("query_length", "key_length"), LENGTHS)
def test_dense_is_the_definition_pair_by_pair(name: str, query_length: int, key_length: int) -> None:
    pattern, defined = DEFINED[name]
    offset = key_length - query_length
    expected = [[defined(i + offset, j, key_length) for j in range(key_length)] for i in range(query_length)]
    assert pattern.dense(query_length, key_length).tolist() == expected


def _atoms() -> st.SearchStrategy[Pattern]:
    reach = st.integers(0, 9)
    size = st.integers(1, 9)
    return st.one_of(
        st.builds(band, reach, reach),
        st.builds(dilated, st.none() | reach, st.none() | reach, size),
        st.builds(lambda b, x, y: block_local(b, behind=x, ahead=y), size, st.integers(0, 2), st.integers(0, 2)),
        st.builds(
            lambda places, symmetric, b: global_tokens(places, symmetric=symmetric, block_size=b),
            st.lists(st.integers(-3, 6), max_size=3),
            st.booleans(),
            st.integers(1, 4),
        ),
        st.builds(
            lambda n, b, seed, c: random_blocks(n, block_size=b, seed=seed, causal=c),
            st.integers(0, 4),
            size,
            st.integers(0, 2**40),
            st.booleans(),
        ),
    )


def patterns() -> st.SearchStrategy[Pattern]:
    return st.recursive(
        _atoms(),
        lambda inner: st.one_of(
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a: ~a, inner),
        ),
        max_leaves=4,
    )


lengths = st.tuples(st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(patterns(), patterns(), patterns(), lengths)
def test_the_operators_are_those_of_sets(a: Pattern, b: Pattern, c: Pattern, size: tuple[int, int]) -> None:
    def same(x: Pattern, y: Pattern) -> bool:
        return torch.equal(x.dense(*size), y.dense(*size))

    assert torch.equal((a & b).dense(*size), a.dense(*size) & b.dense(*size))
    assert torch.equal((a | b).dense(*size), a.dense(*size) | b.dense(*size))
    assert same(a & b, b & a)
    assert same(a | b, b | a)
    assert same(a & (b | c), (a & b) | (a & c))
    assert same(~(a & b), ~a | ~b)
    assert same(~(a | b), ~a & ~b)
    assert same(~~a, a)


def _tiles(dense: Tensor, size: int) -> Iterator[list[Tensor]]:
    for row in dense.split(size):
        yield list(row.split(size, dim=1))


@settings(max_examples=150, deadline=None)
@given(patterns(), lengths, st.integers(1, 45))
def test_blocks_are_the_matrix_cut_into_tiles(pattern: Pattern, size: tuple[int, int], block_size: int) -> None:
    dense, layout = pattern.dense(*size), pattern.blocks(*size, block_size)
    live = computed = 0
    for row, tiles in enumerate(_tiles(dense, block_size)):
        for column, tile in enumerate(tiles):
            state = FULL if tile.all() else PARTIAL if tile.any() else DEAD
            assert layout.states[row, column] == state
            assert layout.pairs[row, column] == tile.sum()
            number = int(layout.mask_numbers[row, column])
            assert (number >= 0) == (state == PARTIAL)
            if state == PARTIAL:
                assert torch.equal(layout.masks[number][: tile.size(0), : tile.size(1)], tile)
                assert layout.masks[number].sum() == tile.sum()
            live += state != DEAD
            computed += tile.numel() * (state != DEAD)
    assert layout.live_blocks == live
    assert layout.live_fraction == live / layout.states.numel()
    assert layout.live_pairs == dense.sum()
    assert layout.computed_pairs == computed


@pytest.mark.parametrize("name", DEFINED)
@pytest.mark.parametrize(("length", "block_size"), [(64, 16), (60, 16), (96, 32)])
def test_blocks_equal_flex_attentions(name: str, length: int, block_size: int) -> None:
    pattern, _ = DEFINED[name]
    dense = pattern.dense(length, length)
    theirs = create_block_mask(lambda b, h, i, j: dense[i, j], None, None, length, length, "cpu", block_size)
    assert torch.equal((pattern.blocks(length, length, block_size).states != DEAD).int(), theirs.to_dense()[0, 0].int())
