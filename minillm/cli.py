"""The command line: `minillm ...`, or `python -m minillm ...`. Thin: each command calls one function of the package.

What a command needs is imported inside it, so that `minillm --help` does not wait for torch.
"""

import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from minillm import __version__

if TYPE_CHECKING:
    from minillm.training import TrainingResult


class _BadValue(click.ClickException):
    exit_code = 2


class _Group(click.Group):
    """A mistake of the user's ends in one sentence, not in a traceback: exit status 2 for a value that cannot be, 1 for
    what the machine or the files do not allow, 130 after Ctrl-C."""

    def invoke(self, context: click.Context) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {message}", err=True)
            try:
                return super().invoke(context)
            except (click.exceptions.Exit, click.Abort, BrokenPipeError):  # click ends quietly where nobody reads on
                raise
            except KeyboardInterrupt:
                click.echo("Interrupted", err=True)
                raise SystemExit(130) from None
            except (ValueError, TypeError, OSError, RuntimeError) as error:
                if context.params["traceback"]:
                    raise
                kind = _BadValue if isinstance(error, (ValueError, TypeError)) else click.ClickException
                raise kind(str(error)) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="minillm %(version)s")
@click.option("--traceback", is_flag=True, help="On an error, show where in the code it was raised.")
def main(traceback: bool) -> None:
    """Train small language models, write with them, and check the course's exercises.

    \b
    Example:
      $ minillm train --preset tiny --out runs/first
      $ minillm sample runs/first
    """


@main.command()
@click.option("--preset", default="tiny", show_default=True, help="A preset by name, or the path of a TOML file.")
@click.option("--corpus", help="A corpus by name, or a text file or folder.  [default: the preset's]")
@click.option("--out", type=click.Path(path_type=Path), help="The run folder.  [default: runs/<preset>]")
@click.option("--steps", type=int, help="Updates in all; --set training.max_steps=N for short.")
@click.option("--device", help="auto, cpu, cuda, cuda:1, mps; --set training.device=... for short.")
@click.option("--seed", type=int, help="Of the model, the split and the order of the batches.")
@click.option("--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE", help="Change a setting; repeatable.")
@click.option("--figures", is_flag=True, help="Save loss_curve.png and attention.png in the run folder.")
@click.option("--dp", type=int, default=1, show_default=True, help="Data-parallel ranks, which torchrun starts.")
@click.option("--zero", type=int, default=0, show_default=True, help="What they divide: ZeRO stage 1, 2 or 3.")
@click.option("--pp", type=int, default=1, show_default=True, help="Stages of a pipeline, each on --dp of the ranks.")
@click.option("--schedule", default="1f1b", show_default=True, help="Its schedule, such as gpipe, interleaved or zb-v.")
@click.option("--micro-batches", type=int, help="What a rank's rows of a batch are cut into.  [default: --pp]")
@click.option("--chunks", type=int, default=1, show_default=True, help="Pieces of the model on a stage (interleaved).")
@click.option("--engine", default="minillm", show_default=True, help="minillm, or torch for PyTorch's own.")
def train(
    preset: str, corpus: str | None, out: Path | None, steps: int | None, device: str | None, seed: int | None,
    assignments: tuple[str, ...], figures: bool, **plan_options: Any,
) -> None:  # fmt: skip
    """Train a model on a corpus. A run that its folder already holds is taken up where it stopped.

    \b
    Example:
      $ minillm train --corpus synthetic --out runs/grammar
      $ minillm train --steps 30 --set model.n_layers=1 --set training.learning_rate=2e-3 --out runs/short
      $ minillm train --steps 30 --set model.moe.n_experts=8 --set model.moe.k=2 --out runs/experts
      $ torchrun --standalone --nproc-per-node 2 -m minillm train --dp 2 --zero 3 --out runs/sharded
      $ torchrun --standalone --nproc-per-node 2 -m minillm train --pp 2 --micro-batches 8 --out runs/staged
    """
    from minillm import presets
    from minillm.distributed.startup import initialize
    from minillm.training import TrainingConfig
    from minillm.training.parallel import ParallelPlan
    from minillm.training.precision import resolve_device
    from minillm.training.run import check_run, train_run

    flags = {"data.corpus": corpus, "training.max_steps": steps, "training.device": device}
    flags |= {"training.seed": seed, "data.seed": seed}
    try:
        changes = dict(presets.parse_assignment(assignment) for assignment in assignments)
        changes |= {name: value for name, value in flags.items() if value is not None}
        settings = presets.override(presets.load_preset(preset), changes)
        plan = ParallelPlan(**plan_options)
        place = resolve_device(TrainingConfig.from_dict(settings["training"]).device, plan.n_ranks)
    except (ValueError, TypeError, OSError) as error:
        raise click.UsageError(str(error)) from error
    folder = out or Path("runs", Path(preset).stem)
    corpus = settings["data"].pop("corpus", "python-docs")
    sections: Any = settings  # the checker takes **settings for any of train_run's arguments
    check_run(plan, corpus, **sections)
    n_ranks = plan.n_ranks
    if n_ranks > 1 and place.index is not None:
        raise click.UsageError(f"device {place} is one GPU, and each of {n_ranks} ranks takes its own: --device cuda")
    if n_ranks > 1 and "RANK" not in os.environ:
        asked = " ".join(f"--{axis} {getattr(plan, axis)}" for axis in ("pp", "dp") if getattr(plan, axis) > 1)
        start = f"torchrun --standalone --nproc-per-node {n_ranks} -m minillm train {asked} ..."
        raise click.UsageError(f"{asked} needs {n_ranks} ranks, which torchrun starts: {start}")
    started = os.environ.get("WORLD_SIZE", "1")
    if n_ranks == 1 and "RANK" in os.environ and started != "1":  # each would train by itself, into the same folder
        cure = f"give --dp {started} or --pp {started}"
        raise click.UsageError(f"torchrun started {started} ranks to share the work: {cure}")
    backend = "nccl" if place.type == "cuda" else "gloo"
    with nullcontext() if n_ranks == 1 else initialize(backend=backend) as here:
        first = here is None or here.rank == 0
        if first:
            ranks = "" if n_ranks == 1 else f", on {n_ranks} ranks"
            click.echo(f"{preset} on {corpus}, in {folder}{ranks}")
        result = train_run(folder, corpus=corpus, parallel=plan, **sections)
    if first:
        _tell(folder, result, figures)
    if result.interrupted:
        raise SystemExit(130)


def _tell(folder: Path, result: "TrainingResult", figures: bool) -> None:
    from minillm.report import save_figures, summary, write
    from minillm.training.run import load_run

    click.echo(summary(result))
    if result.checkpoint is None:
        click.echo("Interrupted before the first step; the same command begins anew")
        return
    model, tokenizer = load_run(folder, device="cpu")
    if figures:
        for path in save_figures(folder, result, model, tokenizer):
            click.echo(f"saved {path}")
    if result.interrupted:
        click.echo(f"Interrupted at step {result.step}; the same command goes on from {result.checkpoint}")
        return
    click.echo(f'\nA sample (more: minillm sample {folder} --prompt "..."):\n')
    for piece in write(model, tokenizer, "The", max_new_tokens=120, temperature=0.5, seed=0):
        click.echo(piece, nl=False)
    click.echo()


@main.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--prompt", default="The", show_default=True, help="What the text begins with.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.8, show_default=True, help="0 is greedy.")
@click.option("--top-k", type=click.IntRange(min=1), help="Draw from the k likeliest tokens.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), help="Draw from the likeliest that reach p.")
@click.option("--seed", type=int, help="The same seed gives the same text.")
@click.option("--device", default="auto", show_default=True)
def sample(run: Path, prompt: str, device: str, **options: Any) -> None:
    """Write with the model of a RUN folder, token by token, until it ends the text.

    \b
    Example:  $ minillm sample runs/first --prompt "A class is" --temperature 0.5 --seed 1
    """
    from minillm.report import write
    from minillm.training.run import load_run

    for piece in write(*load_run(run, device), prompt, **options):
        click.echo(piece, nl=False)
    click.echo()


@main.group()
def tokenizer() -> None:
    """Train a tokenizer of any kind, and see how it cuts a text.

    \b
    Example:  $ minillm tokenizer train python-docs --vocab-size 1000 --out tokenizer.json
    """


@tokenizer.command("train")
@click.argument("corpus")
@click.option("--kind", default="byte-bpe", show_default=True, help="Such as wordpiece or unigram.")
@click.option("--vocab-size", type=int, default=8192, show_default=True)
@click.option("--pattern", help="How byte-bpe cuts the text first: gpt2 (if not given) or gpt4.")
@click.option(
    "--special",
    "special_tokens",
    multiple=True,
    metavar="TOKEN",
    help="A special token, such as '<|endoftext|>'; repeatable. If not given, those that the kind has by itself.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("tokenizer.json"), show_default=True)
@click.option("--force", is_flag=True, help="Overwrite the file if it is there.")
def tokenizer_train(corpus: str, kind: str, vocab_size: int, out: Path, force: bool, **options: Any) -> None:
    """Learn the vocabulary of CORPUS (a name, a text file or a folder) and save a tokenizer.json.

    Kinds: byte-bpe, wordpiece, unigram, sentencepiece-bpe, sentencepiece-unigram, word, character.

    \b
    Example:  $ minillm tokenizer train python-docs --vocab-size 1000 --out tokenizer.json --force
    """
    from minillm.data import load_corpus
    from minillm.tokenizers.loading import KINDS, train_tokenizer

    if kind not in KINDS:
        raise click.UsageError(f"--kind must be one of {', '.join(KINDS)}, got {kind}")
    if options["pattern"] and kind != "byte-bpe":
        raise click.UsageError(f"--pattern is for byte-bpe, not for {kind}")
    if out.exists() and not force:
        raise click.UsageError(f"{out} exists: choose another --out, or give --force to overwrite it")
    given = {name: value for name, value in options.items() if value}
    trained = train_tokenizer(kind, load_corpus(corpus), vocab_size, **given)
    out.parent.mkdir(parents=True, exist_ok=True)
    trained.save(out)
    click.echo(f"{out}: {trained.vocab_size} tokens, {len(trained.special_tokens)} of them special")


@tokenizer.command("encode")
@click.argument("file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.argument("text")
def tokenizer_encode(file: Path, text: str) -> None:
    """Show the token ids of TEXT ("-" reads the standard input) and the pieces that they stand for.

    \b
    Example:  $ minillm tokenizer encode tokenizer.json "the tokens of a text"
    """
    from minillm.tokenizers import ByteBPETokenizer, load_tokenizer

    trained = load_tokenizer(file)
    ids = trained.encode(sys.stdin.read() if text == "-" else text)
    click.echo(" ".join(map(str, ids)))
    if isinstance(trained, ByteBPETokenizer):  # whose files spell bytes: the text is easier to read
        click.echo("|".join(trained.token_bytes(token).decode("utf-8", "backslashreplace") for token in ids))
    else:
        click.echo("|".join(map(trained.id_to_token, ids)))


@main.group()
def exercises() -> None:
    """Check your answers, ask for hints, grade a class.

    \b
    Example:  $ minillm exercises check 02
    """


@exercises.command("build")
@click.argument("name", required=False)
@click.option("--execute", is_flag=True, help="Run the solved notebook first and save its outputs.")
@click.option("--force", is_flag=True, help="Overwrite a notebook that somebody has worked in; a copy is kept.")
def exercises_build(name: str | None, execute: bool, force: bool) -> None:
    """Write the student's notebook of exercise NAME, or of all exercises, from the solved ones.

    \b
    Example:  $ minillm exercises build 02
    """
    from minillm.exercises import build

    for path in build(name, execute=execute, force=force):
        click.echo(f"wrote {path}")


@exercises.command("check")
@click.argument("exercise")
@click.option("--seed", type=int, help="Of the random inputs.  [default: another each time]")
@click.option("--timeout", type=float, default=30, show_default=True, help="Seconds a cell.")
def exercises_check(exercise: str, seed: int | None, timeout: float) -> None:
    """Say how far your notebook of EXERCISE ("02", a name or a path) has come, part by part.

    \b
    Example:  $ minillm exercises check 02
    """
    from minillm.exercises import check

    report = check(exercise, seed=seed, timeout=timeout)
    click.echo(report.render())
    raise SystemExit(0 if report.passed else 1)


@exercises.command("hint")
@click.argument("part")
@click.option("--level", type=int, help="How many hints to show.  [default: 1]")
def exercises_hint(part: str, level: int | None) -> None:
    """Show a hint for a PART of an exercise, such as 2.1.

    \b
    Example:  $ minillm exercises hint 2.1 --level 2
    """
    from minillm.exercises import hint

    click.echo(hint(part, level))


@exercises.command("grade")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--exercise", help="Which exercise they answer.  [default: told from each notebook]")
@click.option("--output", type=click.Path(path_type=Path), default=Path("grades.csv"), show_default=True)
@click.option("--timeout", type=float, default=120, show_default=True, help="Seconds a submission.")
@click.option("--memory-mb", type=int, default=4096, show_default=True, help="Memory of a submission (Linux).")
@click.option("--jobs", type=int, default=1, show_default=True, help="Submissions at the same time.")
def exercises_grade(folder: Path, exercise: str | None, output: Path, **limits: Any) -> None:
    """Grade every notebook below FOLDER, hidden checks included, into a CSV file.

    \b
    Example:  $ minillm exercises grade submissions --exercise 02 --output grades.csv
    """
    from minillm.exercises import grade

    grades = grade(folder, exercise=exercise, output=output, **limits)
    click.echo(f"graded {len(grades.rows)} submissions into {grades.path}")
