"""Cuts of a row of layers: against every cut there is."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.distributed.pipeline import partition


def sums(costs: Sequence[Fraction], cuts: Sequence[int]) -> list[Fraction]:
    return [sum(costs[i:j], Fraction()) for i, j in zip(cuts, (*cuts[1:], len(costs)), strict=True)]


def every_cut(n_layers: int, n_parts: int) -> list[tuple[int, ...]]:
    return [(0, *cuts) for cuts in combinations(range(1, n_layers), n_parts - 1)]


COSTS = [st.integers(0, 9), st.floats(0, 1e15), st.sampled_from([0.1, 0.2, 0.3])]
"""Whole numbers and tenths have many ties; sums of tenths would round."""


@pytest.mark.parametrize("cost", COSTS, ids=["whole numbers", "floats", "tenths"])
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_no_cut_is_better(cost: st.SearchStrategy[float], data: st.DataObject) -> None:
    costs = data.draw(st.lists(cost, min_size=1, max_size=9))
    n_parts = data.draw(st.integers(1, len(costs)))

    def rank(cuts: tuple[int, ...]) -> tuple[Fraction, Fraction, tuple[int, ...]]:
        parts = sums([Fraction(cost) for cost in costs], cuts)
        return max(parts), sum((part * part for part in parts), Fraction()), tuple(-cut for cut in reversed(cuts))

    assert partition(costs, n_parts) == min(every_cut(len(costs), n_parts), key=rank)


def test_equal_layers_are_dealt_evenly_and_the_first_parts_take_the_rest() -> None:
    assert partition([1.0] * 12, 4) == (0, 3, 6, 9)
    assert partition([0.1] * 14, 4) == (0, 4, 8, 11)
    assert partition([1.0] * 3, 3) == (0, 1, 2)
    assert partition([0.0] * 3, 2) in {(0, 1), (0, 2)}


def test_one_heavy_layer_sets_the_pace_and_the_others_are_spread_still() -> None:
    assert partition([9, 1, 1, 1, 1, 1, 1], 3) == (0, 1, 4)


def test_many_layers_take_no_time() -> None:
    costs = [Fraction(1 + i * 7919 % 13) for i in range(128)]
    assert max(sums(costs, partition([float(cost) for cost in costs], 16))) < sum(costs) / 16 + 13


@pytest.mark.parametrize(
    ("costs", "n_parts", "error", "words"),
    [
        ([1.0, 2.0], 3, ValueError, "2 layers can be cut into 1 to 2 parts, got 3; the nearest is 2"),
        ([1.0, 2.0], 0, ValueError, "got 0; the nearest is 1"),
        ([1.0, -2.0], 1, ValueError, "finite and at least 0"),
        ([1.0, float("nan")], 1, ValueError, "finite and at least 0"),
        ([1.0, float("inf")], 1, ValueError, "finite and at least 0"),
        ([], 1, ValueError, "at least one layer"),
        ([1.0, 2.0], 1.0, TypeError, "n_parts must be an int"),
        ([1.0, 2.0], True, TypeError, "n_parts must be an int"),
    ],
)
def test_what_cannot_be_cut(costs: list[float], n_parts: int, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        partition(costs, n_parts)
