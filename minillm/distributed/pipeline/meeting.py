"""Before the first step: all ranks of a pipeline mean the same pipeline, or all of them raise the same error."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from minillm.distributed.pipeline.copies import Shared
from minillm.distributed.pipeline.schedule import Schedule
from minillm.distributed.pipeline.split import Split, shared_parameters

Pieces = Split | Sequence[nn.Module] | Mapping[int, nn.Module]


def own_pieces(pieces: Pieces, schedule: Schedule, stage: int, shared: Shared) -> tuple[dict[int, nn.Module], Shared]:
    """This stage's pieces by number, and the parameters that stand in several pieces.

    Raises:
        ValueError: there are not as many as the schedule has, or not those that it has on this stage.
        TypeError: they are something else.
    """
    wanted = schedule.pieces[stage]
    if isinstance(pieces, Mapping):
        if set(pieces) != set(wanted):
            raise ValueError(
                f"stage {stage} holds pieces {_listed(wanted)} in {schedule.name}, got pieces {_listed(sorted(pieces))}"
            )
        return {piece: pieces[piece] for piece in wanted}, shared
    modules = list(pieces.pieces if isinstance(pieces, Split) else pieces if isinstance(pieces, Iterable) else ())
    if not modules or not all(isinstance(module, nn.Module) for module in modules):
        raise TypeError(
            "pieces must be a Split (of split(model, n_pieces)), a sequence of modules or a mapping from piece number "
            f"to module, got {type(pieces).__name__}"
        )
    if len(modules) != schedule.n_pieces:
        raise ValueError(
            f"the model is in {len(modules)} pieces, and {schedule.name} of {schedule.n_stages} stages takes "
            f"{schedule.n_pieces}: split(model, {schedule.n_pieces})"
        )
    found = pieces.shared if isinstance(pieces, Split) else shared_parameters(modules)
    return {piece: modules[piece] for piece in wanted}, [*found, *shared]


def check_settings(
    schedule: Schedule, held: Mapping[int, nn.Module], shared: Shared, optimizer: torch.optim.Optimizer | None
) -> None:
    """Raise ValueError where a schedule cannot be run in this way."""
    if schedule.synchronous:
        if optimizer is not None:
            raise ValueError(
                f"{schedule.name} makes no updates: leave optimizer=None, and call optimizer.step() after the step"
            )
        return
    if optimizer is None:
        raise ValueError(f"{schedule.name} updates the weights between its passes: give optimizer=")
    if schedule.splits_backward or max(map(len, schedule.pieces)) > 1:
        raise ValueError(f"{schedule.name} has updates: they are for whole backward passes and one chunk a stage")
    if shared:
        names = ", ".join(" = ".join(f"{name} of piece {piece}" for piece, name in keys) for keys in shared)
        raise ValueError(
            f"{schedule.name} updates each stage by itself, and {names} must stay equal: untie them, or take a "
            "synchronous schedule such as one_f_one_b"
        )
    known = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for piece, module in held.items():
        for name, parameter in module.named_parameters():
            if parameter.requires_grad and parameter not in known:
                raise ValueError(
                    f"optimizer does not have {name} of piece {piece}, which would never be updated: make it over the "
                    "parameters of this rank's pieces, or freeze what is not to learn"
                )


def stage_of(schedule: Schedule, group: dist.ProcessGroup | None) -> int:
    """This rank's stage.

    Raises:
        RuntimeError: there is no process group.
        ValueError: this rank is not in it, or it has not as many ranks as the schedule has stages.
        TypeError: `schedule` is none.
    """
    if not isinstance(schedule, Schedule):
        raise TypeError(f"schedule must be a Schedule, such as make_schedule gives, got {schedule!r}")
    if not dist.is_initialized():
        raise RuntimeError(
            "a Pipeline needs a process group: make it in a function that simulate_ranks or run_ranks runs, or inside "
            "of `with initialize():` in a program that torchrun starts"
        )
    if dist.get_rank(group) < 0:
        raise ValueError("group must be one that this rank belongs to")
    n_ranks = dist.get_world_size(group)
    if n_ranks != schedule.n_stages:
        raise ValueError(
            f"{schedule.name} has {schedule.n_stages} stages, one a rank, and the group has {n_ranks} "
            f"{'rank' if n_ranks == 1 else 'ranks'}: make the schedule for {n_ranks}, or give group= of "
            f"{schedule.n_stages}"
        )
    return dist.get_rank(group)


def agree(
    schedule: Schedule, settings: str, problem: ValueError | TypeError | None, group: dist.ProcessGroup | None
) -> None:
    """Raise the same error on every stage if one has a problem, or if they have not the same schedule.

    A collective of the group. Without it the others would wait for one that has raised, or for messages that never
    come.
    """
    found: list[tuple[Schedule, str, ValueError | TypeError | None] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, (schedule, settings, problem), group=group)
    everyone = [entry for entry in found if entry is not None]
    for _, _, said in everyone:
        if said is not None:
            raise said
    for stage, (other, words, _) in enumerate(everyone):
        if other != everyone[0][0]:
            raise ValueError(
                f"all stages must be given the same schedule: stage 0 has {_described(everyone[0][0])}, stage {stage} "
                f"has {_described(other)}"
            )
        if words != everyone[0][1]:
            raise ValueError(f"all stages must be given the same: stage 0 has {everyone[0][1]}, stage {stage} {words}")


def _described(schedule: Schedule) -> str:
    return f"{schedule.name} ({schedule.n_stages} stages, {schedule.n_micro_batches} micro-batches)"


def _listed(numbers: Sequence[int]) -> str:
    return " and ".join(map(str, numbers)) or "none"
