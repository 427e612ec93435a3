"""A command line inside the test's own folder, a small corpus, and a run that is trained once for all tests."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from minillm.cli import main

Cli = Callable[..., Result]

SMALL = (
    *("--set", "tokenizer.vocab_size=280", "--set", "model.d_model=16", "--set", "model.n_heads=2"),
    *("--set", "model.n_layers=1", "--set", "model.context_length=16", "--set", "data.batch_size=2"),
    *("--set", "training.eval_batches=2", "--set", "training.log_every=1"),
)


def invoke(*arguments: str | Path, stdin: str | None = None) -> Result:
    """Run `minillm ARGUMENTS`. Anything but a clean end or a message in one line is an error of the program."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert "Traceback" not in result.output
    return result


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.chdir(tmp_path)
    return invoke


@pytest.fixture
def refused(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `minillm train` says where a value cannot be, which ends it before anything is made."""
    monkeypatch.delenv("RANK", raising=False)

    def said(*given: str) -> str:
        result = cli("train", "--out", "run", *given)
        assert result.exit_code == 2
        assert not Path("run").exists()
        return " ".join(result.output.split())

    return said


@pytest.fixture
def small() -> tuple[str, ...]:
    """Options that make a training run take a moment."""
    return SMALL


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "fables.txt"
    path.write_text("The fox saw the crow — and the crow saw the fox.\n" * 60, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "fables"
    result = invoke("train", "--corpus", corpus, "--out", folder, "--steps", "4", *SMALL)
    assert result.exit_code == 0, result.output
    return folder
