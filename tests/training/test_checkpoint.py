"""Checkpoints: what goes in comes out, and a damaged one is never used."""

import errno
import hashlib
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

import minillm.training.checkpoint
from minillm.optim import AdamW, parameter_groups
from minillm.training import (
    CheckpointError,
    CheckpointWarning,
    checkpoint_steps,
    load_checkpoint,
    save_checkpoint,
)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.embedding(tokens)))
        return out


def trained(steps: int = 3, optimizer_class: type[torch.optim.Optimizer] = AdamW) -> tuple[Tied, torch.optim.Optimizer]:
    torch.manual_seed(5)
    model = Tied()
    optimizer = optimizer_class(parameter_groups(model, 0.1), lr=0.01)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: Tied, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.randint(7, (3, 5))).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("optimizer_class", [AdamW, torch.optim.AdamW, torch.optim.Adagrad, torch.optim.SGD])
def test_restores_everything(tmp_path: Path, optimizer_class: type[torch.optim.Optimizer]) -> None:
    model, optimizer = trained(3, optimizer_class)
    model.seen += 9
    path = save_checkpoint(
        tmp_path, step=3, model=model, optimizer=optimizer, data={"position": 12}, config={"a": [1, 0.1, None]}
    )
    assert path == tmp_path / "step_00000003"
    step(model, optimizer)
    expected, drawn = [p.detach().clone() for p in model.parameters()], torch.rand(3)

    other, other_optimizer = trained(0, optimizer_class)
    checkpoint = load_checkpoint(tmp_path)
    checkpoint.restore(other, other_optimizer, rng_device=torch.device("cpu"))
    assert checkpoint.step == 3
    assert checkpoint.data == {"position": 12}
    assert checkpoint.config == {"a": [1, 0.1, None]}
    assert other.seen == 9
    step(other, other_optimizer)
    for one, two in zip(expected, other.parameters(), strict=True):
        assert torch.equal(one, two)
    assert torch.equal(torch.rand(3), drawn)


def test_a_tied_weight_is_written_once_and_comes_back_tied(tmp_path: Path) -> None:
    model, _ = trained()
    path = save_checkpoint(tmp_path, step=1, model=model)
    assert sorted(load_file(path / "model.safetensors")) == ["embedding.weight", "norm.bias", "norm.weight", "seen"]
    other = Tied()
    load_checkpoint(path.parent).restore(other)
    assert torch.equal(other.head.weight, model.embedding.weight)
    assert other.head.weight is other.embedding.weight


def test_the_newest_are_kept(tmp_path: Path) -> None:
    model, _ = trained()
    for number in (1, 5, 10, 200):
        save_checkpoint(tmp_path, step=number, model=model, keep=2)
    assert checkpoint_steps(tmp_path) == [10, 200]
    assert load_checkpoint(tmp_path).step == 200
    assert load_checkpoint(tmp_path, step=10).step == 10
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 5; there are: \[10, 200\]"):
        load_checkpoint(tmp_path, step=5)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


def change_the_step(path: Path) -> None:
    document = json.loads(path.read_text())
    document["state"]["step"] = 1
    path.write_text(json.dumps(document))


def not_a_checkpoint(path: Path) -> None:
    path.write_text('["something else"]')


def not_text(path: Path) -> None:
    path.write_bytes(b"\xff\xfe{}")


TENSORS = ["model.safetensors", "optimizer.safetensors"]
DAMAGES = [
    *((file, damage) for file in TENSORS for damage in (truncate, empty, flip_a_bit, remove)),
    *(
        ("state.json", damage)
        for damage in (truncate, empty, flip_a_bit, remove, change_the_step, not_a_checkpoint, not_text)
    ),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGES)
def test_a_damaged_one_is_reported_and_the_one_before_is_used(
    tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    model, optimizer = trained()
    save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer)
    newest = save_checkpoint(tmp_path, step=2, model=model, optimizer=optimizer)
    damage(newest / file)
    with pytest.warns(CheckpointWarning) as caught:
        assert load_checkpoint(tmp_path).step == 1
    (warning,) = caught
    assert str(newest / file) in str(warning.message)
    with pytest.raises(CheckpointError, match=file), warnings.catch_warnings():
        load_checkpoint(tmp_path, step=2)
    assert checkpoint_steps(tmp_path) == [1, 2]  # reading removes nothing


def test_every_bit_matters(tmp_path: Path) -> None:
    """Wherever in a file a bit flips, either it is found, or what was read is the same."""
    model, optimizer = trained(1)
    path = save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer)
    good = load_checkpoint(tmp_path)
    for file in path.iterdir():
        content = file.read_bytes()
        for position in range(0, len(content), max(1, len(content) // 60)):
            spoilt = bytearray(content)
            spoilt[position] ^= 1 << (position % 8)
            file.write_bytes(spoilt)
            try:
                read = load_checkpoint(tmp_path)
            except CheckpointError:
                continue
            assert read.state == good.state
            assert file.name == "state.json"
        file.write_bytes(content)
    assert load_checkpoint(tmp_path).step == 1


def test_all_damaged_is_an_error_that_names_each(tmp_path: Path) -> None:
    model, _ = trained()
    for number in (1, 2):
        truncate(save_checkpoint(tmp_path, step=number, model=model) / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"step_00000002.*bytes where .* were written; .*step_00000001"):
        load_checkpoint(tmp_path)


def test_a_damaged_newest_one_is_replaced_and_the_good_one_outlives_it(tmp_path: Path) -> None:
    model, _ = trained()
    save_checkpoint(tmp_path, step=1, model=model, keep=1)
    for number in (5, 9):
        flip_a_bit(save_checkpoint(tmp_path, step=number, model=model) / "model.safetensors")
    save_checkpoint(tmp_path, step=5, model=model, keep=2)  # the run went back to 1 and came to 5 again
    assert checkpoint_steps(tmp_path) == [1, 5]
    assert load_checkpoint(tmp_path).step == 5


def test_a_good_one_is_never_written_over_or_removed_for_being_ahead(tmp_path: Path) -> None:
    model, _ = trained()
    save_checkpoint(tmp_path, step=7, model=model)
    with pytest.raises(FileExistsError, match="not written over"):
        save_checkpoint(tmp_path, step=7, model=model)
    save_checkpoint(tmp_path, step=3, model=model, keep=1)
    assert checkpoint_steps(tmp_path) == [3, 7]


def test_leftovers_are_cleaned_up_and_nothing_else(tmp_path: Path) -> None:
    for name in (".writing-step_00000004", ".removed-step_00000001"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step_of_mine").mkdir()
    model, _ = trained()
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, step=4, model=model, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "step_00000004", "step_of_mine"]


def test_bad_arguments_and_other_models_are_refused(tmp_path: Path) -> None:
    model, optimizer = trained()
    with pytest.raises(ValueError, match="step must"):
        save_checkpoint(tmp_path, step=-1, model=model)
    with pytest.raises(ValueError, match="keep must"):
        save_checkpoint(tmp_path, step=1, model=model, keep=0)
    with pytest.raises(ValueError, match="plain JSON"):
        save_checkpoint(tmp_path, step=1, model=model, config={"path": tmp_path})
    with pytest.raises(ValueError, match="not one of the model's"):
        save_checkpoint(tmp_path, step=1, model=nn.Linear(2, 2), optimizer=optimizer)
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer)
    checkpoint = load_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="checkpoint of another model"):
        checkpoint.restore(nn.Linear(2, 2))
    part = AdamW([model.norm.weight])
    with pytest.raises(ValueError, match="does not train"):
        checkpoint.restore(model, part)
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_checkpoint(tmp_path / "nowhere")


FULL = """
import resource, signal, sys, torch
from minillm.training import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save_checkpoint(sys.argv[1], step=1, model=torch.nn.Linear(2, 2))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    save_checkpoint(sys.argv[1], step=2, model=torch.nn.Linear(200, 200))
except OSError as error:
    print(error)
"""


def test_a_full_disk_is_named_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk."""
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert re.search(r"step_00000002/model.safetensors cannot be written: .*File too large", said), said
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert load_checkpoint(tmp_path).step == 1


@pytest.mark.parametrize("step", ["write_sealed", "fsync", "describe"])
def test_whatever_ends_a_save_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    model, _ = trained()

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(minillm.training.checkpoint, step, stop)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, step=1, model=model)
    assert list(tmp_path.iterdir()) == []
    save_checkpoint(tmp_path, step=1, model=model)


def test_a_file_that_the_disk_does_not_give_back_is_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    save_checkpoint(tmp_path, step=1, model=model, optimizer=optimizer)
    newest = save_checkpoint(tmp_path, step=2, model=model, optimizer=optimizer) / "model.safetensors"
    digest, load = hashlib.file_digest, load_file

    def failing_digest(file: BinaryIO, name: str) -> Any:
        if file.name == str(newest):
            raise OSError(errno.EIO, "Input/output error")
        return digest(file, name)

    def failing_load(path: Path) -> dict[str, Tensor]:
        if path == newest:
            raise SafetensorError("invalid header")
        return load(path)

    for owner, name, failing in (
        (hashlib, "file_digest", failing_digest),
        (minillm.training.checkpoint, "load_file", failing_load),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing)
            with pytest.warns(CheckpointWarning, match=r"step_00000002/model.safetensors cannot be read"):
                assert load_checkpoint(tmp_path).step == 1


def test_files_are_as_readable_as_the_folder_allows(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, step=1, model=trained()[0])
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1
