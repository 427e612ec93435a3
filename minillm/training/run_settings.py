"""The settings of a training run as its folder keeps them, in `run.json`: completed, written, read back, compared."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from minillm.data.corpora import NAMES
from minillm.models import TransformerConfig
from minillm.training.config import TrainingConfig
from minillm.training.integrity import fsync

FILE_NAME = "run.json"
TOKENIZER_DEFAULTS: dict[str, Any] = {"vocab_size": 1024, "pattern": "gpt2"}
_SECTIONS = ("tokenizer", "data", "model", "training")
DATA_DEFAULTS: dict[str, Any] = {"batch_size": 16, "validation_fraction": 0.1, "seed": 0}


def complete_settings(
    corpus: str,
    tokenizer: dict[str, Any] | None,
    data: dict[str, Any] | None,
    model: dict[str, Any] | None,
    training: dict[str, Any] | None,
) -> dict[str, Any]:
    """All settings of a run, with what was not given at its default; arguments as `train_run` takes them.

    Raises ValueError or TypeError for a setting that does not exist or is out of range.
    """
    settings: dict[str, Any] = {
        "corpus": _corpus(corpus),
        "tokenizer": _complete("tokenizer", tokenizer or {}, TOKENIZER_DEFAULTS),
        "data": _complete("data", data or {}, DATA_DEFAULTS),
    }
    settings["model"] = _complete_model(model or {}, settings["tokenizer"]["vocab_size"])
    settings["training"] = TrainingConfig.from_dict(training or {}).to_dict()
    return settings


def _complete(section: str, values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    unknown = sorted(set(values) - set(defaults))
    if unknown:
        raise ValueError(f"unknown {section} settings {', '.join(unknown)}; allowed: {', '.join(defaults)}")
    return defaults | values


def _complete_model(values: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    """Every field of the model but the size of the vocabulary, for the tokenizer may come out smaller than asked."""
    if "vocab_size" in values:
        raise ValueError("model settings take no vocab_size: it is the tokenizer's")
    config = TransformerConfig.from_dict({**values, "vocab_size": vocab_size}).to_dict()
    del config["vocab_size"]
    complete: dict[str, Any] = json.loads(json.dumps(config))
    return complete


def require_same(folder: Path, settings: dict[str, Any], stored: dict[str, Any]) -> None:
    """Refuse, naming each one, settings that would make the run in the folder another run."""
    now, then = _fixed_settings(settings), _fixed_settings(stored)
    changes = [
        f"{name} is {then.get(name)!r} there, not {now.get(name)!r}"
        for name in now | then
        if now.get(name) != then.get(name)
    ]
    if changes:
        raise ValueError(f"{folder} holds another run: {'; '.join(changes)}. Give the same settings, or another folder")


def _fixed_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """All settings but those of training, flat: `model.d_model` -> 128.

    Completed anew: a run of an earlier version lacks the settings that came since, and was made with their defaults.
    """
    sections = {
        "tokenizer": TOKENIZER_DEFAULTS | settings["tokenizer"],
        "data": DATA_DEFAULTS | settings["data"],
        "model": _complete_model(settings["model"], settings["tokenizer"].get("vocab_size", 1)),
    }
    flat = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    return {"corpus": _corpus(settings["corpus"])} | flat


def _corpus(name_or_path: str) -> str:
    """One name for one corpus: a path in full."""
    return name_or_path if name_or_path in NAMES else str(Path(name_or_path).resolve())


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run in the folder.

    Raises FileNotFoundError where there is none, and ValueError for a file that does not hold what `write_settings`
    writes.
    """
    file = folder / FILE_NAME
    if not file.exists():
        raise FileNotFoundError(f"{folder} holds no training run: there is no {FILE_NAME} in it")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # not UTF-8, or not JSON
        raise ValueError(f"{file} is damaged: {error}") from None
    if not isinstance(settings, dict) or not isinstance(settings.get("corpus"), str):
        raise ValueError(f"{file} does not hold the settings of a training run")
    for section in _SECTIONS:
        if not isinstance(settings.get(section), dict):
            raise ValueError(f"{file} does not hold the settings of a training run: it has no section {section!r}")
    return settings


def write_settings(folder: Path, settings: dict[str, Any]) -> None:
    temporary = folder / f".writing-{FILE_NAME}"
    temporary.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    fsync(temporary)
    os.replace(temporary, folder / FILE_NAME)
