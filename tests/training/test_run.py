"""A run in a folder: made, gone on with, read back, and refused when the settings do not fit."""

import math
import random
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
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints",
        "data",
        "metrics.jsonl",
        "run.json",
        "tokenizer.json",
    ]
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


def test_an_unfinished_preparation_is_begun_anew(corpus: str, tmp_path: Path) -> None:
    """Killed before run.json is written, whatever of the rest is there."""
    for remains in ([], ["tokenizer.json"], ["tokenizer.json", "data"]):
        folder = tmp_path / "-".join(["run", *remains])
        train_run(folder, corpus=corpus, **changed("tokenizer", vocab_size=260), progress=False)
        for name in ("run.json", "metrics.jsonl"):
            (folder / name).unlink()
        (folder / "checkpoints").rename(tmp_path / f"away{len(remains)}")
        for name in {"tokenizer.json", "data"} - set(remains):
            (folder / name).rename(tmp_path / f"{name}{len(remains)}")
        train_run(folder, corpus=corpus, **SETTINGS, progress=False)
        assert load_run(folder, "cpu")[1].vocab_size == 270


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


def test_a_bad_corpus_does_not_spoil_the_folder(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no-such-corpus"):
        train_run(tmp_path / "run", corpus="no-such-corpus", **SETTINGS, progress=False)
    assert train_run(tmp_path / "run", corpus=corpus, **SETTINGS, progress=False).step == 3


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
