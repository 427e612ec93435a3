"""GPipe: its bubble and its memory are the paper's, and its way back takes as long as PyTorch's."""

import pytest

from minillm.distributed.pipeline import gpipe, simulate, validate


@pytest.mark.parametrize("p", range(1, 9))
def test_it_waits_for_p_minus_1_slots_and_holds_every_micro_batch(p: int) -> None:
    for m in range(1, 25):
        proof = validate(gpipe(p, m))
        assert proof.bubble == pytest.approx((p - 1) / (m + p - 1))
        assert list(proof.peak_in_flight) == [m] * p
    assert simulate(gpipe(p, m)).makespan == 3 * (m + p - 1)


@pytest.mark.parametrize(("forward", "backward"), [(1, 1), (2, 3), (1, 3)])
def test_the_bubble_is_the_same_share_whatever_the_passes_take(forward: int, backward: int) -> None:
    for p, m in [(2, 1), (4, 4), (4, 16), (8, 5)]:
        timeline = simulate(gpipe(p, m), forward=forward, backward=backward)
        assert timeline.makespan == (forward + backward) * (m + p - 1)


def test_the_order_of_a_small_one() -> None:
    """The paper's figure 2c: the way back begins with the last micro-batch."""
    assert str(gpipe(2, 3)).splitlines()[1:] == ["stage 0: F0 F1 F2 B2 B1 B0", "stage 1: F0 F1 F2 B2 B1 B0"]
