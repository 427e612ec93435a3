"""The computed permutation: a bijection for every size, and as random as numpy's."""

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data.shuffle import mix, permute, random_integer


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_every_number_once(n: int, key: int, epoch: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key, epoch)), np.arange(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 2**50), start=st.integers(0, 2**50), key=st.integers())
def test_one_position_at_a_time_gives_the_same_as_many(n: int, start: int, key: int) -> None:
    positions = np.unique((start + np.arange(5)) % n)
    together = permute(positions, n, key)
    assert [int(permute(position, n, key)) for position in positions] == together.tolist()
    assert len(set(together.tolist())) == len(positions)
    assert together.min() >= 0
    assert together.max() < n


def test_every_order_of_four_things_comes_up_equally_often() -> None:
    orders = [tuple(permute(np.arange(4), 4, key).tolist()) for key in range(2400)]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert min(counts) > 0
    chi_squared = sum((count - 100) ** 2 / 100 for count in counts)
    assert chi_squared < 49.7  # the 99.9 % point of 23 degrees of freedom


def test_where_an_element_goes_says_nothing_about_its_neighbours() -> None:
    n = 10_000
    images = permute(np.arange(n), n, 7).astype(float)
    for lag in (1, 2, 64, 100):
        assert abs(np.corrcoef(images[:-lag], images[lag:])[0, 1]) < 4 / np.sqrt(n)
    assert abs(np.corrcoef(images, np.arange(n))[0, 1]) < 4 / np.sqrt(n)
    other = permute(np.arange(n), n, 8).astype(float)
    assert abs(np.corrcoef(images, other)[0, 1]) < 4 / np.sqrt(n)
    # A random permutation has one fixed point in expectation; Poisson(1) is above 8 once in a million.
    assert sum(images == np.arange(n)) <= 8


def test_mix_is_the_published_splitmix64() -> None:
    # The first three outputs of SplitMix64 seeded with 1234567, as its authors' reference program prints them.
    state = np.array([1234567], dtype=np.uint64) + np.arange(3, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    assert mix(state).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_the_order_never_changes_between_versions() -> None:
    # A run that is resumed years later with other libraries must see the same order.
    order = permute(np.arange(1000), 1000, 1, 2, 3).astype("<i8").tobytes()
    assert hashlib.sha256(order).hexdigest()[:16] == "2c30bc72da57cb0f"


def test_random_integers_are_spread_evenly() -> None:
    counts = np.bincount([random_integer(10, seed, 5) for seed in range(5000)], minlength=10)
    assert ((counts - 500) ** 2 / 500).sum() < 27.9  # the 99.9 % point of 9 degrees of freedom


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="n must be at least 1"):
        permute(np.arange(3), 0, 1)
    with pytest.raises(ValueError, match=r"positions must lie in 0 \.\. 2, got 3"):
        permute(np.arange(4), 3, 1)
