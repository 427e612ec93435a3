"""`minillm train --pp N`: a pipeline by torchrun, and what is said where there cannot be one."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

Cli = Callable[..., Result]
Refused = Callable[..., str]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def curve(folder: Path) -> list[tuple[int, float, float | None]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line.get("validation_loss")) for line in lines]


def test_torchrun_gives_the_curve_of_one_process_which_goes_on(
    cli: Cli, corpus: Path, small: tuple[str, ...], tmp_path: Path
) -> None:
    options = ("--corpus", str(corpus), "--device", "cpu", "--set", "training.precision=fp32", *small)
    options += ("--set", "data.batch_size=4", "--set", "model.n_layers=2")
    assert cli("train", "--out", "one", *options, "--steps", "4").exit_code == 0
    command = (*TORCHRUN, "-m", "minillm", "train", "--pp", "2", "--schedule", "interleaved", "--chunks", "2")

    result = subprocess.run(
        (*command, "--micro-batches", "4", "--out", "two", *options, "--steps", "4"),
        capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False,
    )  # fmt: skip

    assert result.returncode == 0, result.stderr
    assert result.stdout.count("in two, on 2 ranks") == 1, "the first rank alone speaks"
    assert result.stdout.count("loss at step 4") == 1
    assert "A sample (more: minillm sample two" in result.stdout
    expected = curve(tmp_path / "one")
    for (step, loss, validation), (_, loss_there, validation_there) in zip(
        curve(tmp_path / "two"), expected, strict=True
    ):
        assert loss == pytest.approx(loss_there, abs=2e-4), step
        assert validation == pytest.approx(validation_there, abs=2e-4), step
    assert cli("train", "--out", "two", *options, "--steps", "5").exit_code == 0
    assert [line[0] for line in curve(tmp_path / "two")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ("--pp", "2", "--dp", "2", "--set", "data.batch_size=8"),
            "--pp 2 --dp 2 needs 4 ranks, which torchrun starts: torchrun --standalone --nproc-per-node 4 -m minillm "
            "train --pp 2 --dp 2 ...",
        ),
        (("--pp", "2", "--schedule", "zigzag"), "schedule must be one of naive, gpipe, 1f1b, interleaved"),
        (("--pp", "2", "--schedule", "pipedream"), "use minillm.distributed.pipeline in your own loop"),
        (("--pp", "2", "--chunks", "2"), "interleaved or breadth-first"),
        (("--pp", "2", "--zero", "1"), "zero=1 and pp=2 do not go together"),
        (("--pp", "2", "--micro-batches", "3"), "the nearest batch_size that will do is 15 or 18, the nearest"),
        (("--pp", "64", "--micro-batches", "8"), "this one has 4 (with its embedding and head): the nearest pp"),
        (("--pp", "2", "--schedule", "dualpipe", "--micro-batches", "4", "--engine", "torch"), "take one of gpipe"),
        (("--micro-batches", "4"), "micro_batches=4 is for pipelines: pp is 1"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(refused: Refused, given: tuple[str, ...], words: str) -> None:
    assert words in refused(*given)
