"""Programs that torchrun starts: they meet, or end with one message; nobody waits for a rank that is gone."""

import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import minillm
from minillm.distributed import RankError, run_ranks
from minillm.distributed.startup import Started, StartupError, initialize
from minillm.distributed.startup_cards import Card, verdict

Outcome = tuple[str, Any]  # "returned" and the value, or the exception's class and its text


@pytest.fixture
def port() -> int:
    """A free one, below those that the system gives to whoever asks for any: tests beside this one do, all the time."""
    for number in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", number)):
            return number
    raise OSError("no free port between 20000 and 32000")


@pytest.fixture
def by_hand(port: int) -> Iterator[Callable[..., dict[int, Outcome | int]]]:
    """Starts processes as somebody does who sets the variables by hand; gives what became of each, by rank.

    They are forked, because that takes milliseconds: what they run does not know.
    """
    context = multiprocessing.get_context("fork")
    processes: list[Any] = []

    def start(
        program: Callable[[], object], ranks: list[int], *, world_size: int, **changes: str
    ) -> dict[int, Outcome | int]:
        lines = {}
        for rank in ranks:
            ours, theirs = context.Pipe(duplex=False)
            variables = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            variables |= {name.upper(): value for name, value in changes.items()}
            process = context.Process(target=_run, args=(program, variables, theirs))
            process.start()
            theirs.close()
            processes.append(process)
            lines[rank] = (process, ours)
        outcomes: dict[int, Outcome | int] = {}
        for rank, (process, line) in lines.items():
            try:
                outcomes[rank] = line.recv() if line.poll(30) else ("hangs", "")
            except EOFError:
                process.join()
                outcomes[rank] = process.exitcode
        return outcomes

    yield start
    for process in processes:
        process.join(10)
        hangs = process.is_alive()
        process.kill()
        process.join()
        assert not hangs


def _run(program: Callable[[], object], variables: dict[str, object], line: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update({name: str(value) for name, value in variables.items()})
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        line.send(("returned", program()))
    except Exception as error:
        line.send((type(error).__name__, str(error)))


def _meets() -> tuple[Started, float, bool]:
    with initialize(backend="gloo", timeout=20) as here:
        total = torch.tensor([1.0 + here.rank])
        dist.all_reduce(total)
        group = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))  # alive when the group is destroyed
        group(torch.ones(1, 2)).sum().backward()
    return here, total.item(), dist.is_initialized()


def test_ranks_meet_and_the_group_is_gone_afterwards(by_hand: Callable[..., Any]) -> None:
    outcomes = by_hand(_meets, [0, 1, 2], world_size=3)
    for rank in range(3):
        here = Started(rank, 3, rank, torch.device("cpu"), attempt=0)
        assert outcomes[rank] == ("returned", (here, 6.0, False))


def test_a_program_that_nobody_started_as_ranks_says_how_to(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StartupError, match="RANK is not set: start it with `torchrun --standalone"), initialize():
        pass
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(StartupError, match="RANK must be a number, got 'first'"), initialize():
        pass
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StartupError, match=r"RANK must be in 0 \.\.\. 1"), initialize():
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"backend": "smoke"}, "backend must be None or one of"), ({"timeout": 0}, "timeout must be above 0")],
)
def test_arguments_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message), initialize(**arguments):
        pass


def _hurried() -> None:
    with initialize(backend="gloo", timeout=1.0):
        pass


def test_a_taken_port_is_named_with_the_cure(by_hand: Callable[..., Any], port: int) -> None:
    with socket.create_server(("127.0.0.1", port)):  # takes connections, and says nothing
        outcomes = by_hand(_hurried, [0, 1], world_size=2)
    assert outcomes[0][0] == "StartupError"
    assert f"port {port} is taken on this machine (EADDRINUSE)" in outcomes[0][1]
    assert "`torchrun --standalone`" in outcomes[0][1]
    assert outcomes[1][0] == "StartupError"
    assert "what listens there is not the ranks' store" in outcomes[1][1]


def test_a_missing_rank_is_named_on_every_rank_that_is_there(by_hand: Callable[..., Any]) -> None:
    outcomes = by_hand(_hurried, [0, 2], world_size=4)
    for rank in (0, 2):
        kind, message = outcomes[rank]
        assert kind == "StartupError"
        assert "ranks 1 and 3 of 4 did not come within 1 s (here: ranks 0 and 2 on" in message


def test_a_missing_rank_0_is_named(by_hand: Callable[..., Any]) -> None:
    kind, message = by_hand(_hurried, [1], world_size=2)[1]
    assert kind == "StartupError"
    assert message.startswith("rank 0 has not come within 1 s: nothing answers at 127.0.0.1:")


def _newer_on_rank_2() -> None:
    if os.environ["RANK"] == "2":
        minillm.__version__ = "9.9"
    with initialize(backend="gloo", timeout=20):
        pass


def test_other_versions_are_named_with_their_ranks(by_hand: Callable[..., Any]) -> None:
    ours = minillm.__version__
    for kind, message in by_hand(_newer_on_rank_2, [0, 1, 2], world_size=3).values():
        assert kind == "StartupError"
        assert f"the ranks differ in minillm: {ours} on ranks 0 and 1, 9.9 on rank 2; install the same" in message


def test_a_rank_that_comes_twice_is_told(by_hand: Callable[..., Any]) -> None:
    outcomes = by_hand(_hurried, [0, 1], world_size=2, rank="0", torchelastic_use_agent_store="False")
    # One of the two has the port, and the other one finds it taken.
    assert sorted(message.split(" of ")[0].split(" is ")[0][:4] for _, message in outcomes.values()) == ["port", "rank"]


def test_a_verdict_names_every_trouble_at_once() -> None:
    fine = Card("2.13.0", "0.1.0", "nccl", 3, "a", None)
    assert verdict({0: fine, 1: fine, 2: fine}, 3, 60) == ""
    other = Card("2.12.1", "0.1.0", "gloo", 4, "b", "needs GPU 7 and sees 4")
    said = verdict({0: fine, 2: other}, 3, 60)
    for part in (
        "rank 1 of 3 did not come within 60 s (here: rank 0 on a; rank 2 on b)",
        "rank 2 on b needs GPU 7 and sees 4",
        "WORLD_SIZE: 3 on rank 0, 4 on rank 2",
        "torch: 2.13.0 on rank 0, 2.12.1 on rank 2",
        "backend: nccl on rank 0, gloo on rank 2",
    ):
        assert part in said


def _one_is_killed() -> None:
    with initialize(backend="gloo", timeout=20) as here:
        dist.all_reduce(torch.ones(1))
        if here.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))


def test_when_a_rank_is_killed_the_others_end_and_name_it(by_hand: Callable[..., Any]) -> None:
    outcomes = by_hand(_one_is_killed, [0, 1, 2], world_size=3)
    assert outcomes[1] == -signal.SIGKILL
    for rank in (0, 2):
        kind, message = outcomes[rank]
        assert kind == "RankError"
        assert message.startswith("rank 1 ended without a word: it was killed")
        assert f"rank {rank} cannot go on without it" in message


def _the_store_is_killed() -> None:
    with initialize(backend="gloo", timeout=20) as here:
        if here.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.barrier()


def test_when_rank_0_is_killed_the_store_goes_with_it(by_hand: Callable[..., Any]) -> None:
    outcomes = by_hand(_the_store_is_killed, [0, 1, 2], world_size=3)
    for rank in (1, 2):
        assert outcomes[rank][0] == "RankError"
        assert outcomes[rank][1].startswith("rank 0 ended without a word")


def _one_raises() -> None:
    with initialize(backend="gloo", timeout=20) as here:
        if here.rank == 0:
            raise ValueError("the data of rank 0 is not there")


def test_when_a_rank_raises_the_others_say_what_it_said(by_hand: Callable[..., Any]) -> None:
    outcomes = by_hand(_one_raises, [0, 1, 2], world_size=3)
    assert outcomes[0] == ("ValueError", "the data of rank 0 is not there")
    for rank in (1, 2):
        assert outcomes[rank][0] == "RankError"
        assert outcomes[rank][1].startswith("rank 0 failed: ValueError: the data of rank 0 is not there; rank")


def test_a_group_in_a_group_is_refused() -> None:
    def inside() -> None:
        with initialize():
            pass

    with pytest.raises(RankError, match="is in a process group already"):
        run_ranks(inside, 1)


_PROGRAM = """
import os, sys
import torch, torch.distributed as dist
from minillm.distributed.startup import initialize

with initialize(backend="gloo", timeout=60) as here:
    total = torch.tensor([here.rank + 1])
    dist.all_reduce(total)
    if here.attempt == 0 and here.rank == 1:
        os._exit(3)
    dist.barrier()
    # One write: torchrun starts python unbuffered, and print writes the end of the line by itself.
    sys.stdout.write(f"attempt {here.attempt} rank {here.rank} of {here.world_size}: {total.item()}\\n")
"""


def test_torchrun_starts_it_and_starts_it_again(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(_PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("RANK", "WORLD", "MASTER"))}
    done = subprocess.run(
        [*command, "--max-restarts", "1", str(program)],
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
        env={**variables, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert sorted(filter(None, done.stdout.split("\n"))) == ["attempt 1 rank 0 of 2: 3", "attempt 1 rank 1 of 2: 3"]
