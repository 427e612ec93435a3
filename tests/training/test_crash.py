"""Whatever stops a run at whatever moment, going on with it gives the run that was never stopped, bit for bit."""

import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minillm.data import TokenDataset
from minillm.training import checkpoint_steps, load_checkpoint


class Server:
    """The other end of crash_server.py."""

    def __init__(self, process: subprocess.Popen[str], data: Path) -> None:
        self.process, self.data = process, data

    def run(self, folder: Path, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"folder": str(folder), "data": str(self.data), "steps": 4, "every": 2, "keep": 1} | request
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        reply: dict[str, Any] = json.loads(self.process.stdout.readline())
        assert reply.get("ended") != "failed", "the child raised an error; see the captured stderr"
        return reply


class Bytes:
    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    data = tmp_path_factory.mktemp("crash") / "data"
    generator = random.Random(0)
    documents = ["".join(generator.choices("abcdefgh ", k=60)) for _ in range(40)]
    TokenDataset.write(data, documents, Bytes(), validation_fraction=0.3)
    script = Path(__file__).with_name("crash_server.py")
    with subprocess.Popen(
        [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield Server(process, data)
        assert process.stdin is not None
        process.stdin.close()


def outcome(folder: Path) -> dict[str, Any]:
    """All that a finished run leaves, without what time does to it."""
    (step,) = checkpoint_steps(folder / "checkpoints")[-1:]
    newest = folder / "checkpoints" / f"step_{step:08d}"
    state = load_checkpoint(folder / "checkpoints").state
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "parameters": (newest / "model.safetensors").read_bytes(),
        "moments": (newest / "optimizer.safetensors").read_bytes(),
        "data": state["data"],
        "rng": state["rng"],
        "steps": checkpoint_steps(folder / "checkpoints"),
        "leftovers": [path.name for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")],
        "lines": [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines],
    }


def test_killed_at_every_moment(server: Server, tmp_path: Path) -> None:
    short = {"steps": 2, "every": 1}
    whole = server.run(tmp_path / "whole", **short)
    assert whole["ended"] == "finished"
    expected = outcome(tmp_path / "whole")
    assert expected["steps"] == [2]
    assert expected["leftovers"] == []
    for tick in range(1, whole["ticks"] + 1):
        folder = tmp_path / "killed"
        assert server.run(folder, **short, tick=tick, action="kill")["signal"] == signal.SIGKILL
        before = checkpoint_steps(folder / "checkpoints")
        if before:
            assert load_checkpoint(folder / "checkpoints").step == before[-1]
        assert server.run(folder, **short)["ended"] == "finished"
        assert outcome(folder) == expected, f"killed at moment {tick}"
        shutil.rmtree(folder)


def test_killed_again_and_again(server: Server, tmp_path: Path) -> None:
    long = {"steps": 20, "every": 3, "keep": 2}
    whole = server.run(tmp_path / "whole", **long)
    generator = random.Random(7)
    kills = 0
    for _ in range(60):
        reply = server.run(tmp_path / "killed", **long, tick=generator.randint(1, whole["ticks"] // 3), action="kill")
        kills += reply["signal"] == signal.SIGKILL
        if reply["signal"] == 0:
            break
    assert kills >= 3
    assert server.run(tmp_path / "killed", **long)["ended"] == "finished"
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.parametrize("action", ["interrupt", "interrupt twice"])
def test_interrupted(server: Server, tmp_path: Path, action: str) -> None:
    whole = server.run(tmp_path / "whole")
    expected = outcome(tmp_path / "whole")
    for tick in range(1, whole["ticks"] + 1, 8):
        folder = tmp_path / "interrupted"
        reply = server.run(folder, tick=tick, action=action)
        assert reply["signal"] == 0
        saved = checkpoint_steps(folder / "checkpoints")
        if action == "interrupt twice" or tick == 1:
            assert reply["ended"] == "forced"
        elif reply["ended"] == "interrupted":
            assert 1 <= saved[-1] < 4
        else:
            assert saved == [4]
        resumed = server.run(folder)
        assert resumed["ended"] == "finished"
        got = outcome(folder)
        # Ctrl-C adds a line of metrics at the step it came in, and does not wait for that step's evaluation.
        del got["lines"]
        assert got == {key: value for key, value in expected.items() if key != "lines"}, f"{action} at moment {tick}"
        shutil.rmtree(folder)


CHILD = """
import sys
from minillm.data import TokenDataset
from minillm.models import Transformer, TransformerConfig
from minillm.training import Trainer, TrainingConfig
data = TokenDataset(sys.argv[1], context_length=8, batch_size=4)
model = Transformer(TransformerConfig(vocab_size=256, context_length=8, d_model=8, n_layers=1, n_heads=2))
config = TrainingConfig(max_steps=10**6, log_every=1, checkpoint_every=None, device="cpu", precision="fp32")
trainer = Trainer(model, data, None, config, folder=sys.argv[2], progress=False,
                  on_log=lambda line: line["step"] == 3 and print("ready", flush=True))
result = trainer.train()
print("interrupted" if result.interrupted else "finished", result.step, flush=True)
"""


def test_ctrl_c_from_outside_saves_and_ends_well(server: Server, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(server.data), str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    word, step = output.split()
    assert word == "interrupted"
    assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [int(step)]
    assert "Traceback" not in errors
    assert "stopping after this step" in errors
