"""A whole training run in a folder: corpus, tokenizer, token shards, model, training; and the way back to the model.

folder/run.json          the settings, complete: what `load_run` and a later sitting build from
       tokenizer.json    the tokenizer
       data/             the token shards
       metrics.jsonl     a JSON object a line
       checkpoints/      see `minillm.training.checkpoint`
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minillm.data import TokenDataset, load_corpus
from minillm.models import Transformer, TransformerConfig
from minillm.tokenizers import ByteBPETokenizer
from minillm.training.checkpoint import load_checkpoint
from minillm.training.config import TrainingConfig
from minillm.training.integrity import fsync
from minillm.training.lock import exclusive
from minillm.training.parallel import ParallelPlan
from minillm.training.precision import resolve_device
from minillm.training.result import TrainingResult
from minillm.training.run_settings import FILE_NAME, complete_settings, read_settings, require_same, write_settings
from minillm.training.trainer import Trainer

END_OF_TEXT = "<|endoftext|>"
_PREPARING = ".preparing"


def train_run(
    folder: str | Path,
    *,
    corpus: str = "python-docs",
    tokenizer: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    resume: bool = True,
    progress: bool = True,
    parallel: ParallelPlan | None = None,
    on_evaluate: Callable[[Trainer, dict[str, Any]], None] | None = None,
) -> TrainingResult:
    """Train a byte-level BPE tokenizer and a `Transformer` on a corpus, in a folder; or go on with a run that is there.

    The model's first weights and dropout are drawn from the training settings' seed.

    Args:
        folder: made if missing.
        corpus: what `minillm.data.load_corpus` takes.
        tokenizer: `vocab_size`, `pattern`: of `ByteBPETokenizer.train`.
        data: `batch_size`, `seed` of `TokenDataset`, `validation_fraction` of its `write` (0: no validation).
        model: the fields of `TransformerConfig`; `vocab_size` is the tokenizer's.
        training: the fields of `TrainingConfig`.
        resume: False refuses a folder that holds a run.
        progress: show the trainer's bar.
        parallel: how the work is spread over ranks, each of which calls this with the same arguments; a run may be gone
            on with under another plan. The first rank prepares the folder and writes.
        on_evaluate: as `Trainer` takes it.

    Returns:
        The trainer's result with `unigram_entropy`, and `entropy_floor` for the synthetic corpus.

    Raises:
        FileExistsError: there is a run in the folder and `resume` is False; or there is no run, and a file that the run
            would write over.
        RuntimeError: another process is training into the folder; there are not as many ranks as the plan has.
        ValueError: a setting that does not exist or is out of range, or one that differs from that of the run in the
            folder (all but those of `training` are fixed once and for all).
    """
    folder, plan = Path(folder), parallel or ParallelPlan()
    settings = check_run(plan, corpus, tokenizer, data, model, training)
    plan.check_ranks()
    first = plan.n_ranks == 1 or dist.get_rank() == 0
    # Held from the first look on: two that begin in one folder would write over each other's tokenizer and settings.
    with _held(folder) if first else contextlib.nullcontext():
        if first and (folder / FILE_NAME).exists():
            if not resume:
                raise FileExistsError(f"{folder} holds a run already; resume it, or name another folder")
            require_same(folder, settings, read_settings(folder))
        elif first:
            _prepare(folder, corpus, settings)
        if plan.n_ranks > 1:
            dist.barrier()
        bpe, model_config, train_data, validation = _open(folder, settings)
        if first:  # Only now: what stands here is known to fit together, and an unfinished preparation is begun anew.
            write_settings(folder, settings)
            (folder / _PREPARING).unlink(missing_ok=True)
        config = TrainingConfig.from_dict(settings["training"])
        torch.manual_seed(config.seed)
        trainer = Trainer(
            Transformer(model_config),
            train_data,
            validation,
            config,
            folder=folder,
            progress=progress,
            parallel=plan,
            on_evaluate=on_evaluate,
        )
        result = trainer.train(locked=True)
    return dataclasses.replace(
        result,
        unigram_entropy=None if validation is None else unigram_entropy(train_data, validation),
        entropy_floor=_entropy_floor(corpus, bpe),
    )


def check_run(
    plan: ParallelPlan,
    corpus: str = "python-docs",
    tokenizer: dict[str, Any] | None = None,
    data: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """All settings of a run, arguments as those of `train_run`, which prepares nothing before this has seen them.

    Raises:
        ValueError: a setting that does not exist or is out of range; a model or batches that the plan cannot divide;
            compiling on several ranks.
    """
    settings = complete_settings(corpus, tokenizer, data, model, training)
    plan.check_compile(TrainingConfig.from_dict(settings["training"]).compile)
    if plan.pp > 1:
        plan.check_rows(settings["data"]["batch_size"])
        vocab_size = settings["tokenizer"]["vocab_size"]
        with torch.device("meta"):
            plan.split(Transformer(TransformerConfig.from_dict({**settings["model"], "vocab_size": vocab_size})))
    return settings


def load_run(folder: str | Path, device: str = "auto") -> tuple[Transformer, ByteBPETokenizer]:
    """The model of a run at its newest good checkpoint, in evaluation mode on the device, and its tokenizer.

    Raises:
        FileNotFoundError: there is no run in the folder, or it has no checkpoint yet.
        CheckpointError: every checkpoint is damaged.
        ValueError: the device is not there, or the settings in the folder are damaged.
    """
    folder = Path(folder)
    place = resolve_device(device)
    settings = read_settings(folder)
    checkpoint = load_checkpoint(folder / "checkpoints")
    bpe = ByteBPETokenizer.load(folder / "tokenizer.json")
    try:
        config = _model_config(settings, bpe)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{folder / FILE_NAME} does not describe a model: {error}") from None
    model = Transformer(config)
    checkpoint.restore(model)
    return model.to(place).eval(), bpe


def unigram_entropy(train_data: TokenDataset, validation_data: TokenDataset) -> float:
    """The loss on the validation tokens, in nats per token, of the best model that ignores context.

        -mean over validation tokens of log p(token),    p(token) = (count in training + 1) / (n_tokens + vocab_size)

    (One is added so that a token which never occurs in training does not cost infinitely much.)
    """
    vocab_size = train_data.vocab_size
    counts = _token_counts(train_data) + 1
    log_probabilities = (counts / counts.sum()).log()
    seen = _token_counts(validation_data)
    assert counts.numel() == seen.numel() == vocab_size
    return -float((seen * log_probabilities).sum() / seen.sum())


def _token_counts(data: TokenDataset) -> torch.Tensor:
    # Long rows, because each costs a slice.
    length = min(data.n_tokens - 1, 2**16)
    rows = TokenDataset(data.folder, data.split, context_length=length, batch_size=1)
    counts = torch.zeros(data.vocab_size, dtype=torch.float64)
    for _, targets in rows.evaluation_batches():
        counts += torch.bincount(targets.flatten(), minlength=data.vocab_size)
    return counts


def _prepare(folder: Path, corpus: str, settings: dict[str, Any]) -> None:
    """Write the tokenizer and the shards, and see that they fit the rest; after an error nothing of them stays.

    Until run.json stands, a marker says that what is here is the work of a preparation, which may be begun anew;
    without it, a file of such a name is somebody else's.
    """
    marker = folder / _PREPARING
    if not marker.exists():
        for name in ("tokenizer.json", "data", "metrics.jsonl", "checkpoints"):
            if (folder / name).exists():
                raise FileExistsError(
                    f"{folder / name} is not a run's: {folder} holds no {FILE_NAME}; name another folder"
                )
        marker.touch()
        fsync(folder)
    try:
        _discard_preparation(folder)
        documents = load_corpus(corpus)
        bpe = ByteBPETokenizer.train(documents, special_tokens=[END_OF_TEXT], **settings["tokenizer"])
        bpe.save(folder / "tokenizer.json")
        TokenDataset.write(
            folder / "data",
            documents,
            bpe,
            validation_fraction=settings["data"]["validation_fraction"],
            seed=settings["data"]["seed"],
            end_of_text=bpe.special_tokens[END_OF_TEXT],
        )
        _open(folder, settings)
    except BaseException:
        _discard_preparation(folder)
        marker.unlink()
        raise


def _discard_preparation(folder: Path) -> None:
    (folder / "tokenizer.json").unlink(missing_ok=True)
    for path in folder.glob("data*"):
        if path.name == "data" or path.name.startswith("data.partial-"):  # a killed writer's, see TokenDataset.write
            shutil.rmtree(path)


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make the folder and hold it; after an error, remove it if it was made for this and is as empty as it was."""
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(folder):
            yield
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
        raise


def _open(
    folder: Path, settings: dict[str, Any]
) -> tuple[ByteBPETokenizer, TransformerConfig, TokenDataset, TokenDataset | None]:
    """The tokenizer, the model's configuration, the training data and the validation data, if any, of a run."""
    bpe = ByteBPETokenizer.load(folder / "tokenizer.json")
    model_config = _model_config(settings, bpe)
    open_split = partial(
        TokenDataset,
        folder / "data",
        context_length=model_config.context_length,
        batch_size=settings["data"]["batch_size"],
        seed=settings["data"]["seed"],
        tokenizer=bpe,
    )
    validates = settings["data"]["validation_fraction"] > 0
    return bpe, model_config, open_split("train"), open_split("validation") if validates else None


def _model_config(settings: dict[str, Any], bpe: ByteBPETokenizer) -> TransformerConfig:
    return TransformerConfig.from_dict({**settings["model"], "vocab_size": bpe.vocab_size})


def _entropy_floor(corpus: str, bpe: ByteBPETokenizer) -> float | None:
    if corpus != "synthetic":
        return None
    grammar = load_corpus(corpus).grammar
    assert grammar is not None
    return grammar.entropy_per_token(bpe, end_of_text=True)
