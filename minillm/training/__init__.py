"""The training loop, its checkpoints and its settings."""

from minillm.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointWarning,
    checkpoint_steps,
    load_checkpoint,
    save_checkpoint,
)
from minillm.training.config import TrainingConfig
from minillm.training.metrics import NonFiniteError
from minillm.training.result import TrainingResult
from minillm.training.trainer import Trainer

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointWarning",
    "NonFiniteError",
    "Trainer",
    "TrainingConfig",
    "TrainingResult",
    "checkpoint_steps",
    "load_checkpoint",
    "save_checkpoint",
]
