"""Chimera: two pipelines through the same stages, in opposite directions.

Each stage holds two pieces of the model, its own and that of its mirror image, so that the model is there twice. Half
of the micro-batches go down, half go up, each half in the order of 1F1B; where one pipeline would wait, the other one
computes. The gradients of the two copies are added up at the end. (Li & Hoefler 2021, "Chimera: Efficiently Training
Large-Scale Neural Networks with Bidirectional Pipelines", section 3.)
"""

from __future__ import annotations

from minillm.distributed.pipeline.actions import Action, Kind
from minillm.distributed.pipeline.schedule import Schedule, schedule_of
from minillm.distributed.pipeline.sizes import check_multiple, check_sizes


def chimera(n_stages: int, n_micro_batches: int) -> Schedule:
    """Two pipelines, one behind the other's back.

    With p stages and m micro-batches, a multiple of p, the bubble is (p - 2) / (2m + p - 2) of the total if a backward
    pass takes as long as a forward pass, where 1F1B has 2 (p - 1) / (2m + 2 (p - 1)). If it takes twice as long, a
    stage waits for (p - 2) (1 + m/p) forward passes: with one unit the bubble is (p - 2) / (3m/2 + p - 2). In flight
    are p/2 + 1 micro-batches on the first and the last stage, up to p on the middle ones: p/2 + 1 + min(s, p - 1 - s).

    Args:
        n_stages: p, even.
        n_micro_batches: m, even. They go in units of p, of which p/2 go each way.

    Raises:
        TypeError, ValueError: sizes that are no int, below 1 or odd.
    """
    check_sizes("Chimera", n_stages=n_stages, n_micro_batches=n_micro_batches)
    check_multiple("Chimera", "n_stages", n_stages, 2, "with an odd number both pipelines want one stage at one time")
    check_multiple("Chimera", "n_micro_batches", n_micro_batches, 2, "half of them go down, half go up")
    route_of: list[int] = []
    timed: list[list[tuple[int, Action]]] = [[] for _ in range(n_stages)]
    for start in range(0, n_micro_batches, n_stages):
        unit = min(n_stages, n_micro_batches - start)
        route_of += [0] * (unit // 2) + [1] * (unit // 2)
        for i in range(unit):
            route, place = divmod(i, unit // 2)
            for stage in range(n_stages):
                # 1F1B on a clock that ticks once a pass: down and up come at even and odd ticks, or at p ticks apart.
                passed = stage if route == 0 else n_stages - 1 - stage
                forward = 2 * start + 2 * place + passed
                backward = 2 * start + 2 * place + 2 * n_stages - 1 - passed
                timed[stage] += [
                    (forward, Action(Kind.FORWARD, start + i, route)),
                    (backward, Action(Kind.BACKWARD, start + i, route)),
                ]
    orders = [[action for _, action in sorted(pairs, key=lambda pair: pair[0])] for pairs in timed]
    down = tuple((stage, 0) for stage in range(n_stages))
    up = tuple((stage, 1) for stage in reversed(range(n_stages)))
    return schedule_of("Chimera", orders, n_micro_batches=n_micro_batches, routes=[down, up], route_of=route_of)
