"""The breadth-first looped pipeline: interleaving's bubble, GPipe's memory; passes of a chunk stand together."""

from itertools import groupby

import pytest

from minillm.distributed.pipeline import breadth_first, gpipe, validate


@pytest.mark.parametrize("v", range(1, 5))
def test_it_has_the_bubble_of_interleaving_and_the_memory_of_gpipe(v: int) -> None:
    for p in range(1, 9):
        for m in sorted({1, 2, p, p + 1, 12} | ({max(p - 1, 1), 24} if v == 2 else set())):
            proof = validate(breadth_first(p, m, v))
            waits = p - 1 + (v - 1) * max(p - m, 0)
            assert proof.bubble / (1 - proof.bubble) == pytest.approx(waits / (v * m)), (p, m)
            assert proof.peak_in_flight == pytest.approx([m] * p)


def test_a_chunks_weights_are_wanted_once_on_the_way_there_and_once_on_the_way_back() -> None:
    runs = [chunk for chunk, _ in groupby(action.chunk for action in breadth_first(4, 8, 3).computes(1))]
    assert runs == [0, 1, 2, 1, 0]


def test_one_chunk_is_gpipe() -> None:
    assert breadth_first(4, 9, 1).actions == gpipe(4, 9).actions
