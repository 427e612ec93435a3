"""Hints in stages."""

import pytest

from minillm.exercises import hint


def test_hints_come_one_after_the_other(exercises):
    first = hint("90.1", folder=exercises)
    assert first.startswith('90.1 The sum (about 3 minutes): return the sum of the "numbers"')
    assert "hint 1 of 3: Which numbers does it start with?" in first
    assert "Two lines" not in first
    assert first.endswith("2 more: minillm exercises hint 90.1 --level 2")
    last = hint("90.1", 3, folder=exercises)
    assert "hint 2 of 3: Two lines are enough." in last
    assert "hint 3 of 3: result += number" in last
    assert last.endswith("the solution is in exercises/solutions/90_numbers.ipynb.")


@pytest.mark.parametrize(
    ("number", "level", "words"),
    [
        ("90", None, "like 2.1"),
        ("x.y", None, "like 2.1"),
        ("90.9", None, "no part 90.9; its parts: 90.1"),
        ("91.1", None, "90_numbers"),
        ("90.1", 0, "hints 1 to 3, not 0"),
        ("90.1", 4, "hints 1 to 3, not 4"),
    ],
)
def test_unknown_hints_are_refused(exercises, number, level, words):
    with pytest.raises(ValueError, match=words):
        hint(number, level, folder=exercises)
