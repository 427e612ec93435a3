"""Interleaved 1F1B: Megatron's bubble and memory, counted exactly."""

import pytest

from minillm.distributed.pipeline import interleaved, one_f_one_b, validate

SIZES = [(p, m) for p in range(1, 9) for m in range(p, 25, p)]


@pytest.mark.parametrize("v", range(1, 5))
def test_chunks_divide_the_bubble_and_cost_memory(v: int) -> None:
    for p, m in SIZES:
        proof = validate(interleaved(p, m, v))
        of_the_work = proof.bubble / (1 - proof.bubble)
        assert of_the_work == pytest.approx((p - 1) / (v * m)), (p, m)
        chunks = [min((v - 1) * p + 2 * (p - 1 - s) + 1, v * m) for s in range(p)]
        held = [min(p - s, m) for s in range(p)] if v == 1 else [number / v for number in chunks]
        assert proof.peak_in_flight == pytest.approx(held), (p, m)
        if v > 1 and m > p:  # Megatron's formula
            assert proof.peak_in_flight[0] == pytest.approx(p * (1 + (p - 1) / (p * v)))


def test_one_chunk_is_1f1b_for_any_number_of_micro_batches() -> None:
    for p, m in [(1, 4), (4, 3), (4, 9)]:
        assert interleaved(p, m, 1).actions == one_f_one_b(p, m).actions


def test_the_order_of_megatrons_figure() -> None:
    """Figure 4: four devices, eight micro-batches, two chunks; the first device."""
    assert str(interleaved(4, 8, 2)).splitlines()[1] == (
        "stage 0: F0 F1 F2 F3 F0.1 F1.1 F2.1 F3.1 F4 F5 F6 B0.1 F7 B1.1 F4.1 B2.1 F5.1 B3.1 F6.1 B0 F7.1 B1 B2 B3 "
        "B4.1 B5.1 B6.1 B7.1 B4 B5 B6 B7"
    )
