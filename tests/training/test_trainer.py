"""The training loop, held against a loop written out with torch.optim.AdamW and clip_grad_norm_."""

import copy
import json
import math
import random
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import minillm.training.engines
import minillm.training.run_checkpoints
import minillm.training.trainer
from minillm.data import TokenDataset
from minillm.models import Transformer, TransformerConfig
from minillm.training import (
    CheckpointWarning,
    NonFiniteError,
    Trainer,
    TrainingConfig,
    checkpoint_steps,
)
from minillm.training.report import Report

VOCAB_SIZE, CONTEXT_LENGTH, BATCH_SIZE = 27, 8, 4


class Letters:
    vocab_size = VOCAB_SIZE

    def encode(self, text: str) -> list[int]:
        return [0 if letter == " " else ord(letter) - 96 for letter in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(" " if i == 0 else chr(96 + i) for i in ids)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefghij", k=4)) for _ in range(8)]
    documents = [" ".join(generator.choices(words, k=20)) for _ in range(60)]
    return TokenDataset.write(
        tmp_path_factory.mktemp("trainer") / "data", documents, Letters(), validation_fraction=0.2
    )


def make_data(shards: Path, split: str = "train", batch_size: int = BATCH_SIZE) -> TokenDataset:
    return TokenDataset(shards, split, context_length=CONTEXT_LENGTH, batch_size=batch_size)


def make_model(dropout: float = 0.0, seed: int = 0, **changes: Any) -> Transformer:
    torch.manual_seed(seed)
    sizes = {"vocab_size": VOCAB_SIZE, "context_length": CONTEXT_LENGTH, "d_model": 16, "n_layers": 2, "n_heads": 2}
    return Transformer(TransformerConfig(**sizes | changes, dropout=dropout))


def make_config(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{"max_steps": 6, "precision": "fp32", "device": "cpu", "log_every": 1} | changes)


def train(model: nn.Module, shards: Path, config: TrainingConfig, **arguments: Any) -> Any:
    arguments = {"validation_data": make_data(shards, "validation"), "progress": False} | arguments
    return Trainer(model, make_data(shards), config=config, **arguments).train()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Batches:
    """A list of batches as a data set."""

    n_tokens, n_bytes = 100, 100

    def __init__(self, batches: list[tuple[Tensor, Tensor]]) -> None:
        self.batches, self.position = batches, 0

    def next_batch(self) -> tuple[Tensor, Tensor]:
        self.position += 1
        return self.batches[(self.position - 1) % len(self.batches)]

    def evaluation_batches(self, max_batches: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.batches[:max_batches]

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


@pytest.mark.parametrize("tied", [True, False])
def test_equals_a_written_out_loop(shards: Path, tied: bool) -> None:
    config = make_config(
        learning_rate=0.02, min_learning_rate=0.001, warmup_steps=2, grad_clip=0.5, weight_decay=0.3, max_steps=8
    )
    # In float64: where a gradient is zero in theory (a bias of the keys), Adam blows float32's rounding up to a step.
    ours = make_model(tied_embeddings=tied).double()
    theirs = copy.deepcopy(ours)
    result = train(ours, shards, config, validation_data=None)

    matrices = [p for p in theirs.parameters() if p.dim() > 1]
    vectors = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    data = make_data(shards)
    for step in range(1, 9):
        rate = 0.01 * step if step <= 2 else 0.001 + 0.019 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 6))
        inputs, targets = data.next_batch()
        loss = F.cross_entropy(theirs(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        line = result.history[step - 1]
        assert line["step"] == step
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["learning_rate"] == pytest.approx(rate)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert line["tokens"] == step * BATCH_SIZE * CONTEXT_LENGTH
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_accumulation_equals_the_big_batch(shards: Path) -> None:
    whole, parts = make_model(), make_model()
    config = make_config(learning_rate=0.01, max_steps=4)
    Trainer(whole, make_data(shards, batch_size=12), None, config, progress=False).train()
    accumulating = make_config(learning_rate=0.01, max_steps=4, gradient_accumulation_steps=3)
    result = Trainer(parts, make_data(shards, batch_size=4), None, accumulating, progress=False).train()
    assert result.tokens == 4 * 12 * CONTEXT_LENGTH
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_overfits_one_batch(shards: Path) -> None:
    data = Batches([make_data(shards).next_batch()])
    config = make_config(max_steps=120, learning_rate=0.01, weight_decay=0.0, eval_every=None, log_every=50)
    result = Trainer(make_model(), data, data, config, progress=False).train()
    assert result.history[0]["loss"] == pytest.approx(math.log(VOCAB_SIZE), abs=0.2)
    assert result.validation_loss is not None
    assert result.validation_loss < 0.4


def test_evaluates_over_all_tokens(shards: Path) -> None:
    model = make_model(dropout=0.5)
    trainer = Trainer(
        model, make_data(shards), make_data(shards, "validation"), make_config(eval_batches=None), progress=False
    )
    batches = list(make_data(shards, "validation").evaluation_batches())
    model.eval()
    with torch.no_grad():
        losses = [F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum").item() for x, y in batches]
    model.train()
    assert trainer.evaluate() == pytest.approx(sum(losses) / sum(y.numel() for _, y in batches), rel=1e-5)
    assert model.training
    with pytest.raises(ValueError, match="validation_data"):
        Trainer(model, make_data(shards), None, make_config(), progress=False).evaluate()


def test_result_and_files(shards: Path, tmp_path: Path) -> None:
    validation = make_data(shards, "validation")
    config = make_config(max_steps=7, eval_every=3, checkpoint_every=2, keep_checkpoints=2, log_every=4)
    result = train(make_model(), shards, config, folder=tmp_path / "run")
    assert [line["step"] for line in result.history] == [1, 2, 3, 4, 6, 7]
    assert [line["step"] for line in result.history if "validation_loss" in line] == [3, 6, 7]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [6, 7]
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / "step_00000007"
    assert (result.step, result.interrupted, result.tokens) == (7, False, 7 * BATCH_SIZE * CONTEXT_LENGTH)
    assert result.seconds == lines[-1]["seconds"] > 0
    assert result.validation_loss == lines[-1]["validation_loss"]
    per_token = result.validation_loss / math.log(2)
    assert result.bits_per_byte == pytest.approx(per_token * validation.n_tokens / validation.n_bytes)


def test_without_a_folder_nothing_is_written(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = train(make_model(), shards, make_config(checkpoint_every=1))
    assert result.checkpoint is None
    assert list(tmp_path.iterdir()) == []


def interrupt_at(step: int) -> Any:
    """An `on_log` that presses Ctrl-C."""
    return lambda line: signal.raise_signal(signal.SIGINT) if line["step"] == step else None


def test_going_on_after_ctrl_c_is_exact(shards: Path, tmp_path: Path) -> None:
    """With dropout, and in the middle of an interval of the log."""
    config = make_config(max_steps=9, learning_rate=0.01, log_every=4, eval_every=None)
    whole, parts, resumed = make_model(dropout=0.3), make_model(dropout=0.3), make_model(dropout=0.3, seed=99)
    train(whole, shards, config)
    stopped = train(parts, shards, config, folder=tmp_path, on_log=interrupt_at(4))
    assert (stopped.step, stopped.interrupted) == (4, True)
    torch.rand(5)  # whatever the caller draws in between
    result = train(resumed, shards, config, folder=tmp_path)
    assert (result.step, result.interrupted) == (9, False)
    assert same(whole, resumed)
    assert [line["step"] for line in result.history] == [1, 4, 8, 9]
    assert result.tokens == 9 * BATCH_SIZE * CONTEXT_LENGTH


def test_the_same_trainer_goes_on_without_a_folder(shards: Path) -> None:
    config = make_config(max_steps=9, learning_rate=0.01)
    whole, parts = make_model(), make_model()
    train(whole, shards, config)
    trainer = Trainer(parts, make_data(shards), None, config, progress=False, on_log=interrupt_at(4))
    assert trainer.train().interrupted
    assert not trainer.train().interrupted
    assert same(whole, parts)
    assert [line["step"] for line in trainer.history] == list(range(1, 10))
    assert trainer.train().step == 9  # nothing left to do


def test_ctrl_c_during_evaluation_does_not_wait_for_its_end(shards: Path, tmp_path: Path) -> None:
    class Slow(Batches):
        served = 0

        def evaluation_batches(self, max_batches: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
            while True:
                self.served += 1
                if self.served == 3:
                    signal.raise_signal(signal.SIGINT)
                yield self.batches[0]

    data = Slow([make_data(shards).next_batch()])
    result = train(make_model(), shards, make_config(eval_every=2), validation_data=data, folder=tmp_path)
    assert (result.step, result.interrupted, data.served) == (2, True, 3)
    assert result.validation_loss is None
    assert checkpoint_steps(tmp_path / "checkpoints") == [2]


@pytest.mark.parametrize("moment", ["before the line", "after the line"])
def test_ctrl_c_at_the_end_of_a_step_is_saved(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """When it is decided already that this step is not to be saved."""
    config = make_config(max_steps=9, learning_rate=0.01, log_every=4, eval_every=None)
    whole, parts = make_model(dropout=0.2), make_model(dropout=0.2)
    train(whole, shards, config)
    trainer = Trainer(parts, make_data(shards), None, config, folder=tmp_path, progress=False)
    step = 5 if moment == "before the line" else 4
    name = "_due" if moment == "before the line" else "restart_clock"
    owner: Any = minillm.training.trainer if name == "_due" else Report
    original = getattr(owner, name)

    def press(*arguments: Any) -> Any:
        if trainer.step == step and (name != "_due" or arguments == (step, config.log_every)):
            signal.raise_signal(signal.SIGINT)
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, press)
        stopped = trainer.train()
    assert (stopped.step, stopped.interrupted) == (step, True)
    assert checkpoint_steps(tmp_path / "checkpoints") == [step]
    assert [line["step"] for line in stopped.history] == ([1, 4, 5] if step == 5 else [1, 4])
    resumed = make_model(seed=5, dropout=0.2)
    result = train(resumed, shards, config, folder=tmp_path, validation_data=None)
    assert same(whole, resumed)
    assert result.tokens == 9 * BATCH_SIZE * CONTEXT_LENGTH


def test_a_second_ctrl_c_raises_and_the_trainer_knows_that_a_step_was_cut(shards: Path, tmp_path: Path) -> None:
    def press_twice(module: nn.Module, inputs: Any) -> None:
        if trainer.step == 3:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    for folder in (None, tmp_path):
        model = make_model(dropout=0.2)
        config = make_config(checkpoint_every=2)
        trainer = Trainer(model, make_data(shards), None, config, folder=folder, progress=False)
        hook = model.register_forward_pre_hook(press_twice)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
        hook.remove()
        if folder is None:
            with pytest.raises(RuntimeError, match="cut off in the middle of a step"):
                trainer.train()
        else:
            assert trainer.train().step == 6
            whole = make_model(dropout=0.2)
            train(whole, shards, config)
            assert same(whole, model)


def test_a_step_cut_off_after_its_gradient_leaves_no_trace(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the gradient nor the numbers of the step that is made again are counted twice."""
    config = make_config(max_steps=12, learning_rate=0.01, checkpoint_every=5, log_every=4, eval_every=None)
    whole, parts = make_model(dropout=0.2), make_model(dropout=0.2)
    expected = train(whole, shards, config, folder=tmp_path / "whole")
    trainer = Trainer(parts, make_data(shards), None, config, folder=tmp_path / "parts", progress=False)
    clip = nn.utils.clip_grad_norm_

    def cut(*arguments: Any) -> Tensor:
        norm = clip(*arguments)
        if trainer.step == 7:
            raise KeyboardInterrupt
        return norm

    with monkeypatch.context() as patch:
        patch.setattr(nn.utils, "clip_grad_norm_", cut)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    result = trainer.train()
    assert same(whole, parts)
    for name in ("step", "loss", "grad_norm", "tokens"):
        assert [line[name] for line in result.history] == [line[name] for line in expected.history]


@pytest.mark.parametrize("when", ["evaluation", "saving"])
def test_broken_off_between_steps(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    config = make_config(max_steps=8, learning_rate=0.01, checkpoint_every=3, eval_every=3, log_every=2)
    whole, parts = make_model(dropout=0.2), make_model(dropout=0.2)
    expected = train(whole, shards, config, folder=tmp_path / "whole")
    trainer = Trainer(
        parts, make_data(shards), make_data(shards, "validation"), config, folder=tmp_path / "parts", progress=False
    )
    place, name = {
        "evaluation": (minillm.training.engines, "mean_loss"),
        "saving": (minillm.training.run_checkpoints, "write_checkpoint"),
    }[when]
    original = getattr(place, name)

    def fail(*arguments: Any, **options: Any) -> Any:
        if trainer.step == 6:
            raise OSError("no space left")
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(place, name, fail)
        with pytest.raises(OSError, match="no space"):
            trainer.train()
    result = trainer.train()
    assert same(whole, parts)
    for key in ("step", "loss", "tokens"):
        assert [line[key] for line in result.history] == [line[key] for line in expected.history]


def test_the_handler_of_ctrl_c_is_given_back(shards: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    train(make_model(), shards, make_config())
    assert signal.getsignal(signal.SIGINT) is before


def test_trains_in_another_thread(shards: Path) -> None:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(train(make_model(), shards, make_config())))
    thread.start()
    thread.join()
    assert results[0].step == 6


def test_resuming_a_longer_run_and_a_finished_one(shards: Path, tmp_path: Path) -> None:
    train(make_model(), shards, make_config(max_steps=3), folder=tmp_path)
    model = make_model(seed=7)
    result = train(model, shards, make_config(max_steps=5), folder=tmp_path)
    assert [line["step"] for line in result.history] == [1, 2, 3, 4, 5]
    finished = make_model(seed=8)
    again = train(finished, shards, make_config(max_steps=5), folder=tmp_path)
    assert same(model, finished)
    assert again == result


def test_changed_settings_are_reported(shards: Path, tmp_path: Path) -> None:
    train(make_model(), shards, make_config(max_steps=2), folder=tmp_path)
    with pytest.warns(UserWarning, match=r"settings changed since .*weight_decay 0.1 -> 0.2"):
        train(make_model(), shards, make_config(max_steps=4, weight_decay=0.2), folder=tmp_path)


def test_resume_can_be_refused(shards: Path, tmp_path: Path) -> None:
    train(make_model(), shards, make_config(max_steps=2), folder=tmp_path, resume=False)
    with pytest.raises(FileExistsError, match="up to step 2"):
        train(make_model(), shards, make_config(), folder=tmp_path, resume=False)


def test_falls_back_behind_a_damaged_checkpoint(shards: Path, tmp_path: Path) -> None:
    config = make_config(checkpoint_every=2, keep_checkpoints=3, max_steps=8)
    whole = make_model(dropout=0.2)
    train(whole, shards, config, folder=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "spoilt")
    newest = tmp_path / "spoilt" / "checkpoints" / "step_00000008"
    (newest / "optimizer.safetensors").write_bytes(b"")
    resumed = make_model(seed=3, dropout=0.2)
    with pytest.warns(CheckpointWarning, match=r"step_00000008/optimizer.safetensors has 0 bytes"):
        result = train(resumed, shards, config, folder=tmp_path / "spoilt")
    assert same(whole, resumed)
    assert [line["step"] for line in result.history] == list(range(1, 9))
    assert checkpoint_steps(tmp_path / "spoilt" / "checkpoints") == [4, 6, 8]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_stops_when_a_number_is_not_finite(shards: Path, tmp_path: Path, what: str) -> None:
    model = make_model()
    trainer = Trainer(model, make_data(shards), None, make_config(checkpoint_every=2), folder=tmp_path, progress=False)
    before: list[Tensor] = []

    def spoil(module: nn.Module, inputs: Any, logits: Tensor) -> Tensor:
        if trainer.step != 4:
            return logits
        before.extend(parameter.detach().clone() for parameter in model.parameters())
        if what == "gradient":
            logits.register_hook(lambda gradient: gradient * float("inf"))
            return logits
        return logits * float("nan")

    model.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match=r"stopped at step 5: .*last good checkpoint is .*step_00000004") as caught:
        trainer.train()
    assert caught.value.step == 5
    assert caught.value.checkpoint == tmp_path / "checkpoints" / "step_00000004"
    assert math.isfinite(caught.value.loss) == (what == "gradient")
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 4


def test_goes_on_when_the_cause_of_a_bad_number_is_gone(shards: Path, tmp_path: Path) -> None:
    config = make_config(checkpoint_every=2, learning_rate=0.01)
    whole, model = make_model(dropout=0.2), make_model(dropout=0.2)
    expected = train(whole, shards, config, validation_data=None)
    trainer = Trainer(model, make_data(shards), None, config, folder=tmp_path, progress=False)
    hook = model.register_forward_hook(lambda module, inputs, out: out * math.nan if trainer.step == 4 else out)
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="stopped at step 5"):
            trainer.train()
    hook.remove()
    result = trainer.train()
    assert same(whole, model)
    assert [line["loss"] for line in result.history] == [line["loss"] for line in expected.history]


def test_a_stop_without_a_checkpoint_says_so(shards: Path) -> None:
    with pytest.raises(NonFiniteError, match="no checkpoint before it"):
        train(make_model(), shards, make_config(learning_rate=1e30, grad_clip=None, warmup_steps=0))


def test_callbacks_see_the_run_and_do_not_change_it(shards: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, bool]] = []

    def on_evaluate(trainer: Trainer, line: dict[str, Any]) -> None:
        seen.append((line["step"], trainer.model.training))
        torch.manual_seed(123)
        torch.rand(10)
        line["sample"] = "hello"

    quiet, watched = make_model(dropout=0.3), make_model(dropout=0.3)
    config = make_config(eval_every=2)
    train(quiet, shards, config)
    result = train(watched, shards, config, on_evaluate=on_evaluate, folder=tmp_path)
    assert seen == [(2, False), (4, False), (6, False)]
    assert same(quiet, watched)
    assert result.history[-1]["sample"] == "hello"
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history


def test_frozen_parameters_stay_and_the_mode_is_given_back(shards: Path) -> None:
    model = make_model(dropout=0.1).eval()
    model.blocks[0].requires_grad_(False)
    before = copy.deepcopy(model)
    train(model, shards, make_config())
    assert same(model.blocks[0], before.blocks[0])
    assert not same(model.blocks[1], before.blocks[1])
    assert not model.training


def test_two_trainers_cannot_share_a_folder(shards: Path, tmp_path: Path) -> None:
    inner: list[str] = []

    def train_inside(line: dict[str, Any]) -> None:
        if line["step"] == 2:
            with pytest.raises(RuntimeError, match="in use") as caught:
                train(make_model(), shards, make_config(), folder=tmp_path)
            inner.append(str(caught.value))

    train(make_model(), shards, make_config(), folder=tmp_path, on_log=train_inside)
    assert str(tmp_path) in inner[0]


def test_bf16_trains_float32_parameters(shards: Path) -> None:
    config = make_config(max_steps=30, learning_rate=0.01)
    full, half = make_model(), make_model()
    reference = train(full, shards, config)
    result = train(half, shards, make_config(max_steps=30, learning_rate=0.01, precision="bf16"))
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())
    assert result.validation_loss == pytest.approx(reference.validation_loss, rel=0.03)
    assert not same(full, half)


def test_the_bar_shows_loss_and_speed(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(make_model(), shards, make_config(), progress=True)
    shown = capsys.readouterr().err
    for part in ("6/6", "loss=", "tokens/s=", "validation="):
        assert part in shown


def test_metrics_of_an_interrupted_write_are_mended(shards: Path, tmp_path: Path) -> None:
    train(make_model(), shards, make_config(max_steps=2), folder=tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 4, "lo')
    result = train(make_model(), shards, make_config(max_steps=4), folder=tmp_path)
    assert [line["step"] for line in result.history] == [1, 2, 3, 4]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history
    assert lines[2]["loss"] != 1.0


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_equals_eager(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through dynamo with a backend that compiles nothing: what the flag does, without a minute of the compiler."""
    compiled, eager = make_model(), make_model()
    compile_ = torch.compile
    calls: list[nn.Module] = []

    def cheap(module: nn.Module) -> Any:
        calls.append(module)
        return compile_(module, backend="eager")

    monkeypatch.setattr(torch, "compile", cheap)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own
        train(compiled, shards, make_config(compile=True))
    train(eager, shards, make_config())
    assert calls == [compiled]
    assert same(compiled, eager)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_cuda(shards: Path, tmp_path: Path, precision: str) -> None:
    config = make_config(device="cuda", precision=precision, max_steps=20, learning_rate=0.01)
    reference = train(make_model(), shards, make_config(max_steps=20, learning_rate=0.01))
    model = make_model()
    result = train(model, shards, config, folder=tmp_path)
    assert next(model.parameters()).is_cuda
    assert result.validation_loss == pytest.approx(reference.validation_loss, rel=0.02)
    moved = make_model(seed=3)
    again = train(moved, shards, config, folder=tmp_path)
    assert again.history == result.history
    assert same(model, moved)


@pytest.mark.gpu
def test_a_bad_number_on_cuda_is_found_with_its_step(shards: Path) -> None:
    config = make_config(device="cuda", learning_rate=1e30, grad_clip=None, warmup_steps=0, log_every=5)
    with pytest.raises(NonFiniteError) as caught:
        train(make_model(), shards, config)
    assert 1 < caught.value.step <= 5
