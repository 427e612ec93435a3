"""A process that trains in forked children and stops them at a chosen moment; the tests talk to it in JSON lines.

Importing torch takes seconds and a fork takes milliseconds, so one such process serves hundreds of kills.

A moment (a "tick") is anything after which the disk or the run is in another state: every file system call by which
Python changes something below the run's folder, every fsync, both sides of a tensor file's writing and its middle,
every forward pass and every optimizer step. A child counts the ticks, and at the one it was told to it kills or
interrupts itself.

A request: {"folder", "data", "steps", "every", "keep", "tick", "action"}; action: null, "kill", "interrupt" (Ctrl-C) or
"interrupt twice". The answer: {"signal": the one that ended the child or 0, "ticks": seen, "ended": how train() did}.
"""

import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what the first optimizer step would import, in every child

from minillm.data import TokenDataset
from minillm.models import Transformer, TransformerConfig
from minillm.training import Trainer, TrainingConfig, checkpoint

CONTEXT_LENGTH, BATCH_SIZE = 8, 4
AUDITED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree")


class Ticker:
    def __init__(self, folder: str, tick: int, action: str | None) -> None:
        self.folder, self.tick, self.action, self.count = folder, tick, action, 0

    def __call__(self, *_: Any) -> None:
        self.count += 1
        if self.count != self.tick or self.action is None:
            return
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in self.action.split():  # one signal a word
            os.kill(os.getpid(), signal.SIGINT)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in AUDITED and str(arguments[0]).startswith(self.folder):
            reads = event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if not reads:
                self()


def install(ticker: Ticker, model: torch.nn.Module, trainer: Trainer) -> None:
    sys.addaudithook(ticker.audit)
    fsync, save_file = os.fsync, checkpoint.save_file

    def ticking_fsync(descriptor: int) -> None:
        ticker()
        fsync(descriptor)

    def ticking_save_file(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata=metadata)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        ticker()
        path.write_bytes(content)
        ticker()

    os.fsync, checkpoint.save_file = ticking_fsync, ticking_save_file
    model.register_forward_pre_hook(ticker)
    trainer.optimizer.register_step_pre_hook(ticker)
    trainer.optimizer.register_step_post_hook(ticker)


def child(request: dict[str, Any]) -> dict[str, Any]:
    config = TransformerConfig(
        vocab_size=256, context_length=CONTEXT_LENGTH, d_model=8, n_layers=1, n_heads=2, dropout=0.2
    )
    torch.manual_seed(1)
    model = Transformer(config)
    train, validation = (
        TokenDataset(request["data"], split, context_length=CONTEXT_LENGTH, batch_size=BATCH_SIZE)
        for split in ("train", "validation")
    )
    settings = TrainingConfig(
        max_steps=request["steps"],
        learning_rate=1e-2,
        checkpoint_every=request["every"],
        keep_checkpoints=request["keep"],
        eval_every=3,
        eval_batches=2,
        log_every=2,
        gradient_accumulation_steps=2,
        precision="fp32",
        device="cpu",
    )
    trainer = Trainer(model, train, validation, settings, folder=request["folder"], progress=False)
    ticker = Ticker(request["folder"], request.get("tick", 0), request.get("action"))
    install(ticker, model, trainer)
    try:
        ended = "interrupted" if trainer.train().interrupted else "finished"
    except KeyboardInterrupt:
        ended = "forced"
    return {"ticks": ticker.count, "ended": ended}


def serve() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for line in sys.stdin:
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            status = 1
            try:
                os.close(reading)
                # Of a shell's background job it would be ignored.
                signal.signal(signal.SIGINT, signal.default_int_handler)
                answer = json.dumps(child(json.loads(line))).encode()
                os.write(writing, answer)
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(process, 0)
        reply = {"signal": os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0}
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            reply["ended"] = "failed"
        print(json.dumps(reply | (json.loads(answer) if answer else {})), flush=True)


if __name__ == "__main__":
    serve()
