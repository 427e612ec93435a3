"""Optimizers and learning-rate schedules."""

from minillm.optim.adamw import AdamW, parameter_groups
from minillm.optim.cpu_adam import CPUAdam
from minillm.optim.schedules import warmup_cosine

__all__ = ["AdamW", "CPUAdam", "parameter_groups", "warmup_cosine"]
