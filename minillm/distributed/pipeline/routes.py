"""Where the pieces of a model stand, and the ways that micro-batches take through them."""

from __future__ import annotations

from collections.abc import Sequence

Place = tuple[int, int]
"""(stage, chunk)."""

Route = tuple[Place, ...]
"""Where a micro-batch goes: the place of each piece of the model, from the first to the last."""


class ScheduleError(ValueError):
    """A schedule that is not complete, not in order, or that gets stuck; the message says where."""


def loop_route(n_stages: int, n_chunks: int = 1) -> Route:
    """Round and round: piece i on stage ``i % n_stages``, as its chunk ``i // n_stages``."""
    return tuple((piece % n_stages, piece // n_stages) for piece in range(n_stages * n_chunks))


def v_route(n_stages: int) -> Route:
    """There and back: the first and the last piece on stage 0, the two middle ones on the last stage."""
    return tuple((i, 0) for i in range(n_stages)) + tuple((i, 1) for i in reversed(range(n_stages)))


def check_routes(name: str, n_stages: int, routes: Sequence[Route], route_of: Sequence[int]) -> None:
    """Refuse routes of a schedule that lead to no stage, or two pieces of the model in one place.

    Args:
        name: of the schedule.
        n_stages: how many it has.
        routes, route_of: see `minillm.distributed.pipeline.schedule.Schedule`.

    Raises:
        ScheduleError: it is so.
    """
    if not (n_stages and route_of and routes and routes[0]):
        raise ScheduleError(f"{name} needs at least 1 stage, 1 micro-batch, and 1 route through 1 piece")
    held: dict[Place, int] = {}
    for route in routes:
        if len(route) != len(routes[0]):
            raise ScheduleError(f"{name}: its routes pass {len(routes[0])} and {len(route)} pieces of one model")
        for piece, (stage, chunk) in enumerate(route):
            if not 0 <= stage < n_stages:
                raise ScheduleError(f"{name}: piece {piece} is on stage {stage}; its stages are 0 to {n_stages - 1}")
            if held.setdefault((stage, chunk), piece) != piece:
                raise ScheduleError(
                    f"{name}: stage {stage} has pieces {held[stage, chunk]} and {piece} as chunk {chunk}"
                )
    for stage in range(n_stages):
        chunks = sorted(chunk for at, chunk in held if at == stage)
        if chunks != list(range(len(chunks))):
            raise ScheduleError(
                f"{name}: the chunks of stage {stage} are numbered {chunks}; they count from 0, each once"
            )
    for m, which in enumerate(route_of):
        if not 0 <= which < len(routes):
            raise ScheduleError(f"{name}: micro-batch {m} takes route {which}; there are {len(routes)}, from 0")
