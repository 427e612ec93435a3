"""`minillm train --dp N`: several ranks, by torchrun and by hand, and what is said when they are not there."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

Cli = Callable[..., Result]
Refused = Callable[..., str]
PROGRAM = (sys.executable, "-m", "minillm", "train")
TORCHRUN = (
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc-per-node",
    "2",
    "-m",
    "minillm",
    "train",
)


def curve(folder: Path) -> list[tuple[int, float, float | None]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], round(line["loss"], 4), line.get("validation_loss")) for line in lines]


@pytest.fixture
def options(corpus: Path, small: tuple[str, ...]) -> tuple[str, ...]:
    return ("--corpus", str(corpus), "--steps", "4", "--device", "cpu", "--set", "training.precision=fp32", *small)


@pytest.fixture
def expected(cli: Cli, options: tuple[str, ...], tmp_path: Path) -> list[tuple[int, float, float | None]]:
    assert cli("train", "--out", "one", *options).exit_code == 0
    return curve(tmp_path / "one")


def assert_same(actual: list[tuple[int, float, float | None]], expected: list[tuple[int, float, float | None]]) -> None:
    assert [line[0] for line in actual] == [line[0] for line in expected]
    for (_, loss, validation), (_, loss_there, validation_there) in zip(actual, expected, strict=True):
        assert loss == pytest.approx(loss_there, abs=2e-4)
        assert validation == pytest.approx(validation_there, abs=2e-4)


def test_torchrun_and_zero_3_give_the_curve_of_one_process(
    options: tuple[str, ...], expected: list[tuple[int, float, float | None]], tmp_path: Path
) -> None:
    command = (*TORCHRUN, "--dp", "2", "--zero", "3", "--out", "two", *options)
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False)

    assert result.returncode == 0, result.stderr
    assert result.stdout.count("in two, on 2 ranks") == 1, "the first rank alone speaks"
    assert result.stdout.count("loss at step 4") == 1
    assert_same(curve(tmp_path / "two"), expected)


def test_pytorchs_engine_gives_the_same_curve_and_one_process_goes_on(
    cli: Cli, options: tuple[str, ...], expected: list[tuple[int, float, float | None]], tmp_path: Path
) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = (*PROGRAM, "--dp", "2", "--zero", "3", "--engine", "torch", "--out", "two", *options)
    ranks = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env=os.environ | here | {"RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [rank.communicate(timeout=240) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()

    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert said[1][0] == "", "the first rank alone speaks"
    assert_same(curve(tmp_path / "two"), expected)
    result = cli("train", "--out", "two", *options, "--steps", "5")
    assert result.exit_code == 0, result.output
    assert [line[0] for line in curve(tmp_path / "two")] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ("--dp", "3"),
            "--dp 3 needs 3 ranks, which torchrun starts: torchrun --standalone --nproc-per-node 3 -m minillm",
        ),
        (("--dp", "0"), "dp must be at least 1, got 0"),
        (("--dp", "2", "--zero", "4"), "zero must be 0 to 3, got 4"),
        (("--zero", "1"), "need more than one rank: dp is 1"),
        (("--dp", "2", "--engine", "horovod"), "engine must be one of minillm, torch, got 'horovod'"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(refused: Refused, given: tuple[str, ...], words: str) -> None:
    assert words in refused(*given)


def test_ranks_without_a_plan_are_told_how_to_share_the_work(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that another process is training into the folder: that would be the rank beside it."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "torchrun started 4 ranks to share the work: give --dp 4 or --pp 4" in refused()


def test_one_gpu_is_not_for_several_ranks(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    words = "device cuda:1 is one GPU, and each of 2 ranks takes its own: --device cuda"
    assert words in refused("--dp", "2", "--device", "cuda:1")
