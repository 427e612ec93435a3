"""What data-parallel training keeps and sends on each rank: plain, or under ZeRO.

Mixed-precision Adam keeps 16 bytes for each of Psi parameters: 2 for the parameter, 2 for its gradient, and 12 of
optimizer state: the parameter in float32, the mean and the mean square. ZeRO cuts these over N ranks in stages
(Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", arXiv 1910.02054,
sections 3.1, 5 and 7):

    stage   cut over ranks                bytes per rank            values sent per rank and step
    0       nothing                       16 Psi                    2 Psi  (all-reduce of the gradients)
    1       optimizer state, P_os          4 Psi + 12 Psi / N       2 Psi  (reduce-scatter, all-gather)
    2       gradients too, P_os+g          2 Psi + 14 Psi / N       2 Psi
    3       parameters too, P_os+g+p      16 Psi / N                3 Psi  (a second all-gather, for backward)

The paper's 2 Psi and 3 Psi hold for many ranks; on N of them a ring sends (N-1)/N of each. Activations, buffers and the
parameters that stage 3 gathers for a moment are not in these numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from minillm.costs.arguments import at_least, one_of

STAGES = (0, 1, 2, 3)


def zero_bytes_per_rank(
    n_parameters: float,
    world_size: int,
    stage: int,
    *,
    parameter_bytes: float = 2,
    gradient_bytes: float = 2,
    optimizer_bytes: float = 12,
) -> float:
    """Bytes of parameters, gradients and optimizer state on one of `world_size` ranks; see the module for the formulas.

    Args:
        n_parameters: Psi. stage: 0 (plain data parallel) to 3.
        parameter_bytes, gradient_bytes, optimizer_bytes: for each parameter. The defaults are mixed-precision Adam;
            float32 Adam has 4, 4 and 8, and mixed-precision SGD with momentum 2, 2 and 8.

    Raises:
        ValueError: a value out of range.
    """
    return sum(
        zero_bytes_by_kind(
            n_parameters,
            world_size,
            stage,
            parameter_bytes=parameter_bytes,
            gradient_bytes=gradient_bytes,
            optimizer_bytes=optimizer_bytes,
        ).values()
    )


def zero_bytes_by_kind(
    n_parameters: float,
    world_size: int,
    stage: int,
    *,
    parameter_bytes: float = 2,
    gradient_bytes: float = 2,
    optimizer_bytes: float = 12,
) -> dict[str, float]:
    """`zero_bytes_per_rank` by what the bytes hold: "parameters", "gradients" and "optimizer state"."""
    at_least(0, n_parameters=n_parameters, parameter_bytes=parameter_bytes, gradient_bytes=gradient_bytes)
    at_least(0, optimizer_bytes=optimizer_bytes)
    at_least(1, world_size=world_size)
    one_of(STAGES, stage=stage)
    return {
        "parameters": parameter_bytes * n_parameters / (world_size if stage >= 3 else 1),
        "gradients": gradient_bytes * n_parameters / (world_size if stage >= 2 else 1),
        "optimizer state": optimizer_bytes * n_parameters / (world_size if stage >= 1 else 1),
    }


def zero_communication_bytes(
    n_parameters: float,
    stage: int,
    world_size: int | None = None,
    *,
    parameter_bytes: float = 2,
    gradient_bytes: float = 2,
    micro_batches: int = 1,
    reshard_after_forward: bool = True,
) -> float:
    """Bytes that a rank sends in one step, by the ring algorithm (section 7.2).

    Stages 0 and 1 keep whole gradients and add up those of `micro_batches` k before they are sent; from stage 2 on each
    micro-batch's are reduced at once, and at stage 3 its parameters are gathered once more:

        stage 0    2 Psi g                         g: gradient_bytes, p: parameter_bytes
        stage 1    Psi (g + p)
        stage 2    Psi (k g + p)
        stage 3    Psi k (g + 2 p); Psi k (g + p) without `reshard_after_forward`

    Args:
        n_parameters: Psi. stage: 0 to 3. world_size: N; all of it times (N-1)/N. None: as if N were without end, as the
            paper has it. parameter_bytes, gradient_bytes: of a value that is gathered, and of one that is reduced.
        micro_batches: k, of one step. reshard_after_forward: stage 3 lets the parameters go after forward.

    Raises:
        ValueError: a value out of range.
    """
    at_least(0, n_parameters=n_parameters, parameter_bytes=parameter_bytes, gradient_bytes=gradient_bytes)
    at_least(1, micro_batches=micro_batches)
    one_of(STAGES, stage=stage)
    reductions, gathers = {
        0: (2, 0),
        1: (1, 1),
        2: (micro_batches, 1),
        3: (micro_batches, micro_batches * (2 if reshard_after_forward else 1)),
    }[stage]
    return share_sent(world_size) * n_parameters * (reductions * gradient_bytes + gathers * parameter_bytes)


class ZeroMemory(NamedTuple):
    """One entry of the paper's Table 1: `printed` is the number as the paper writes it."""

    n_parameters: float
    world_size: int
    stage: int
    gigabytes: float
    printed: str


def zero_table(
    n_parameters: Sequence[float] = (7.5e9, 128e9, 1e12),
    world_sizes: Sequence[int] = (1, 4, 16, 64, 256, 1024),
    stages: Sequence[int] = (1, 2, 3),
) -> list[ZeroMemory]:
    """Gigabytes of model state per rank (Rajbhandari et al. 2020, Table 1): by ranks, then by model, then by stage.

    A gigabyte is 10^9 bytes. The paper cuts numbers from 100 on to whole ones (513.5 is "513"), and rounds those from
    10 on to one decimal and smaller ones to two, halves up (41.25 is "41.3").
    """
    rows = []
    for world_size in world_sizes:
        for n in n_parameters:
            for stage in stages:
                gigabytes = zero_bytes_per_rank(n, world_size, stage) / 1e9
                rows.append(ZeroMemory(n, world_size, stage, gigabytes, _as_printed(gigabytes)))
    return rows


def zero_largest_model(
    memory_bytes: float,
    world_size: int,
    stage: int,
    *,
    model_parallel: int = 1,
    parameter_bytes: float = 2,
    gradient_bytes: float = 2,
    optimizer_bytes: float = 12,
) -> float:
    """Parameters of the largest model whose states fit `memory_bytes` a rank (Table 2, "Max Theoretical Model Size").

    With model parallelism over `model_parallel` ranks each holds that part of the model, and `world_size` is the number
    of ranks that hold the same part: 64 in each of the paper's rows, 64 to 1024 GPUs of 32 GB in all. Its later rows
    are multiples of the first one as printed (15.2B is 2 times 7.6B; 15.3B follow).

    Raises:
        ValueError: a value out of range.
    """
    at_least(0, memory_bytes=memory_bytes)
    at_least(1, model_parallel=model_parallel)
    one = zero_bytes_per_rank(
        1,
        world_size,
        stage,
        parameter_bytes=parameter_bytes,
        gradient_bytes=gradient_bytes,
        optimizer_bytes=optimizer_bytes,
    )
    if one == 0:
        raise ValueError("parameter_bytes, gradient_bytes and optimizer_bytes are all 0: any model fits")
    return model_parallel * memory_bytes / one


def share_sent(world_size: int | None) -> float:
    """(N-1)/N: what a rank sends of a buffer that is gathered, or reduced and scattered."""
    if world_size is None:
        return 1.0
    at_least(1, world_size=world_size)
    return (world_size - 1) / world_size


def _as_printed(gigabytes: float) -> str:
    if gigabytes >= 100:
        return str(math.floor(gigabytes))
    decimals = 1 if gigabytes >= 10 else 2
    return f"{math.floor(gigabytes * 10**decimals + 0.5) / 10**decimals:.{decimals}f}".rstrip("0").rstrip(".")
