"""The plan of a training run over ranks: what is divided among how many, and whether that can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import nn

from minillm.distributed.pipeline import Schedule, make_schedule
from minillm.distributed.pipeline.split import Split, split
from minillm.layers.moe import MixtureOfExperts
from minillm.models import Transformer

ENGINES = ("minillm", "torch")

TORCH_SCHEDULES: Mapping[str, str] = MappingProxyType(
    {
        "gpipe": "ScheduleGPipe",
        "1f1b": "Schedule1F1B",
        "interleaved": "ScheduleInterleaved1F1B",
        "breadth-first": "ScheduleLoopedBFS",
        "zb-h1": "ScheduleInterleavedZeroBubble",
        "zb-v": "ScheduleZBVZeroBubble",
    }
)
"""By our name the class in `torch.distributed.pipelining` that runs the same schedule."""

_ASYNCHRONOUS = ("pipedream", "pipedream-2bw")


@dataclass(frozen=True)
class ParallelPlan:
    """How many ranks share the work, and what they divide: ``pp * dp`` ranks, those of one stage side by side.

    Args:
        dp: data-parallel ranks; each computes its rows of every batch. 1 is one process (or one pipeline).
        zero: what the ranks divide (Rajbhandari et al. 2020): 0 nothing, 1 the optimizer's state, 2 and the gradients,
            3 and the parameters.
        engine: "minillm" for `minillm.distributed`; "torch" for PyTorch's DistributedDataParallel (stage 0; with
            ZeroRedundancyOptimizer stage 1), `fully_shard` (stage 2 without, stage 3 with resharding after forward) and
            `torch.distributed.pipelining`.
        pp: stages of a pipeline, one a rank, each with its part of the layers.
        schedule: the pipeline's: one of `minillm.distributed.pipeline.SCHEDULES`.
        micro_batches: what each rank's rows of a batch are cut into; None is as many as there are stages.
        chunks: pieces of the model on each stage, for schedules that take several.

    Raises:
        ValueError, TypeError: a value that is not allowed.
    """

    dp: int = 1
    zero: int = 0
    engine: str = "minillm"
    pp: int = 1
    schedule: str = "1f1b"
    micro_batches: int | None = None
    chunks: int = 1

    def __post_init__(self) -> None:
        limits = {"dp": (1, None), "zero": (0, 3), "pp": (1, None), "micro_batches": (1, None), "chunks": (1, None)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is None and name == "micro_batches":
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, got {value!r}")
            if value < low or (high is not None and value > high):
                raise ValueError(f"{name} must be {f'at least {low}' if high is None else f'0 to {high}'}, got {value}")
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {self.engine!r}")
        if self.pp > 1:
            self._check_pipeline()
            return
        if self.dp == 1 and (self.zero or self.engine != "minillm"):
            raise ValueError(f"zero={self.zero} and engine={self.engine!r} need more than one rank: dp is 1")
        given = {"schedule": self.schedule, "micro_batches": self.micro_batches, "chunks": self.chunks}
        unused = [f"{name}={value!r}" for name, value in given.items() if value != getattr(type(self), name)]
        if unused:
            raise ValueError(f"{' and '.join(unused)} {'are' if len(unused) > 1 else 'is'} for pipelines: pp is 1")

    def _check_pipeline(self) -> None:
        if self.zero:
            raise ValueError(
                f"zero={self.zero} and pp={self.pp} do not go together: a stage's data-parallel ranks hold all of it; "
                "take zero=0, or pp=1"
            )
        if str(self.schedule).lower().replace("_", "-") in _ASYNCHRONOUS:
            raise ValueError(
                f"schedule={self.schedule!r} updates inside its stream of micro-batches, where a training run's "
                "clipping and accumulation have no place: use minillm.distributed.pipeline in your own loop, or take a "
                'synchronous schedule; the nearest is "1f1b"'
            )
        try:
            self.make_schedule()
        except ValueError as error:
            words = str(error)
            for theirs, ours in (("n_stages", "pp"), ("n_micro_batches", "micro_batches"), ("n_chunks", "chunks")):
                words = words.replace(theirs, ours)
            raise ValueError(words) from None
        if self.engine != "torch":
            return
        if self.schedule not in TORCH_SCHEDULES:
            raise ValueError(
                f"schedule={self.schedule!r} is not one of torch.distributed.pipelining's: with engine='torch' take "
                f"one of {', '.join(TORCH_SCHEDULES)}, or engine='minillm'"
            )
        if self.schedule == "1f1b" and self.n_micro_batches < self.pp:
            raise ValueError(
                f"PyTorch's 1F1B takes at least as many micro-batches as there are stages, {self.pp}, got "
                f"micro_batches={self.n_micro_batches}; the nearest that will do is {self.pp}"
            )
        rounds = max(1, self.n_micro_batches // self.pp)
        if self.schedule in ("interleaved", "zb-h1") and self.n_micro_batches % rounds:
            nearest = round(self.n_micro_batches / self.pp) * self.pp
            raise ValueError(
                f"PyTorch's {self.schedule} takes {rounds} rounds of equally many micro-batches for pp={self.pp}, got "
                f"micro_batches={self.n_micro_batches}; the nearest that will do is {nearest}"
            )

    @property
    def n_ranks(self) -> int:
        """How many there are in all."""
        return self.pp * self.dp

    @property
    def n_micro_batches(self) -> int:
        """Of a rank's rows, with the default worked out."""
        return self.pp if self.micro_batches is None else self.micro_batches

    def __str__(self) -> str:
        return (
            f"pp={self.pp}, dp={self.dp}"
            if self.pp > 1 and self.dp > 1
            else f"{'pp' if self.pp > 1 else 'dp'}={self.n_ranks}"
        )

    def make_schedule(self) -> Schedule:
        """The pipeline's schedule.

        Raises:
            ValueError: sizes that it does not take.
        """
        return make_schedule(self.schedule, self.pp, self.n_micro_batches, self.chunks)

    def split(self, model: nn.Module) -> Split:
        """The model in the schedule's pieces: a `Transformer`'s of as equal numbers of FLOPs as can be (its embedding
        has many parameters and takes no time), another model's of parameters.

        Raises:
            ValueError: it has not enough layers, or parts that a pipeline of a training run does not train right.
            TypeError: a model of which nobody knows where to cut it.
        """
        if any(isinstance(module, MixtureOfExperts) for module in model.modules()):
            raise ValueError(
                f"pp={self.pp} is for models without experts, whose losses and loads would stay on the stages: "
                f"take pp=1, dp={self.n_ranks}"
            )
        n_pieces = self.make_schedule().n_pieces
        n_layers = len(split(model, 1).costs)
        if n_pieces > n_layers:
            each = n_pieces // self.pp
            near = next((pp for pp in range(n_layers // each, 1, -1) if self._takes(pp, self.n_micro_batches)), 1)
            raise ValueError(
                f"pp={self.pp} with {each} {'piece' if each == 1 else 'pieces'} on a stage needs a model of at least "
                f"{n_pieces} layers, and this one has {n_layers} (with its embedding and head): the nearest pp that "
                f"will do is {near}"
            )
        if isinstance(model, Transformer):
            device = model.token_embedding.weight.device
            row = torch.zeros(1, model.config.context_length, dtype=torch.int64, device=device)
            parts = split(model, n_pieces, balance="flops", sample=row)
        else:
            parts = split(model, n_pieces)
        for number, piece in enumerate(parts.pieces):
            if not any(parameter.requires_grad for parameter in piece.parameters()):
                raise ValueError(f"piece {number} of the model has no parameter to train: take a smaller pp or chunks")
        return parts

    def check_rows(self, rows: int) -> None:
        """Raise ValueError unless a batch of so many rows divides into the micro-batches of all pipelines."""
        unit = self.dp * self.n_micro_batches
        if self.pp == 1 or (rows and rows % unit == 0):
            return
        below = rows // unit * unit
        sizes = " or ".join(str(size) for size in (below, below + unit) if size)
        counts = [n for n in range(1, rows // self.dp + 1) if rows % (self.dp * n) == 0 and self._takes(self.pp, n)]
        near = min(counts, key=lambda n: abs(n - self.n_micro_batches), default=None)
        raise ValueError(
            f"a batch of {rows} rows does not divide into {self.n_micro_batches} micro-batches on each of {self.dp} "
            f"{'pipeline' if self.dp == 1 else 'pipelines'}: the nearest batch_size that will do is {sizes}"
            + ("" if near is None else f", the nearest micro_batches {near}")
        )

    def _takes(self, n_stages: int, n_micro_batches: int) -> bool:
        try:
            make_schedule(self.schedule, n_stages, n_micro_batches, self.chunks)
        except ValueError:
            return False
        return True

    def check_compile(self, compile: bool) -> None:
        """Raise ValueError where a model is to be compiled and there are several ranks."""
        if compile and self.n_ranks > 1:
            axis = "dp" if self.pp == 1 else "pp"
            raise ValueError(f"compile=True trains in one process, and {axis} is {getattr(self, axis)}")

    def check_ranks(self) -> None:
        """Raise RuntimeError unless there is a process group of as many ranks as the plan has."""
        n_ranks = dist.get_world_size() if dist.is_initialized() else 1
        if n_ranks != self.n_ranks:
            raise RuntimeError(
                f"{self} needs {self.n_ranks} ranks, and there {'is 1' if n_ranks == 1 else f'are {n_ranks}'}: "
                f"torchrun --standalone --nproc-per-node {self.n_ranks} ..."
            )
