"""Checkpoints that survive a crash at any moment.

    folder/step_00000100/model.safetensors       the parameters and buffers, a tied one once
                         optimizer.safetensors   the optimizer's moments, as `<parameter>/<key>`
                         state.json              step, data position, random number generators, settings; the size and
                                                 SHA-256 of the other two files, and a SHA-256 of its own content

A checkpoint is written into a folder of a temporary name; files and folder are forced to the disk (fsync); only then is
the folder renamed, which is atomic. So a name `step_...` never stands for a half-written checkpoint, whatever is killed
and when. What a killed writer leaves behind is removed by the next one.

Source of the protocol: Pillai et al. 2014, "All File Systems Are Not Created Equal", section 4.4 (what must be forced
to the disk, and in which order, before and after a rename).
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minillm.training.integrity import DamagedError, canonical, describe, fsync, read_sealed, verify, write_sealed
from minillm.training.state import SavedState, restore_optimizer, restore_rng_state, rng_state, saved_state

FORMAT = 1
TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")
_NAME = re.compile(r"step_(\d{8,})")
_WRITING, _REMOVED = ".writing-", ".removed-"


class CheckpointError(RuntimeError):
    """No checkpoint in the folder can be used."""


class CheckpointWarning(UserWarning):
    """A checkpoint is damaged, and an older one is used in its place."""


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` read, on the CPU."""

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The settings that `save_checkpoint` was given."""
        return dict(self.state["config"])

    @property
    def data(self) -> dict[str, Any] | None:
        """The position in the training data: a `TokenDataset.state_dict()`."""
        return None if self.state["data"] is None else dict(self.state["data"])

    def model_state(self) -> dict[str, Tensor]:
        """What `model.state_dict()` was: a tied tensor under each of its names."""
        return self.model | {name: self.model[kept] for name, kept in self.state["tied"].items()}

    def restore(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        rng_device: torch.device | None = None,
    ) -> None:
        """Copy the saved tensors into `model` and `optimizer` (on whatever device they are); with `rng_device`, set the
        random number generators of the CPU and of that device too.

        Raises:
            ValueError: the model or the optimizer is not of the saved shape; the message names the tensors.
        """
        try:
            model.load_state_dict(self.model_state())
        except RuntimeError as error:
            raise ValueError(f"{self.path} is a checkpoint of another model: {error}") from None
        if optimizer is not None:
            restore_optimizer(optimizer, model, self.optimizer, self.state["optimizer_scalars"])
        if rng_device is not None:
            restore_rng_state(self.state["rng"], rng_device)


def save_checkpoint(
    folder: str | Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    data: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    keep: int | None = None,
) -> Path:
    """Write `folder/step_<step>` as the module's head describes and remove the oldest ones beyond `keep`.

    Args:
        folder: the folder of the checkpoints; made if missing. One process at a time may write into it, any number may
            read.
        step: number of updates made so far, at least 0.
        model, optimizer: what to save; the random number generators of the CPU and of the model's device go along.
        data: the data's position, JSON-able.
        config: settings worth keeping, JSON-able.
        keep: how many of the newest checkpoints up to `step` stay, this one included; None keeps all. Ones of later
            steps (the run went back behind them) are removed if they are damaged and left alone if they are not.

    Returns:
        The path of the new checkpoint.

    Raises:
        ValueError: `step` or `keep` out of range, or values that JSON cannot hold.
        FileExistsError: there is an undamaged checkpoint of this step; a damaged one is replaced.
        OSError: the disk is full, or cannot be written. The checkpoints that were there still are.
    """
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    return write_checkpoint(
        folder, saved_state(model, optimizer), step=step, device=device, data=data, config=config, keep=keep
    )


def write_checkpoint(
    folder: str | Path,
    saved: SavedState,
    *,
    step: int,
    device: torch.device,
    data: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    keep: int | None = None,
) -> Path:
    """`save_checkpoint` of what has been read from a model already, or gathered from several ranks.

    Args:
        saved: the model and the optimizer.
        device: whose random number generator is saved beside the CPU's.
    """
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step!r}")
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be None (all) or at least 1, got {keep!r}")
    state: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "config": dict(config or {}),
        "data": None if data is None else dict(data),
        "tied": saved.tied,
        "optimizer_scalars": saved.scalars,
        "rng": rng_state(device),
    }
    canonical(state)  # refuse what JSON cannot hold before anything is written

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    final = checkpoint_path(folder, step)
    if final.exists():
        if not _is_damaged(final):
            raise FileExistsError(f"{final} exists and is undamaged: a checkpoint is not written over")
        _remove(final)
    temporary = folder / f"{_WRITING}{final.name}"
    temporary.mkdir()
    try:
        state["files"] = {}
        for name, content in zip(TENSOR_FILES, (saved.tensors, saved.moments), strict=True):
            _write_tensors(temporary / name, content)
            state["files"][name] = describe(temporary / name)
        write_sealed(temporary / "state.json", state)
        fsync(temporary / "state.json")
        fsync(temporary)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk needs the room
        raise
    fsync(folder)
    if keep is not None:
        remove_old_checkpoints(folder, step, keep)
        _remove_damaged_after(folder, step)
    return final


def load_checkpoint(folder: str | Path, *, step: int | None = None) -> Checkpoint:
    """Read the newest undamaged checkpoint of `folder`, or the one of `step`. Changes nothing on the disk.

    Every file's size and checksum are compared with what was recorded. A damaged checkpoint is reported by a
    `CheckpointWarning` that names the file and what is wrong with it, and the one before is tried.

    Raises:
        FileNotFoundError: there is no checkpoint (of that step).
        CheckpointError: there are some, and every one is damaged; the message says how.
    """
    folder = Path(folder)
    steps = checkpoint_steps(folder)
    if step is not None:
        if step not in steps:
            raise FileNotFoundError(f"{folder} holds no checkpoint of step {step}; there are: {steps or 'none'}")
        steps = [step]
    if not steps:
        raise FileNotFoundError(f"{folder} holds no checkpoint")
    damages = []
    for candidate in reversed(steps):
        try:
            checkpoint = _read(checkpoint_path(folder, candidate))
        except DamagedError as damage:
            damages.append(str(damage))
            continue
        for text in damages:
            warnings.warn(f"damaged checkpoint: {text}; using {checkpoint.path}", CheckpointWarning, stacklevel=2)
        return checkpoint
    if step is None and checkpoint_steps(folder) != steps:
        # A run that is going on wrote a newer one meanwhile and removed those that this read.
        return load_checkpoint(folder)
    raise CheckpointError("no usable checkpoint: " + "; ".join(damages))


def checkpoint_steps(folder: str | Path) -> list[int]:
    """The steps of the checkpoints in `folder`, damaged or not, in rising order; empty where the folder is missing."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    matches = (_NAME.fullmatch(path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return folder / f"step_{step:08d}"


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file and force it to the disk; raises OSError."""
    path.touch()
    mode = path.stat().st_mode
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # what the system refuses comes as one too
        raise OSError(f"{path} cannot be written: {error}") from error
    path.chmod(mode)  # safetensors makes files that nobody else may read, whatever the umask says
    fsync(path)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; raises DamagedError."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path} cannot be read: {error}") from error


def _read(path: Path) -> Checkpoint:
    """Read and verify one checkpoint; raises DamagedError."""
    state = read_sealed(path / "state.json")
    if state["format"] != FORMAT:
        raise DamagedError(f"{path / 'state.json'} is of format {state['format']}; this version reads format {FORMAT}")
    if path.name != f"step_{state['step']:08d}":
        raise DamagedError(f"{path / 'state.json'} is of step {state['step']}, against its folder's name")
    for name in TENSOR_FILES:
        verify(path / name, state["files"][name])
    model, optimizer = (_read_tensors(path / name) for name in TENSOR_FILES)
    return Checkpoint(path, state["step"], model, optimizer, state)


def _is_damaged(path: Path) -> bool:
    try:
        _read(path)
    except DamagedError:
        return True
    return False


def remove_old_checkpoints(folder: str | Path, step: int, keep: int) -> None:
    """Remove all but the `keep` newest checkpoints up to `step`, and what killed writers left half written or half
    removed. `save_checkpoint` does it; a run that is gone on with does it for the save that was killed."""
    folder = Path(folder)
    _remove_leftovers(folder)
    for older in [number for number in checkpoint_steps(folder) if number <= step][:-keep]:
        _remove(checkpoint_path(folder, older))


def _remove_damaged_after(folder: Path, step: int) -> None:
    for later in checkpoint_steps(folder):
        path = checkpoint_path(folder, later)
        if later > step and _is_damaged(path):
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint; renamed first, so that a removal cut short leaves no damaged one under a good name."""
    doomed = path.with_name(f"{_REMOVED}{path.name}")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left: checkpoints half written or half removed."""
    for path in folder.iterdir():
        if path.name.startswith((_WRITING, _REMOVED)):
            shutil.rmtree(path)
