"""Each step's arrows, and what each rank holds after it, as the simulated ring all-reduce itself has it."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from minillm.distributed import ring_all_gather, ring_all_reduce, simulate_ranks
from minillm.plots import ring_steps


def _texts(axes: Axes, n_chunks: int) -> list[list[str]]:
    texts = [text.get_text() for text in axes.texts]
    return [texts[start : start + n_chunks] for start in range(0, len(texts), n_chunks)]


def _framed(axes: Axes) -> list[tuple[int, int]]:
    """(rank, chunk) of what the step changed."""
    patches = [patch for patch in axes.patches if isinstance(patch, Rectangle) and patch.get_gid() == "changed"]
    return sorted((round(patch.get_y() + 0.42), round(patch.get_x() + 0.46)) for patch in patches)


def _reduced() -> list[float]:
    tensor = torch.full((6,), 10.0 ** dist.get_rank())
    ring_all_reduce(tensor)
    return tensor.tolist()


def test_draws_a_ring_all_reduce_from_its_messages() -> None:
    simulation = simulate_ranks(_reduced, 3)
    assert simulation.results == [[111.0] * 6] * 3
    figure = ring_steps(simulation.messages, title="Three $ranks$")
    panels = [axes for axes in figure.axes if axes.axison]
    assert [axes.get_title(loc="left") for axes in panels] == [
        "start", "step 1: reduce", "step 2: reduce", "step 3: gather", "step 4: gather",
    ]  # fmt: skip
    assert _texts(panels[0], 3) == [["0"] * 3, ["1"] * 3, ["2"] * 3]
    middle = _texts(panels[2], 3)
    assert [row.count("Σ") for row in middle] == [1, 1, 1]  # each rank has one whole chunk, its own
    assert [row.index("Σ") for row in middle] == [0, 1, 2]
    assert _texts(panels[4], 3) == [["Σ"] * 3] * 3
    for axes in panels[1:]:
        assert len([patch for patch in axes.patches if isinstance(patch, FancyArrowPatch)]) == 3
        assert sorted({rank for rank, _ in _framed(axes)}) == [0, 1, 2]
    assert figure.get_suptitle() == "Three $ranks$"
    figure.draw_without_rendering()


def _gathered() -> None:
    ring_all_gather(torch.ones(2))


def test_messages_of_an_all_gather_replace() -> None:
    figure = ring_steps(simulate_ranks(_gathered, 4).messages)
    last = [axes for axes in figure.axes if axes.axison][-1]
    # An all-gather of parts: each chunk is its owner's alone, everywhere.
    assert _texts(last, 4) == [["0", "1", "2", "3"]] * 4


def test_plain_messages() -> None:
    steps = ring_steps([(0, 1, "reduce chunk 0"), (1, 0, "reduce chunk 1"), (1, 0, "copy chunk 0")], columns=2)
    panels = [axes for axes in steps.axes if axes.axison]
    assert _texts(panels[1], 2) == [["0", "Σ"], ["Σ", "1"]]
    assert _framed(panels[1]) == [(0, 1), (1, 0)]
    assert _texts(panels[2], 2) == [["Σ", "Σ"], ["Σ", "1"]]
    assert len(steps.axes) == 4  # two lines of two, the last one empty


def test_many_ranks_are_shown_by_their_shade_alone() -> None:
    n = 12
    figure = ring_steps([(rank, (rank + 1) % n, f"reduce chunk {rank}") for rank in range(n)])
    assert not figure.axes[1].texts
    assert len([patch for patch in figure.axes[1].patches if patch.get_gid() == "chunk"]) == n * n
    assert figure.get_size_inches()[0] <= 17


@pytest.mark.parametrize(
    ("messages", "words"),
    [([], "messages is empty"), ([(0, 1, "hello")], "holds 'hello' from 0 to 1: expected \"<word> chunk <number>\"")],
)
def test_refuses_what_is_no_ring(messages: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ring_steps(messages)
