"""A run in a folder: made, gone on with, read back, and refused when the settings do not fit."""

import json
import math
import random
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.data import SyntheticGrammar, TokenDataset
from minillm.tokenizers import ByteBPETokenizer
from minillm.training import load_checkpoint
from minillm.training.lock import exclusive
from minillm.training.run import load_run, train_run, unigram_entropy

SETTINGS: dict[str, Any] = {
    "tokenizer": {"vocab_size": 270},
    "data": {"batch_size": 4, "validation_fraction": 0.3},
    "model": {"context_length": 8, "d_model": 8, "n_layers": 1, "n_heads": 2},
    "training": {"max_steps": 3, "precision": "fp32", "device": "cpu", "eval_batches": None},
}

FILES = ["checkpoints", "data", "metrics.jsonl", "run.json", "tokenizer.json"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    for i in range(30):
        words = generator.choices(["red", "green", "blue", "round", "square", "the"], k=40)
        (folder / f"{i:02}.txt").write_text(" ".join(words) + "\n", encoding="utf-8")
    return str(folder)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def changed(section: str, **values: Any) -> dict[str, Any]:
    return SETTINGS | {section: SETTINGS[section] | values}


def test_trains_and_comes_back(corpus: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = train_run(folder, corpus=corpus, **SETTINGS, progress=False)
    assert result.step == 3
    assert result.entropy_floor is None
    assert sorted(path.name for path in folder.iterdir()) == FILES
    model, tokenizer = load_run(folder, "cpu")
    assert not model.training
    assert model.config.vocab_size == tokenizer.vocab_size == 270
    for name, tensor in load_checkpoint(folder / "checkpoints").model.items():
        assert torch.equal(model.state_dict()[name], tensor)
    validation = TokenDataset(folder / "data", "validation", context_length=8, batch_size=4)
    logits, targets = zip(
        *((model(x).flatten(0, 1), y.flatten()) for x, y in validation.evaluation_batches()), strict=True
    )
    loss = torch.nn.functional.cross_entropy(torch.cat(logits), torch.cat(targets)).item()
    assert result.validation_loss == pytest.approx(loss, rel=1e-5)


def test_goes_on_and_gives_the_run_that_never_stopped(corpus: str, tmp_path: Path) -> None:
    longer = changed("training", max_steps=6, warmup_steps=0, learning_rate=1e-3, min_learning_rate=1e-3)
    shorter = changed("training", max_steps=3, warmup_steps=0, learning_rate=1e-3, min_learning_rate=1e-3)
    train_run(tmp_path / "whole", corpus=corpus, **longer, progress=False)
    train_run(tmp_path / "parts", corpus=corpus, **shorter, progress=False)
    result = train_run(tmp_path / "parts", corpus=corpus, **longer, progress=False)
    assert [line["step"] for line in result.history][-1] == 6
    (whole, _), (parts, _) = load_run(tmp_path / "whole", "cpu"), load_run(tmp_path / "parts", "cpu")
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)


KILLED = """
import os, signal, sys
from minillm.training import run
moments = {"tokenizer": (run.ByteBPETokenizer, "save"), "data": (run.TokenDataset, "write")}
owner, name = moments.get(sys.argv[3], (run, "write_settings"))
original = getattr(owner, name)
def killed(*arguments, **options):
    if sys.argv[3] != "run.json":
        original(*arguments, **options)
    os.kill(os.getpid(), signal.SIGKILL)
setattr(owner, name, killed)
tokenizer = {"vocab_size": 260}
run.train_run(sys.argv[1], corpus=sys.argv[2], tokenizer=tokenizer, data={"batch_size": 2}, model={"context_length": 8})
"""


@pytest.mark.parametrize(
    ("moment", "remains"),
    [("tokenizer", ["tokenizer.json"]), ("data", ["data", "tokenizer.json"]), ("run.json", ["data", "tokenizer.json"])],
)
def test_a_killed_preparation_is_begun_anew(corpus: str, tmp_path: Path, moment: str, remains: list[str]) -> None:
    folder = tmp_path / "run"
    child = subprocess.run([sys.executable, "-c", KILLED, folder, corpus, moment], timeout=60, check=False)
    assert child.returncode == -signal.SIGKILL
    assert sorted(path.name for path in folder.iterdir()) == [".preparing", *remains]
    (folder / "data.partial-00000000").mkdir()  # and a writer of shards was killed before
    train_run(folder, corpus=corpus, **SETTINGS, progress=False)
    assert load_run(folder, "cpu")[1].vocab_size == 270
    assert sorted(path.name for path in folder.iterdir()) == FILES


@pytest.mark.parametrize("name", ["tokenizer.json", "metrics.jsonl", "data", "checkpoints"])
def test_what_is_not_of_a_run_is_never_written_over(corpus: str, tmp_path: Path, name: str) -> None:
    if "." in name:
        (tmp_path / name).write_text("mine", encoding="utf-8")
    else:
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine", encoding="utf-8")
    before = content(tmp_path)
    with pytest.raises(FileExistsError, match=rf"{name} is not a run's: .* name another folder"):
        train_run(tmp_path, corpus=corpus, **SETTINGS, progress=False)
    assert content(tmp_path) == before


def test_unigram_entropy_is_that_of_the_counts(corpus: str, tmp_path: Path) -> None:
    result = train_run(tmp_path, corpus=corpus, **SETTINGS, progress=False)
    train, validation = (
        TokenDataset(tmp_path / "data", s, context_length=1, batch_size=1) for s in ("train", "validation")
    )
    seen, wanted = (Counter(int(targets) for _, targets in data.evaluation_batches()) for data in (train, validation))
    total = sum(seen.values()) + train.vocab_size
    expected = -sum(n * math.log((seen[token] + 1) / total) for token, n in wanted.items()) / sum(wanted.values())
    assert unigram_entropy(train, validation) == pytest.approx(expected)
    assert result.unigram_entropy == pytest.approx(expected)


def test_the_synthetic_corpus_knows_its_floor(tmp_path: Path) -> None:
    settings = changed("training", max_steps=1, eval_batches=1)
    result = train_run(tmp_path, corpus="synthetic", **settings, progress=False)
    tokenizer = ByteBPETokenizer.load(tmp_path / "tokenizer.json")
    assert result.entropy_floor == pytest.approx(SyntheticGrammar().entropy_per_token(tokenizer, end_of_text=True))
    assert result.unigram_entropy is not None
    assert 0 < result.entropy_floor < result.unigram_entropy


def test_without_validation(corpus: str, tmp_path: Path) -> None:
    result = train_run(tmp_path, corpus=corpus, **changed("data", validation_fraction=0.0), progress=False)
    assert (result.validation_loss, result.unigram_entropy, result.bits_per_byte) == (None, None, None)


@pytest.mark.parametrize(
    ("section", "values"),
    [("tokenizer", {"vocab_size": 280}), ("data", {"seed": 3}), ("model", {"n_layers": 2})],
)
def test_fixed_settings_cannot_change(corpus: str, tmp_path: Path, section: str, values: dict[str, Any]) -> None:
    train_run(tmp_path, corpus=corpus, **SETTINGS, progress=False)
    [(name, value)] = values.items()
    with pytest.raises(ValueError, match=rf"another run: {section}\.{name} is .* not {value}"):
        train_run(tmp_path, corpus=corpus, **changed(section, **values), progress=False)
    with pytest.raises(FileExistsError, match="holds a run already"):
        train_run(tmp_path, corpus=corpus, **SETTINGS, progress=False, resume=False)


def test_a_run_from_before_a_setting_existed_goes_on(corpus: str, tmp_path: Path) -> None:
    train_run(tmp_path, corpus=corpus, **SETTINGS, progress=False)
    file = tmp_path / "run.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    for name in ("relative_distance", "relative_buckets", "window"):
        del settings["model"][name]
    file.write_text(json.dumps(settings), encoding="utf-8")
    steps = SETTINGS["training"]["max_steps"] + 1
    result = train_run(tmp_path, corpus=corpus, **changed("training", max_steps=steps), progress=False)
    assert result.step == steps


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("tokenizer", {"size": 280}, "unknown tokenizer settings size; allowed: vocab_size, pattern"),
        ("data", {"batch": 3}, "unknown data settings batch; allowed: batch_size, validation_fraction, seed"),
        ("model", {"vocab_size": 300}, "take no vocab_size"),
        ("model", {"layers": 2}, "layers"),
        ("training", {"lr": 2}, "unknown training settings lr"),
        ("training", {"precision": "fp8"}, "precision must be one of"),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(
    corpus: str, tmp_path: Path, section: str, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train_run(tmp_path / "run", corpus=corpus, **changed(section, **values), progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"corpus": "no-such-corpus"}, "no-such-corpus"),
        ({"tokenizer": {"vocab_size": 3}}, "vocab_size"),
        ({"model": SETTINGS["model"] | {"context_length": 100_000}}, "context_length"),
    ],
)
def test_a_failed_preparation_leaves_nothing(
    corpus: str, tmp_path: Path, arguments: dict[str, Any], message: str, there: bool
) -> None:
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        train_run(folder, **({"corpus": corpus} | SETTINGS | arguments), progress=False)
    assert folder.exists() == there
    if there:
        assert content(folder) == {"notes.txt": b"mine"}
    assert train_run(folder, corpus=corpus, **SETTINGS, progress=False).step == 3


def test_loading_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no training run: there is no run\.json"):
        load_run(tmp_path)


@pytest.mark.parametrize("there", ["nothing", "a run"])
def test_a_folder_in_use_is_left_as_it_is(corpus: str, tmp_path: Path, there: str) -> None:
    if there == "a run":
        train_run(tmp_path, corpus=corpus, **SETTINGS, progress=False)
    before = content(tmp_path)
    with exclusive(tmp_path), pytest.raises(RuntimeError, match="in use"):
        train_run(tmp_path, corpus=corpus, **changed("training", max_steps=5), progress=False)
    assert content(tmp_path) == before


def test_the_folder_is_held_while_it_is_prepared(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, refusals = ByteBPETokenizer.train, []

    def train_beside(*arguments: Any, **options: Any) -> ByteBPETokenizer:
        with monkeypatch.context() as patch:
            patch.setattr(ByteBPETokenizer, "train", train)
            with pytest.raises(RuntimeError, match="in use") as refused:
                train_run(tmp_path, corpus=corpus, **changed("tokenizer", vocab_size=260), progress=False)
        refusals.append(refused)
        return train(*arguments, **options)

    monkeypatch.setattr(ByteBPETokenizer, "train", train_beside)
    assert train_run(tmp_path, corpus=corpus, **SETTINGS, progress=False).step == 3
    assert len(refusals) == 1
    assert load_run(tmp_path, "cpu")[1].vocab_size == 270


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"is damaged: "),
        ("garbage", r"is damaged: "),
        ("\xff", r"is damaged: "),
        ("[]", "does not hold the settings"),
        ("null", "does not hold the settings"),
        ("{}", "does not hold the settings"),
        ('{"corpus": "x"}', "does not hold .* no section 'tokenizer'"),
        (
            '{"corpus": "x", "tokenizer": {}, "data": {}, "model": null, "training": {}}',
            "does not hold .* no section 'model'",
        ),
    ],
)
def test_a_broken_settings_file_is_named(corpus: str, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"run\.json {message}"):
        load_run(tmp_path)
    with pytest.raises(ValueError, match=rf"run\.json {message}"):
        train_run(tmp_path, corpus=corpus, **SETTINGS, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_settings_that_make_no_model_are_named(corpus: str, tmp_path: Path) -> None:
    train_run(tmp_path, corpus=corpus, **SETTINGS, progress=False)
    settings = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    for model in ({"layers": 3}, {"d_model": "wide"}):
        (tmp_path / "run.json").write_text(json.dumps(settings | {"model": model}), encoding="utf-8")
        with pytest.raises(ValueError, match=r"run\.json does not describe a model"):
            load_run(tmp_path)
