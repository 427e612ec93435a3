"""Sparse patterns are what the papers' formulas say, pair by pair, and their tiles are the reduction of the matrix."""

from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdModel
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from minillm.layers import block_sparse_attention
from minillm.layers.block_layout import DEAD, FULL, PARTIAL, Extent
from minillm.layers.sparse_algebra import Pattern
from minillm.layers.sparse_compounds import (
    big_bird,
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
            st.integers(0, 2**31 - 1),
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


def _heads(layer: torch.nn.Module, hidden: Tensor, n_heads: int) -> list[Tensor]:
    return [
        getattr(layer, name)(hidden).unflatten(-1, (n_heads, -1)).transpose(1, 2) for name in ("query", "key", "value")
    ]


@pytest.mark.parametrize("global_places", [[], [0], [0, 5, 23]])
def test_longformer_equals_transformers(global_places: list[int]) -> None:
    length, window = 48, 8
    config = transformers.LongformerConfig(
        hidden_size=16, num_attention_heads=2, attention_window=[window], num_hidden_layers=1
    )
    theirs = LongformerSelfAttention(config, 0).eval()
    for name in ("query", "key", "value"):  # the authors give global tokens weights of their own; the pattern is one
        getattr(theirs, f"{name}_global").load_state_dict(getattr(theirs, name).state_dict())
    hidden = torch.randn(2, length, 16)
    is_global = torch.zeros(2, length, dtype=torch.bool)
    is_global[:, global_places] = True
    expected = theirs(
        hidden,
        attention_mask=is_global.float() * 10000,
        is_index_masked=torch.zeros_like(is_global),
        is_index_global_attn=is_global,
        is_global_attn=bool(global_places),
    )[0]
    ours = block_sparse_attention(
        *_heads(theirs, hidden, 2), longformer(window, global_places=global_places), block_size=16
    )
    torch.testing.assert_close(ours.transpose(1, 2).flatten(2), expected, atol=1e-5, rtol=1e-5)


class Drawn(Pattern):
    """Pairs of blocks from a table: a pattern of a user's own needs these two methods."""

    def __init__(self, table: Tensor, block_size: int) -> None:
        self.table, self.block_size = table, block_size

    def allowed(self, place: Tensor, key: Tensor, key_length: int) -> Tensor:
        return self.table[place // self.block_size, key // self.block_size]

    def bounds(self, place: Extent, key: Extent, key_length: int) -> tuple[Tensor, Tensor]:
        nothing = torch.zeros_like(place.first + key.first, dtype=torch.bool)
        return ~nothing, nothing


def test_big_bird_equals_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    length, size = 96, 8
    config = transformers.BigBirdConfig(
        hidden_size=8, num_attention_heads=1, block_size=size, num_random_blocks=2, max_position_embeddings=length
    )
    theirs = BigBirdBlockSparseAttention(config, seed=7)  # in training: outside it, it draws nothing
    drawn: list[Tensor] = []
    gather = theirs.torch_gather_b2
    monkeypatch.setattr(theirs, "torch_gather_b2", lambda blocks, rows: (drawn.append(rows), gather(blocks, rows))[1])
    hidden = torch.randn(1, length, 8)
    blocked, band_mask, from_mask, to_mask = BigBirdModel.create_masks_for_block_sparse_attn(
        torch.ones(1, length), size
    )
    expected = theirs(hidden, band_mask, from_mask, to_mask, blocked, blocked)[0]

    # Which blocks are random is drawn otherwise; theirs stand in for ours, beside our window and global blocks.
    table = torch.zeros(length // size, length // size, dtype=torch.bool)
    for row, columns in enumerate(drawn[0][0, 0], start=1):  # the first and the last row are global
        table[row, columns] = True
    pattern = big_bird(size, n_random_blocks=0) | Drawn(table, size)
    ours = block_sparse_attention(*_heads(theirs, hidden, 1), pattern, block_size=size)
    torch.testing.assert_close(ours.transpose(1, 2).flatten(2), expected.view(1, length, 8), atol=1e-5, rtol=1e-5)
    # Two full rows; three blocks of window and two global ones in the others, at the ends one less; two random ones.
    assert pattern.blocks(length, length, size).live_blocks == 2 * 12 + (4 + 8 * 5 + 4) + 10 * 2


def test_random_blocks_are_as_many_as_asked_and_spread_evenly() -> None:
    rows = columns = 200
    pattern = random_blocks(8, block_size=4, seed=1)
    table = pattern.blocks(4 * rows, 4 * columns, 4)
    assert set(table.states.unique().tolist()) == {DEAD, FULL}
    live = table.states == FULL
    assert (live.sum(1) == 8).all()
    # A column is hit by a row with probability 8 / 200: mean 8, and a chi-square of 199 degrees of freedom.
    hits = live.sum(0).double()
    assert ((hits - 8) ** 2 / 8).sum() < 199 + 5 * (2 * 199) ** 0.5
    together = (live.double() @ live.double().T).fill_diagonal_(0)
    assert abs(together.sum() / (rows * (rows - 1)) - 8 * 8 / 200) < 0.05  # two rows share no more than by chance

    def draw(seed: int) -> Tensor:
        return random_blocks(8, block_size=4, seed=seed).dense(100, 100)

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


def test_causal_random_blocks_stay_while_the_text_grows() -> None:
    pattern = random_blocks(3, block_size=4, seed=2, causal=True)
    whole = pattern.dense(80, 80)
    assert (whole.view(20, 4, 20, 4)[:, 0, :, 0].sum(1) == torch.arange(1, 21).clamp(max=3)).all()
    for length in (1, 7, 33, 79):
        assert torch.equal(pattern.dense(length, length), whole[:length, :length])
        assert torch.equal(pattern.dense(1, length), whole[length - 1 : length, :length])  # one token from a cache


def test_patterns_are_values() -> None:
    assert longformer(8) == longformer(8)
    assert hash(big_bird(4)) == hash(big_bird(4))
    assert longformer(8) != longformer(8, dilation=2)
    assert len({causal() & band(3), causal() & band(3), band(3) & causal()}) == 2
    with pytest.raises(AttributeError):
        causal().behind = 3  # type: ignore[attr-defined]
    with pytest.raises(TypeError):
        causal() & torch.ones(3, 3).bool()  # type: ignore[operator]


def test_a_long_band_is_found_without_looking_into_every_tile() -> None:
    layout = sliding_window(64).blocks(2**16, 2**16, 256)  # 2^32 pairs: not to be looked at one by one
    assert layout.live_blocks == 2 * 256 - 1
    assert layout.live_pairs == 64 * 2**16 - 63 * 64 // 2
    assert len(layout.masks) == 2


def test_counts_of_a_window_by_hand() -> None:
    # 64 tokens, a window of 16, tiles of 16: the diagonal and the tile before it, 4 + 3 of 16 tiles.
    layout = sliding_window(16).blocks(64, 64, 16)
    assert layout.live_fraction == 7 / 16
    assert layout.live_pairs == 16 * 64 - 15 * 16 // 2
    cost = layout.cost(32, n_heads=4, n_kv_heads=2, bytes_per_value=2)
    assert cost.flops == 4 * 7 * 16 * 16 * 32 * 4
    assert cost.score_bytes == 4 * 16 * 32 * 4
    assert cost.key_bytes == 7 * 16 * 2 * 32 * 2 * 2
    dense = layout.dense_cost(32, n_heads=4, n_kv_heads=2, bytes_per_value=2)
    assert dense.flops == 4 * 64 * 64 * 32 * 4
    assert dense.score_bytes == 4 * 64 * 64 * 4
    assert dense.key_bytes == 4 * 64 * 2 * 32 * 2 * 2


def test_draws_itself() -> None:
    assert sliding_window(2).draw(3) == "■ · ·\n■ ■ ·\n· ■ ■"
    assert causal().draw(1, 3) == "■ ■ ■"
    assert sliding_window(3).blocks(6, 6, 2).draw() == "▒ · ·\n▒ ▒ ·\n· ▒ ▒"
    assert block_local(2).blocks(4, 4, 2).draw() == "█ ·\n· █"


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: sliding_window(0), ValueError, "window must be at least 1"),
        (lambda: band(-1), ValueError, "behind must be at least 0"),
        (lambda: band(1.5), TypeError, "behind must be an integer"),
        (lambda: dilated(1, 1, 0), ValueError, "dilation must be at least 1"),
        (lambda: block_local(0), ValueError, "block_size must be at least 1"),
        (lambda: global_tokens(-1), ValueError, "places must be at least 0"),
        (lambda: global_tokens([5], every=5), ValueError, "places must lie in"),
        (lambda: random_blocks(-1), ValueError, "n_blocks must be at least 0"),
        (lambda: random_blocks(1, seed=1.5), TypeError, "seed must be an integer"),
        (lambda: random_blocks(1, seed=2**31), ValueError, "seed must be below"),
        (lambda: band(2**63), ValueError, r"behind must be at most 2\*\*31"),
        (lambda: global_tokens([1.5]), TypeError, "places must be an integer, got 1.5"),
        (lambda: global_tokens(2.0), TypeError, "places must be a number of tokens or their places"),
        (lambda: sparse_transformer_strided(2.5), TypeError, "stride must be an integer"),
        (lambda: sparse_transformer_fixed(4, 2.0), TypeError, "c must be an integer"),
        (lambda: longformer(4.0), TypeError, "window must be an integer"),
        (lambda: big_bird(4, window_blocks=3.0), TypeError, "window_blocks must be an integer"),
        (lambda: causal().blocks(8, 8, 8) and causal().blocks(8, 8, 8.0), TypeError, "block_size must be an integer"),
        (lambda: causal().blocks(8, 8, 8).cost(-3), ValueError, "head_dim must be at least 1"),
        (lambda: sparse_transformer_strided(0), ValueError, "at least 1"),
        (lambda: sparse_transformer_fixed(4, 5), ValueError, "c must be in"),
        (lambda: longformer(5), ValueError, "window must be even"),
        (lambda: big_bird(4, window_blocks=2), ValueError, "window_blocks must be odd"),
        (lambda: causal().blocks(4, 4, 0), ValueError, "block_size must be at least 1"),
        (lambda: causal().dense(-1, 4), ValueError, "query_length must be at least 0"),
    ],
)
def test_refuses_what_makes_no_pattern(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_tile_is_no_longer_than_the_text() -> None:
    layout = causal().blocks(29, 29, 8192)
    assert layout.masks.shape == (1, 29, 29)
    assert (layout.states.shape, layout.live_pairs) == ((1, 1), 29 * 30 // 2)


def test_layouts_are_made_on_the_cpu_whatever_the_default_device() -> None:
    with torch.device("meta"):
        layout = (star() | random_blocks(1, block_size=3)).blocks(31, 31, 4)
    assert layout.live_pairs > 0
    assert {t.device.type for t in (layout.states, layout.pairs, layout.masks, layout.mask_numbers)} == {"cpu"}


def test_a_star_of_two_tokens_and_a_query_before_them() -> None:
    """Only the relay, token 0, is seen from a place before the text; the two tokens see each other."""
    assert star().dense(3, 2).tolist() == [[True, False], [True, True], [True, True]]


def test_global_places_far_before_a_short_text_are_nowhere() -> None:
    assert not global_tokens([-8], symmetric=False).dense(3, 3).any()
