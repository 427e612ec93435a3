"""Commands do what their help says, and answer a mistake with one sentence and the right exit status."""

import dataclasses
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import Result
from tokenizers import Tokenizer

import minillm.training.run
from minillm import __version__, exercises
from minillm.cli import main
from minillm.inference import generate
from minillm.tokenizers import ByteBPETokenizer
from minillm.tokenizers.loading import KINDS
from minillm.training import Trainer, TrainingResult
from minillm.training.run import load_run

Cli = Callable[..., Result]
Small = tuple[str, ...]


def _commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from _commands(child, (*path, name))


COMMANDS = dict(_commands(main))
EXAMPLES = [
    (path, line) for path, command in COMMANDS.items() for line in re.findall(r"\$ minillm (.*)", command.help or "")
]


# -- help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_help_has_an_example_of_its_own_command(path: tuple[str, ...], cli: Cli) -> None:
    result = cli(*path, "--help")
    assert result.exit_code == 0
    assert f"$ minillm {' '.join(path)}".rstrip() in result.output


@pytest.mark.parametrize(("path", "example"), EXAMPLES, ids=[example for _, example in EXAMPLES])
def test_every_example_parses(
    path: tuple[str, ...], example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/first", "submissions"):
        Path(folder).mkdir(parents=True)
    Path("tokenizer.json").touch()
    command: click.Command = main
    arguments = shlex.split(example)
    while isinstance(command, click.Group):
        command = command.commands[arguments.pop(0)]
    command.make_context(None, arguments)


def test_help_does_not_wait_for_torch() -> None:
    program = (
        "import sys; from minillm.cli import main; main(['train', '--help'], standalone_mode=False);"
        "sys.exit(str({'torch', 'numpy', 'matplotlib', 'regex'} & set(sys.modules) or ''))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (result.stderr, "Usage: " in result.stdout) == ("\n", True)


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "minillm", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout == f"minillm {__version__}\n"


# -- train -----------------------------------------------------------------------------------------


def test_train_reports_its_losses_and_writes_a_sample(cli: Cli, corpus: Path, small: Small) -> None:
    result = cli("train", "--corpus", corpus, "--steps", "3", "--out", "runs/new", "--figures", "--seed", "7", *small)
    assert result.exit_code == 0, result.output
    history = [json.loads(line) for line in Path("runs/new/metrics.jsonl").read_text().splitlines()]
    first, last = history[0]["loss"], history[-1]["loss"]
    for text in (f"loss at step 1       {first:.3f}", f"loss at step 3       {last:.3f}", "validation loss"):
        assert text in result.output
    assert re.search(r"unigram entropy +\d\.\d{3}:", result.output)
    assert "\nThe" in result.output
    settings = json.loads(Path("runs/new/run.json").read_text())
    assert settings["training"]["max_steps"] == 3
    assert settings["training"]["seed"] == settings["data"]["seed"] == 7
    assert settings["model"]["d_model"] == 16
    assert settings["tokenizer"]["vocab_size"] == 280
    for name in ("loss_curve.png", "attention.png"):
        assert Path("runs/new", name).read_bytes().startswith(b"\x89PNG")


def test_figures_of_the_shortest_context(cli: Cli, corpus: Path, small: Small) -> None:
    bytes_only = ("--set", "model.context_length=1", "--set", "tokenizer.vocab_size=257")  # "The" is three tokens
    result = cli("train", "--corpus", corpus, "--steps", "1", "--out", "run", "--figures", *small, *bytes_only)
    assert result.exit_code == 0, result.output
    assert Path("run/attention.png").read_bytes().startswith(b"\x89PNG")


def test_train_goes_on_with_a_run(cli: Cli, corpus: Path, small: Small) -> None:
    options = ("train", "--corpus", corpus, "--out", "run", *small)
    assert cli(*options, "--steps", "2").exit_code == 0
    result = cli(*options, "--steps", "5")
    assert result.exit_code == 0, result.output
    assert "loss at step 5" in result.output
    steps = [json.loads(line)["step"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5]


def test_train_leaves_another_run_alone(cli: Cli, corpus: Path, small: Small) -> None:
    options = ("train", "--corpus", corpus, "--out", "run", "--steps", "1", *small)
    assert cli(*options).exit_code == 0
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    result = cli(*options, "--set", "model.d_model=32")
    assert result.exit_code == 2
    assert re.search(r"Error: run holds another run: model\.d_model is 16 there, not 32; .*folder", result.output)
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before


def test_train_compares_the_synthetic_corpus_with_its_exact_entropy(cli: Cli, small: Small) -> None:
    result = cli("train", "--corpus", "synthetic", "--steps", "1", "--out", "run", *small)
    assert result.exit_code == 0, result.output
    assert re.search(r"exact entropy +\d\.\d{3}: no model can do better; this one is \d+\.\d% above", result.output)


def test_train_takes_a_file_as_preset(cli: Cli, corpus: Path, small: Small) -> None:
    Path("mine.toml").write_text(f'[data]\ncorpus = "{corpus.as_posix()}"\n[training]\nmax_steps = 1\n')
    result = cli("train", "--preset", "mine.toml", *small)
    assert result.exit_code == 0, result.output
    assert json.loads(Path("runs/mine/run.json").read_text())["training"]["max_steps"] == 1


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--preset", "tinny"), 2, "did you mean 'tiny'?"),
        (("--preset", "nowhere.toml"), 2, "nowhere.toml"),
        (("--set", "model.layers=2"), 2, "allowed are context_length, d_model, n_layers"),
        (("--set", "modle.n_layers=2"), 2, "allowed are model, tokenizer, data, training"),
        (("--set", "model.n_layers=two"), 2, "must be a whole number, got 'two'"),
        (("--set", "n_layers"), 2, "must read section.key=value"),
        (("--steps", "many"), 2, "'many' is not a valid integer"),
        (("--stps", "3"), 2, "--steps"),
        (("--steps", "0"), 2, "max_steps must be at least 1"),
        (("--steps", "1", "--seed", str(2**64)), 2, "seed must be from 0 to"),
        (("--set", "model.n_heads=3"), 2, "n_heads"),
        (("--set", "tokenizer.vocab_size=3"), 2, "vocab_size"),
        (("--set", "tokenizer.pattern=gpt5"), 2, "gpt2"),
        (("--set", "data.batch_size=0"), 2, "batch_size"),
        (("--set", "data.validation_fraction=2"), 2, "validation_fraction"),
        (("--corpus", "python-dcos"), 2, "must be one of python-docs, python-stdlib, synthetic"),
        (("--device", "tpu"), 2, "device"),
    ],
)
def test_train_refuses_what_it_cannot_do(options: Small, status: int, words: str, cli: Cli) -> None:
    result = cli("train", "--out", "run", *options)
    assert (result.exit_code, words in " ".join(result.output.split())) == (status, True), result.output
    assert not Path("run").exists()


def test_traceback_is_shown_when_asked_for(cli: Cli) -> None:
    with pytest.raises(ValueError, match="python-dcos"):
        cli("--traceback", "train", "--corpus", "python-dcos", "--out", "run")


@pytest.fixture
def heard_ctrl_c() -> Iterator[None]:
    """A process that a shell started in the background ignores SIGINT; Python then raises no KeyboardInterrupt."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_ctrl_c")
def test_ctrl_c_before_the_first_step(cli: Cli, corpus: Path, small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("train", "--corpus", corpus, "--out", "run", "--steps", "2", *small)
    with monkeypatch.context() as patch:
        patch.setattr(ByteBPETokenizer, "train", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        result = cli(*options)
    assert (result.exit_code, result.stderr.strip()) == (130, "Interrupted")
    assert not Path("run").exists()

    start = Trainer._start

    def pressed(trainer: Trainer) -> None:
        signal.raise_signal(signal.SIGINT)
        start(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_start", pressed)
        result = cli(*options)
    assert result.exit_code == 130
    assert "Interrupted before the first step" in result.stdout
    assert cli(*options).exit_code == 0


def test_a_reader_that_has_enough_ends_the_text(run: Path) -> None:
    """`minillm sample run | head -c 1`"""
    command = [sys.executable, "-m", "minillm", "sample", str(run), "--max-new-tokens", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""


def test_one_corpus_by_two_paths(cli: Cli, corpus: Path, small: Small) -> None:
    shutil.copy(corpus, "corpus.txt")
    for name in ("corpus.txt", "./corpus.txt", Path("corpus.txt").absolute()):
        result = cli("train", "--corpus", name, "--out", "run", "--steps", "1", *small)
        assert result.exit_code == 0, result.output
    assert json.loads(Path("run/run.json").read_text())["corpus"] == str(Path("corpus.txt").resolve())


def test_train_says_how_to_go_on_after_ctrl_c(
    cli: Cli, corpus: Path, small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = minillm.training.run.train_run

    def interrupted(*arguments: Any, **options: Any) -> TrainingResult:
        return dataclasses.replace(original(*arguments, **options), interrupted=True)

    monkeypatch.setattr(minillm.training.run, "train_run", interrupted)
    result = cli("train", "--corpus", corpus, "--out", "run", "--steps", "2", *small)
    assert result.exit_code == 130
    assert "the same command goes on from" in result.output


# -- sample ----------------------------------------------------------------------------------------


def test_sample_writes_what_generate_draws(cli: Cli, run: Path) -> None:
    options = ("--temperature", "0.7", "--top-k", "20", "--top-p", "0.9", "--seed", "3", "--max-new-tokens", "30")
    result = cli("sample", run, "--prompt", "The fox —", *options)
    assert result.exit_code == 0, result.output
    model, tokenizer = load_run(run, "cpu")
    drawn = generate(
        model, tokenizer.encode("The fox —"), max_new_tokens=30, temperature=0.7, top_k=20, top_p=0.9, seed=3,
        stop_tokens=tokenizer.special_tokens.values(),
    )  # fmt: skip
    assert result.output == "The fox —" + tokenizer.decode(drawn) + "\n"
    assert cli("sample", run, "--prompt", "The fox —", *options).output == result.output


def test_sample_begins_a_text_without_a_prompt(cli: Cli, run: Path) -> None:
    result = cli("sample", run, "--prompt", "", "--max-new-tokens", "5", "--seed", "0")
    assert result.exit_code == 0, result.output
    assert len(result.output) > 1


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--temperature", "-1"), 2, "x>=0"),
        (("--top-p", "0"), 2, "0<x<=1"),
        (("--top-k", "0"), 2, "x>=1"),
        (("--max-new-tokens", "0"), 2, "x>=1"),
        (("--device", "tpu"), 2, "device"),
        (("--device", "meta"), 2, "device"),
        (("--temperature", "nan"), 2, "temperature must be 0 (greedy)"),
        (("--top-p", "nan"), 2, "top_p must be"),
        (("--seed", str(2**64)), 2, "seed must fit into 64 bits"),
    ],
)
def test_sample_refuses_impossible_settings(options: Small, status: int, words: str, cli: Cli, run: Path) -> None:
    result = cli("sample", run, "--prompt", "A fox", *options)
    assert (result.exit_code, words in result.output) == (status, True), result.output
    assert result.stdout == ""


def test_sample_refuses_a_folder_without_a_run(cli: Cli) -> None:
    assert cli("sample", "nowhere").exit_code == 2
    Path("empty").mkdir()
    result = cli("sample", "empty")
    assert result.exit_code == 1  # not the option's value is wrong but what is on the disk
    assert "holds no training run" in result.output


# -- tokenizer -------------------------------------------------------------------------------------


def test_tokenizer_trains_and_encodes(cli: Cli, corpus: Path) -> None:
    options = ("--vocab-size", "300", "--special", "<|endoftext|>", "--out", "new/tokenizer.json")
    result = cli("tokenizer", "train", corpus, *options)
    assert result.exit_code == 0, result.output
    text = "The fox — the cröw."
    oracle = Tokenizer.from_file("new/tokenizer.json").encode(text).ids
    encoded = cli("tokenizer", "encode", "new/tokenizer.json", text)
    ids, pieces = encoded.output.splitlines()
    assert [int(token) for token in ids.split()] == oracle
    assert len(pieces.split("|")) == len(oracle)
    assert cli("tokenizer", "encode", "new/tokenizer.json", "-", stdin=text).output == encoded.output


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "byte-bpe"])
def test_tokenizer_trains_every_kind(kind: str, cli: Cli, corpus: Path) -> None:
    result = cli("tokenizer", "train", corpus, "--kind", kind, "--vocab-size", "310", "--out", "tokenizer.json")
    assert result.exit_code == 0, result.output
    text = "the fox"
    oracle = Tokenizer.from_file("tokenizer.json").encode(text, add_special_tokens=False)
    ids, pieces = cli("tokenizer", "encode", "tokenizer.json", text).output.splitlines()
    assert [int(token) for token in ids.split()] == oracle.ids
    assert pieces == "|".join(oracle.tokens)


def test_tokenizer_refuses_kinds_and_patterns_that_do_not_go_together(cli: Cli, corpus: Path) -> None:
    for options, message in (
        (("--kind", "syllables"), "--kind must be one of byte-bpe, wordpiece"),
        (("--kind", "unigram", "--pattern", "gpt4"), "--pattern is for byte-bpe, not for unigram"),
        (("--kind", "wordpiece", "--vocab-size", "6"), "vocab_size"),
    ):
        result = cli("tokenizer", "train", corpus, *options)
        assert (result.exit_code, message in result.output) == (2, True)
    assert not Path("tokenizer.json").exists()


def test_tokenizer_keeps_a_file_that_is_there(cli: Cli, corpus: Path) -> None:
    Path("tokenizer.json").write_text("precious")
    result = cli("tokenizer", "train", corpus, "--vocab-size", "260")
    assert result.exit_code == 2
    assert "--force" in result.output
    assert Path("tokenizer.json").read_text() == "precious"
    assert cli("tokenizer", "train", corpus, "--vocab-size", "260", "--force").exit_code == 0


def test_tokenizer_refuses_what_is_no_corpus_or_no_tokenizer(cli: Cli, corpus: Path) -> None:
    result = cli("tokenizer", "train", "nowhere")
    assert (result.exit_code, "must be one of python-docs" in result.output) == (2, True)
    assert cli("tokenizer", "train", corpus, "--vocab-size", "3").exit_code == 2
    result = cli("tokenizer", "train", corpus, "--pattern", "gpt5")
    assert (result.exit_code, "gpt2" in result.output) == (2, True)
    result = cli("tokenizer", "encode", corpus, "text")
    assert (result.exit_code, result.output.startswith("Error: ")) == (2, True)
    assert not Path("tokenizer.json").exists()


# -- exercises -------------------------------------------------------------------------------------


def test_exercises_hand_their_options_on(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    class Report:
        passed = False

        def render(self) -> str:
            return "the report"

    class Grades:
        rows = (1, 2)
        path = "grades.csv"

    def record(name: str, answer: object) -> None:
        monkeypatch.setattr(exercises, name, lambda *args, **options: calls.append((name, args, options)) or answer)

    record("build", [Path("exercises/02_tokenizers.ipynb")])
    record("check", Report())
    record("hint", "think of bytes")
    record("grade", Grades())
    Path("submissions").mkdir()
    results = [
        cli("exercises", "build", "02", "--force"),
        cli("exercises", "check", "02", "--seed", "5"),
        cli("exercises", "hint", "2.1", "--level", "2"),
        cli("exercises", "grade", "submissions", "--jobs", "2", "--exercise", "02"),
    ]
    assert [result.exit_code for result in results] == [0, 1, 0, 0]
    assert [result.output for result in results] == [
        f"wrote {Path('exercises/02_tokenizers.ipynb')}\n",
        "the report\n",
        "think of bytes\n",
        "graded 2 submissions into grades.csv\n",
    ]
    assert calls == [
        ("build", ("02",), {"execute": False, "force": True}),
        ("check", ("02",), {"seed": 5, "timeout": 30.0}),
        ("hint", ("2.1", 2), {}),
        ("grade", (Path("submissions"),),
         {"exercise": "02", "output": Path("grades.csv"), "timeout": 120.0, "memory_mb": 4096, "jobs": 2}),
    ]  # fmt: skip


def test_exercises_refuse_an_unknown_part(cli: Cli) -> None:
    result = cli("exercises", "hint", "second")
    assert (result.exit_code, result.output.startswith("Error: ")) == (2, True)


def test_refuses_an_unknown_command(cli: Cli) -> None:
    result = cli("trian")
    assert (result.exit_code, "No such command 'trian'" in result.output) == (2, True)
