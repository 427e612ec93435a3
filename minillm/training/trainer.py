"""The training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from minillm.models.modes import evaluation_mode
from minillm.optim import AdamW, parameter_groups, warmup_cosine
from minillm.training.checkpoint import checkpoint_steps
from minillm.training.config import TrainingConfig
from minillm.training.interrupt import Interrupt, interruptible
from minillm.training.lock import exclusive
from minillm.training.loss import Batch
from minillm.training.metrics import NonFiniteError, StepStatistics
from minillm.training.mixtures import MixtureTraining
from minillm.training.parallel import ParallelPlan, make_engine
from minillm.training.precision import autocast, check_compiler, resolve_device, resolve_precision
from minillm.training.report import Report
from minillm.training.result import TrainingResult, bits_per_byte
from minillm.training.run_checkpoints import RunCheckpoints


class TrainingData(Protocol):
    """What a `Trainer` asks of its data; `minillm.data.TokenDataset` is the usual one."""

    n_tokens: int
    n_bytes: int

    def next_batch(self) -> Batch: ...
    def evaluation_batches(self, max_batches: int | None = None) -> Iterator[Batch]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Trainer:
    """Trains a language model: AdamW, warm-up and cosine, clipping, gradient accumulation, evaluation, checkpoints.

        trainer = Trainer(model, TokenDataset(folder, "train", ...), TokenDataset(folder, "validation", ...), config)
        result = trainer.train()

    A run in a folder (`metrics.jsonl`, `checkpoints/`) that was stopped in any way, a kill or a power cut included,
    is gone on with by making the same Trainer again: on a CPU its parameters then come out bit for bit as if it had
    never been stopped.

    Args:
        model: tokens (batch, seq) -> logits (batch, seq, vocab_size). It is moved to the device and trained in place;
            where the plan divides it, this rank's part of it is, and it is no whole model any more. The losses of a
            `Transformer`'s experts are added to what is minimised, not to the loss that is reported.
        train_data, validation_data: where the batches come from.
        config: see `TrainingConfig`.
        folder: where metrics and checkpoints go; None writes nothing.
        resume: go on from the newest good checkpoint in `folder`. False refuses a folder that holds any.
        progress: show a bar on the standard error, with the loss, tokens per second and the time left.
        parallel: how the work is spread over ranks, each of which makes this Trainer with the same arguments; None is
            one process. The first rank writes and shows the bar; all call `on_log` and `on_evaluate`. A checkpoint is
            that of one process, whatever the plan.
        on_log: called with each line of metrics, before it is written: what it adds is written too, and must be JSON.
        on_evaluate: called so with this Trainer and the line after each evaluation, e.g. to add what the model writes
            by now. Neither it nor `on_log` changes the run: random numbers it draws are taken back.

    Raises:
        FileExistsError: `resume` is False and there are checkpoints.
        ValueError, RuntimeError: a device, a precision, a compiler or ranks that are not there; compiling on several
            ranks; a model that the plan cannot divide.
    """

    def __init__(
        self,
        model: nn.Module,
        train_data: TrainingData,
        validation_data: TrainingData | None = None,
        config: TrainingConfig | None = None,
        *,
        folder: str | Path | None = None,
        resume: bool = True,
        progress: bool = True,
        parallel: ParallelPlan | None = None,
        on_log: Callable[[dict[str, Any]], None] | None = None,
        on_evaluate: Callable[[Trainer, dict[str, Any]], None] | None = None,
    ) -> None:
        self.config = config or TrainingConfig()
        plan = parallel or ParallelPlan()
        plan.check_compile(self.config.compile)
        self.device = resolve_device(self.config.device, plan.n_ranks)
        self.precision = resolve_precision(self.config.precision, self.device)
        self.folder = None if folder is None else Path(folder)
        saved = [] if self.folder is None else checkpoint_steps(self.folder / "checkpoints")
        if saved and not resume:
            raise FileExistsError(f"{self.folder} holds checkpoints up to step {saved[-1]}: resume them")
        self.model = model
        self.train_data, self.validation_data = train_data, validation_data
        context = partial(autocast, self.precision, self.device)
        self._engine = make_engine(plan, model, self._make_optimizer, self.device, context)
        self.optimizer = self._engine.optimizer
        if self.config.compile:
            check_compiler(self.device)
            self._engine.forward = torch.compile(model)
        self._mixtures = MixtureTraining(model, self._engine.forward, self._engine.sum)
        self._engine.forward = self._mixtures.forward
        self._on_log, self._on_evaluate = on_log, on_evaluate
        self._report = Report(progress=progress and self._writes)
        self._statistics = StepStatistics(self.device)
        self.step = 0
        self._checkpoints = RunCheckpoints(
            self.folder, self.config, self._engine, train_data, self._report, self.device
        )
        self._started = self._in_a_step = self._broken_off = False

    def _make_optimizer(self, model: nn.Module) -> AdamW:
        groups = parameter_groups(model, self.config.weight_decay)
        return AdamW(groups, lr=self.config.learning_rate, betas=self.config.betas, fused=True)

    @property
    def _writes(self) -> bool:
        """Whether it is this rank that writes into the folder."""
        return self._engine.rank == 0

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics so far."""
        return self._report.lines

    def train(self, *, locked: bool = False) -> TrainingResult:
        """Train until `config.max_steps` updates are made in all, or until Ctrl-C, which ends the step, saves and
        returns; calling it again goes on. A second Ctrl-C raises KeyboardInterrupt at once.

        Args:
            locked: the caller holds the folder already, with `minillm.training.lock.exclusive`.

        Raises:
            NonFiniteError: the loss or the gradient became NaN or infinite. It names the step and the last good
                checkpoint.
            CheckpointError: every checkpoint in the folder is damaged.
            RuntimeError: another process is training into the folder.
        """
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        lock = nullcontext() if self.folder is None or locked or not self._writes else exclusive(self.folder)
        with lock, interruptible() as interrupt:
            self._start()
            modes = [(module, module.training) for module in self._engine.model.modules()]
            self._engine.model.train()
            self._broken_off = True
            try:
                self._loop(interrupt)
                self._broken_off = False
            except NonFiniteError as error:
                self._in_a_step = True  # on a GPU it is found when the parameters are spoilt already
                raise NonFiniteError(error.step, error.loss, error.grad_norm, self._checkpoints.path) from None
            finally:
                for module, training in modes:
                    module.training = training
        return self._result()

    def update(self) -> None:
        """One update of the parameters: what `train` does `config.max_steps` times. No metrics, nothing written."""
        config, step = self.config, self.step + 1
        self._in_a_step = True
        rate = warmup_cosine(
            step,
            warmup_steps=config.warmup,
            total_steps=config.max_steps,
            peak=config.learning_rate,
            minimum=config.final_learning_rate,
        )
        engine = self._engine
        for group in engine.param_groups:
            group["lr"] = rate
        batches = [self.train_data.next_batch() for _ in range(config.gradient_accumulation_steps)]
        loss, n_targets = engine.add_gradients(batches)
        grad_norm = engine.clip(config.grad_clip or float("inf"))
        self._statistics.add(step, loss, grad_norm, n_targets)
        if self.device.type == "cpu":
            # Costs nothing here, and the parameters stay as they were; a GPU is asked with the next line of metrics.
            self._statistics.check()
        engine.step()
        self._mixtures.after_update()
        engine.zero_grad()
        self.step, self._in_a_step = step, False

    def evaluate(self) -> float:
        """The mean loss over the validation data (`config.eval_batches` of them), in nats per token.

        Raises:
            ValueError: there is no validation data.
        """
        if self.validation_data is None:
            raise ValueError("evaluate needs validation_data, and this Trainer was made without")
        return self._mean_loss(self.validation_data.evaluation_batches(self.config.eval_batches))

    def _start(self) -> None:
        """Begin, or take up the newest checkpoint; a Trainer whose last `train` ended in peace simply goes on, and so
        does one that was broken off between two steps with no checkpoint to go back to."""
        if self._started and not self._broken_off:
            return
        if self._checkpoints:
            self._checkpoints.restore()
            self.step = self._checkpoints.step
            self._statistics = StepStatistics(self.device)  # a checkpoint follows a reading: nothing was gathered since
            self._mixtures.restart()
        elif self._in_a_step:
            raise RuntimeError("the last run was cut off in the middle of a step: make the model and the Trainer anew")
        elif not self._started:
            torch.manual_seed(self.config.seed + self._engine.rank)  # dropout: other rows, other draws
        self._engine.zero_grad()
        if self.folder is not None and self._writes:
            self._report.open(self.folder / "metrics.jsonl", self.step)
        self._started, self._in_a_step = True, False

    def _loop(self, interrupt: Interrupt) -> None:
        config, report = self.config, self._report
        with report.bar(self.step, config.max_steps):
            while self.step < config.max_steps and not self._stopping(interrupt):
                self.update()
                report.advance()
                last = self.step == config.max_steps
                evaluation = last or _due(self.step, config.eval_every)
                stopping = self._stopping(interrupt)
                save = last or stopping or _due(self.step, config.checkpoint_every)
                if evaluation or save or self.step == 1 or _due(self.step, config.log_every):
                    line = self._measure()
                    if evaluation and self.validation_data is not None:
                        batches = self.validation_data.evaluation_batches(config.eval_batches)
                        loss = self._mean_loss(_until(batches, lambda: self._stopping(interrupt)))
                        stopping = self._stopping(interrupt)
                        if not stopping:
                            line["validation_loss"] = loss
                    self._call_back(line, evaluated=evaluation and not stopping)
                    report.append(line)
                    if save or stopping:
                        self._checkpoints.save(self.step)
                    report.restart_clock()
            if (
                self.folder is not None and self._checkpoints.step != self.step
            ):  # Ctrl-C came when this step was seen to
                if not self.history or self.history[-1]["step"] != self.step:  # lines of before are the first rank's
                    report.append(self._measure())
                self._checkpoints.save(self.step)

    def _stopping(self, interrupt: Interrupt) -> bool:
        """Whether Ctrl-C was pressed: all ranks stop after the same step, if any of them was asked to."""
        return self._engine.any(interrupt.requested)

    def _measure(self) -> dict[str, Any]:
        rate = self._engine.param_groups[0]["lr"]
        return self._report.measure(self.step, self._statistics, learning_rate=rate) | self._mixtures.read()

    def _call_back(self, line: dict[str, Any], *, evaluated: bool) -> None:
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            if self._on_log is not None:
                self._on_log(line)
            if evaluated and self._on_evaluate is not None:
                with evaluation_mode(self.model):
                    self._on_evaluate(self, line)

    def _mean_loss(self, batches: Iterable[Batch]) -> float:
        with evaluation_mode(self._engine.model):
            return self._engine.mean_loss(batches)

    def _result(self) -> TrainingResult:
        evaluations = [line["validation_loss"] for line in self.history if "validation_loss" in line]
        validation_loss = evaluations[-1] if evaluations else None
        per_byte = None
        if validation_loss is not None and self.validation_data is not None:
            per_byte = bits_per_byte(validation_loss, self.validation_data.n_tokens, self.validation_data.n_bytes)
        return TrainingResult(
            history=self.history,
            step=self.step,
            interrupted=self.step < self.config.max_steps,
            loss=self.history[-1]["loss"] if self.history else None,
            validation_loss=validation_loss,
            bits_per_byte=per_byte,
            tokens=self._report.tokens,
            seconds=self._report.seconds,
            checkpoint=self._checkpoints.path,
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _until(batches: Iterable[Batch], stopping: Callable[[], bool]) -> Iterator[Batch]:
    """The batches, the first in any case, until Ctrl-C."""
    for batch in batches:
        yield batch
        if stopping():
            return
