"""Real processes as ranks: what comes back, what is said when one fails, and that none is ever left."""

import multiprocessing
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

import nbformat
import pytest
import torch
import torch.distributed as dist
from nbclient import NotebookClient
from torch import nn

from minillm.distributed import RankError, run_ranks, simulate_ranks


def _children() -> set[str]:
    """Processes that this one has started, running or not waited for."""
    return {pid for tasks in Path("/proc/self/task").glob("*/children") for pid in tasks.read_text().split()}


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    before, threads = _children(), threading.active_count()
    yield
    assert _children() <= before
    assert threading.active_count() == threads


def _sum_of_ranks() -> float:
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    return total.item()


def test_runs_in_an_initialised_group_and_gives_results_by_rank() -> None:
    assert run_ranks(lambda: (dist.get_rank(), dist.get_world_size(), dist.get_backend()), 3) == [
        (0, 3, "gloo"),
        (1, 3, "gloo"),
        (2, 3, "gloo"),
    ]
    assert run_ranks(_sum_of_ranks, 4) == [10.0] * 4
    assert run_ranks(_sum_of_ranks, 1) == [1.0]


def test_functions_see_what_stands_around_them_and_cannot_change_it() -> None:
    seen, weight = [1], torch.ones(2)

    def scale(factor: float, bias: torch.Tensor) -> torch.Tensor:
        seen.append(2)
        weight.mul_(factor).add_(bias)
        return weight

    for result in run_ranks(scale, 2, 3.0, torch.ones(2)):
        assert result.tolist() == [4.0, 4.0]
    assert seen == [1]
    assert weight.tolist() == [1.0, 1.0]


def test_generators_start_as_in_the_simulator() -> None:
    def draw() -> torch.Tensor:
        return torch.rand(3)

    drawn = run_ranks(draw, 3, seed=7)
    for rank, (real, simulated) in enumerate(zip(drawn, simulate_ranks(draw, 3, seed=7).results, strict=True)):
        wanted = torch.rand(3, generator=torch.Generator().manual_seed(7 + rank))
        torch.testing.assert_close(real, wanted, rtol=0, atol=0)
        torch.testing.assert_close(simulated, wanted, rtol=0, atol=0)


def test_tensors_come_by_value() -> None:
    def make() -> dict[str, Any]:
        layer = nn.Linear(3, 2, dtype=torch.bfloat16)
        layer.register_parameter("tied", layer.weight)
        out = layer(torch.ones(3, dtype=torch.bfloat16))
        return {"state": layer.state_dict(), "out": out, "ids": torch.arange(4)[::2], "none": torch.empty(0, 5)}

    one, two = run_ranks(make, 2)
    assert one["out"].requires_grad
    assert one["out"].is_leaf
    assert one["ids"].tolist() == [0, 2]
    assert one["none"].shape == (0, 5)
    state = one["state"]
    assert state["weight"].dtype == torch.bfloat16
    assert state["weight"].data_ptr() == state["tied"].data_ptr()  # what shared storage still does
    assert not state["weight"].is_shared()  # memory of its own, no file that the process which is gone had opened
    before = two["state"]["weight"].clone()
    state["weight"].zero_()
    torch.testing.assert_close(two["state"]["weight"], before)


def test_backward_works_after_the_parent_has_used_threads_for_it() -> None:
    def train() -> torch.Tensor:
        x = torch.randn(256, 256, requires_grad=True)
        model = nn.parallel.DistributedDataParallel(nn.Linear(256, 8))
        model(x @ x).square().mean().backward()
        return next(model.parameters()).grad

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        x = torch.randn(256, 256, requires_grad=True)
        (x @ x).relu().sum().backward()
        one, two = run_ranks(train, 2, timeout=60)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_can_be_called_beside_other_threads_and_from_one() -> None:
    stop, results = threading.Event(), []

    def work() -> None:
        while not stop.is_set():
            sum(range(1000))

    busy = [threading.Thread(target=work) for _ in range(2)]
    caller = threading.Thread(target=lambda: results.append(run_ranks(_sum_of_ranks, 2, timeout=60)))
    for thread in [*busy, caller]:
        thread.start()
    caller.join()
    stop.set()
    for thread in busy:
        thread.join()
    assert results == [[3.0, 3.0]]


def test_python_s_warning_about_forks_beside_threads_reaches_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    fork = os.fork

    def warn() -> int:  # as Python 3.12 does
        said = f"This process (pid={os.getpid()}) is multi-threaded, use of fork() may lead to deadlocks in the child."
        warnings.warn(said, DeprecationWarning, stacklevel=2)
        return fork()

    monkeypatch.setattr(os, "fork", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_ranks(dist.get_rank, 2) == [0, 1]


def test_what_ranks_print_is_printed_here_in_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    def speak() -> None:
        for part in ("rank ", str(dist.get_rank()), "\n", "no newline"):
            print(part, end="")
        print("to stderr", file=sys.stderr)

    run_ranks(speak, 3)
    printed = capsys.readouterr()
    assert all(f"rank {rank}\n" in printed.out for rank in range(3))
    assert printed.out.count("no newline") == 3
    assert printed.err == "to stderr\n" * 3


def test_the_first_failure_is_raised_with_its_rank() -> None:
    def fail() -> None:
        if dist.get_rank() == 1:
            print("before")
            raise KeyError("no such layer")
        dist.barrier()  # these fail too, because rank 1 is gone

    with pytest.raises(RankError, match="rank 1 failed: KeyError: 'no such layer'") as caught:
        run_ranks(fail, 3)
    error = caught.value
    assert (error.rank, error.error_type) == (1, "KeyError")
    assert isinstance(error.__cause__, KeyError)
    assert 'raise KeyError("no such layer")' in error.traceback_text
    assert "process_entry" not in error.traceback_text
    assert str(error).endswith(error.traceback_text.rstrip())


def test_an_exception_that_cannot_be_sent_is_told() -> None:
    class OddError(Exception):
        def __init__(self, one: int, two: int) -> None:
            super().__init__(f"{one} and {two}")

    def fail() -> None:
        raise OddError(1, 2)

    with pytest.raises(RankError, match=r"failed: .*OddError: 1 and 2") as caught:
        run_ranks(fail, 2)
    assert caught.value.error_type == "OddError"
    assert caught.value.__cause__ is None


def test_a_result_that_cannot_be_sent_is_told() -> None:
    with pytest.raises(RankError, match="failed: TypeError: the result, of type function, cannot be sent"):
        run_ranks(lambda: lambda: 1, 1)


def test_leaving_is_failing() -> None:
    with pytest.raises(RankError, match="rank 0 failed: SystemExit: 0"):
        run_ranks(lambda: sys.exit(0), 1)


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), r"^rank 2 was killed by signal 9 \(SIGKILL\)$"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), r"^rank 2 was killed by signal 15 \(SIGTERM\)$"),
        (lambda: os._exit(3), "^rank 2 ended with exit code 3 before its function returned$"),
    ],
)
def test_a_rank_that_dies_is_named_and_the_others_are_ended(end: Callable[[], None], message: str) -> None:
    def die() -> None:
        if dist.get_rank() == 2:
            end()
        dist.recv(torch.ones(1), (dist.get_rank() + 1) % 2)  # ranks 0 and 1 wait for each other

    with pytest.raises(RankError, match=message) as caught:
        run_ranks(die, 3)
    assert (caught.value.rank, caught.value.error_type) == (2, None)


def test_a_rank_that_returns_too_early_is_named() -> None:
    def leave() -> None:
        if dist.get_rank() != 1:
            dist.barrier()

    with pytest.raises(RankError, match="rank 1 had returned by then: does every rank call the same collectives"):
        run_ranks(leave, 3)


def test_after_the_time_it_says_who_has_not_finished_and_where() -> None:
    def hang() -> None:
        if dist.get_rank() == 1:
            return
        if dist.get_rank() == 3:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.recv(torch.ones(1), 2 - dist.get_rank())  # ranks 0 and 2

    with pytest.raises(TimeoutError, match=r"^ranks 0, 2 and 3 of 4 had not finished after 0\.75 s") as caught:
        run_ranks(hang, 4, timeout=0.75)
    said = str(caught.value)
    assert "ranks 0 and 2 stood here:" in said
    assert "dist.recv(torch.ones(1), 2 - dist.get_rank())" in said
    assert "rank 3 stood here:\n  no answer" in said


def test_an_interrupt_ends_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupting:
        def write(self, text: str) -> int:
            raise KeyboardInterrupt

        def flush(self) -> None:
            pass

    def speak() -> None:
        print("all are there")
        dist.recv(torch.ones(1), 1 - dist.get_rank())

    monkeypatch.setattr(sys, "stdout", Interrupting())
    with pytest.raises(KeyboardInterrupt):
        run_ranks(speak, 2)


def _gone(pids: list[int]) -> bool:
    """Whether the processes end within some seconds; they are nobody's children here."""
    for pid in pids:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if not select.select([handle], [], [], 20)[0]:
                return False
        finally:
            os.close(handle)
    return True


def test_what_a_rank_has_started_ends_with_it() -> None:
    def start() -> int:
        pid = subprocess.Popen(["sleep", "600"]).pid
        dist.barrier()
        return pid

    assert _gone(run_ranks(start, 2))


def test_ranks_end_when_the_process_that_called_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # its folder stays: nobody is left to remove it
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def stay() -> None:
        started = subprocess.Popen(["sleep", "600"])
        theirs.send([os.getpid(), started.pid])
        dist.recv(torch.ones(1), 1 - dist.get_rank())

    caller = multiprocessing.get_context("fork").Process(target=run_ranks, args=(stay, 2))
    caller.start()
    pids = [pid for _ in range(2) for pid in ours.recv()]
    caller.kill()
    caller.join()
    assert _gone(pids)
    ours.close()
    theirs.close()


@pytest.fixture
def _cuda_in_use(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    yield
    forkserver._forkserver._stop()  # they would live as long as this process
    resource_tracker._resource_tracker._stop()


@pytest.mark.usefixtures("_cuda_in_use")
def test_where_cuda_is_in_use_fresh_processes_import_the_function(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_ranks(dist.get_rank, 2) == [0, 1]
    weight = torch.ones(2)
    (doubled,) = run_ranks(torch.mul, 1, weight, 2)
    assert doubled.tolist() == [2.0, 2.0]
    run_ranks(print, 2, "printed in a rank")
    assert capsys.readouterr().out == "printed in a rank\n" * 2
    with pytest.raises(ValueError, match=r"fn and args must be such that they can be pickled.*Put the function"):
        run_ranks(lambda: 1, 2)

    def cell() -> None:
        pass

    cell.__module__ = "__main__"
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)  # a worker of xdist has none
    with pytest.raises(ValueError, match="fn must stand in a file, got one defined in a notebook cell"):
        run_ranks(cell, 2)


def test_works_in_a_notebook_cell(tmp_path: Path) -> None:
    cells = [
        "import torch, torch.distributed as dist\nfrom minillm.distributed import RankError, run_ranks\n"
        "(torch.ones(4, requires_grad=True) * 2).sum().backward()",
        "def mean(scale):\n    print('rank', dist.get_rank())\n    x = torch.tensor([scale * dist.get_rank()])\n"
        "    dist.all_reduce(x)\n    return x.item()\nrun_ranks(mean, 4, 2.0)",
        "def wrong():\n    assert dist.get_rank() != 1, 'a mistake in a cell'\n    dist.barrier()\n"
        "try:\n    run_ranks(wrong, 2)\nexcept RankError as error:\n    print(error)",
        "import multiprocessing\nmultiprocessing.active_children()",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = notebook.cells[1].outputs
    printed = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    assert sorted(printed.splitlines()) == [f"rank {rank}" for rank in range(4)]
    assert outputs[-1]["data"]["text/plain"] == "[12.0, 12.0, 12.0, 12.0]"
    (failed,) = notebook.cells[2].outputs
    assert "rank 1 failed: AssertionError: a mistake in a cell" in failed["text"]
    assert "assert dist.get_rank() != 1, 'a mistake in a cell'" in failed["text"]
    assert notebook.cells[3].outputs[0]["data"]["text/plain"] == "[]"


def test_a_rank_cannot_start_ranks() -> None:
    with pytest.raises(RankError, match="run_ranks starts a process group of its own, and this process is in one"):
        run_ranks(lambda: run_ranks(dist.get_rank, 1), 1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"fn": 3}, TypeError, "fn must be a function"),
        ({"world_size": 0}, ValueError, "world_size must be at least 1, got 0"),
        ({"world_size": 2.0}, TypeError, "world_size must be an integer"),
        ({"seed": None}, TypeError, "seed must be an integer"),
        ({"timeout": 0}, ValueError, "timeout must be above 0"),
        ({"timeout": "long"}, TypeError, "timeout must be a number of seconds"),
        ({"backend": "pigeon"}, ValueError, "backend must be one of gloo, nccl"),
        ({"backend": "nccl", "world_size": 99}, ValueError, "needs a GPU for each rank: world_size is 99"),
    ],
)
def test_arguments_are_checked_at_the_door(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"fn": dist.get_rank, "world_size": 2, **arguments}
    with pytest.raises(error, match=message):
        run_ranks(given.pop("fn"), given.pop("world_size"), **given)
