"""The checkpoints of a training run: written by its first rank, taken up by all, under whatever plan."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Protocol

import torch

from minillm.training.checkpoint import (
    checkpoint_path,
    checkpoint_steps,
    load_checkpoint,
    remove_old_checkpoints,
    write_checkpoint,
)
from minillm.training.config import TrainingConfig
from minillm.training.engines import Engine
from minillm.training.report import Report
from minillm.training.state import restore_rng_state


class Positioned(Protocol):
    """Data that can say where it is, and go there."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class RunCheckpoints:
    """Saves all that the next update depends on, and takes it up again.

    Args:
        folder: of the run; None saves nothing.
        config: the run's settings; they are kept beside the rest.
        engine: what is trained.
        data: where its batches come from.
        report: counts tokens and seconds, which go along.
        device: whose random number generator is saved beside the CPU's.

    Attributes:
        step: of the newest checkpoint that was saved or taken up; 0: there is none.
        path: where it stands.
    """

    def __init__(
        self,
        folder: Path | None,
        config: TrainingConfig,
        engine: Engine,
        data: Positioned,
        report: Report,
        device: torch.device,
    ) -> None:
        self._folder = None if folder is None else folder / "checkpoints"
        self._config, self._engine, self._data, self._report, self._device = config, engine, data, report, device
        self.step = 0
        self.path: Path | None = None

    def __bool__(self) -> bool:
        """Whether there is one to take up."""
        return self._folder is not None and bool(checkpoint_steps(self._folder))

    def save(self, step: int) -> None:
        """Write one, after this many updates; every rank calls it."""
        if self._folder is None:
            return
        report, engine = self._report, self._engine
        report.sync()
        config = {"training": self._config.to_dict(), "tokens": report.tokens, "seconds": report.seconds}
        saved = engine.saved_state()
        if saved is not None:
            write_checkpoint(
                self._folder,
                saved,
                step=step,
                device=self._device,
                data=self._data.state_dict(),
                config=config,
                keep=self._config.keep_checkpoints,
            )
        engine.barrier()  # nobody goes on from a checkpoint that is not there yet
        self.step, self.path = step, checkpoint_path(self._folder, step)

    def restore(self) -> None:
        """Take up the newest good one; every rank calls it. Afterwards `step` is where the run stands."""
        assert self._folder is not None
        engine = self._engine
        checkpoint = load_checkpoint(self._folder)
        engine.restore(checkpoint)
        if engine.rank == 0:
            restore_rng_state(checkpoint.state["rng"], self._device)
        else:  # whose generators are not saved; they go on with draws that nobody has had
            torch.manual_seed(self._config.seed + checkpoint.step * engine.n_ranks + engine.rank)
        if checkpoint.data is not None:
            self._data.load_state_dict(checkpoint.data)
        engine.barrier()  # all have read it
        if engine.rank == 0:
            remove_old_checkpoints(self._folder, checkpoint.step, self._config.keep_checkpoints)
        self.step, self.path = checkpoint.step, checkpoint.path
        self._report.tokens, self._report.seconds = checkpoint.config["tokens"], checkpoint.config["seconds"]
        changes = self._config.changed_updates(checkpoint.config["training"])
        if changes:
            text = f"settings changed since {checkpoint.path}, and the new ones hold from here on: {', '.join(changes)}"
            warnings.warn(text, stacklevel=4)
