"""The synchronous schedules by name: what ``--schedule`` takes."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from minillm.distributed.pipeline.breadth_first import breadth_first
from minillm.distributed.pipeline.chimera import chimera
from minillm.distributed.pipeline.dualpipe import dualpipe
from minillm.distributed.pipeline.gpipe import gpipe
from minillm.distributed.pipeline.interleaved import interleaved
from minillm.distributed.pipeline.naive import naive
from minillm.distributed.pipeline.one_f_one_b import one_f_one_b
from minillm.distributed.pipeline.schedule import Schedule
from minillm.distributed.pipeline.sizes import check_sizes
from minillm.distributed.pipeline.zero_bubble import zero_bubble


@dataclass(frozen=True)
class Recipe:
    """How to make a schedule.

    Attributes:
        make: (n_stages, n_micro_batches) -> schedule; with `takes_chunks` (n_stages, n_micro_batches, n_chunks).
        takes_chunks: whether the number of chunks on a stage is free.
        pieces_per_stage: n_pieces / n_stages where it is not.
    """

    make: Callable[..., Schedule]
    takes_chunks: bool = False
    pieces_per_stage: int = 1


SCHEDULES: Mapping[str, Recipe] = MappingProxyType(
    {
        "naive": Recipe(naive),
        "gpipe": Recipe(gpipe),
        "1f1b": Recipe(one_f_one_b),
        "interleaved": Recipe(interleaved, takes_chunks=True),
        "breadth-first": Recipe(breadth_first, takes_chunks=True),
        "zb-h1": Recipe(partial(zero_bubble, variant="h1")),
        "zb-h2": Recipe(partial(zero_bubble, variant="h2")),
        "zb-v": Recipe(partial(zero_bubble, variant="v"), pieces_per_stage=2),
        "chimera": Recipe(chimera),
        "dualpipe": Recipe(dualpipe),
    }
)


def make_schedule(name: str, n_stages: int, n_micro_batches: int, n_chunks: int = 1) -> Schedule:
    """The schedule of a name.

    Args:
        name: one of `SCHEDULES`.
        n_stages: p.
        n_micro_batches: m.
        n_chunks: v, pieces of the model on each stage, for the schedules that take it; for the others 1, or as many as
            they have.

    Raises:
        TypeError, ValueError: a name that is not there, sizes that the schedule does not take, or chunks where it takes
            none.
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(str(name).lower().replace("_", "-"), SCHEDULES, n=1, cutoff=0.0)[0]
        raise ValueError(f'schedule must be one of {", ".join(SCHEDULES)}, got {name!r}; the nearest is "{near}"')
    recipe = SCHEDULES[name]
    if recipe.takes_chunks:
        return recipe.make(n_stages, n_micro_batches, n_chunks)
    check_sizes(name, n_chunks=n_chunks)
    if n_chunks not in (1, recipe.pieces_per_stage):
        chunked = " or ".join(other for other, found in SCHEDULES.items() if found.takes_chunks)
        raise ValueError(
            f"n_chunks is for the schedules that take it ({chunked}), {name} cuts the model into "
            f"{recipe.pieces_per_stage} a stage; got {n_chunks}, the nearest that will do is {recipe.pieces_per_stage}"
        )
    return recipe.make(n_stages, n_micro_batches)
