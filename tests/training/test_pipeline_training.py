"""Training through a pipeline: the loss curve, the parameters and the checkpoints of one process, by any plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.distributed import simulate_ranks
from minillm.distributed.pipeline import SCHEDULES
from minillm.models import Transformer, TransformerConfig
from minillm.training import Trainer, TrainingConfig, load_checkpoint
from minillm.training.loss import IGNORED
from minillm.training.parallel import ParallelPlan
from minillm.training.plan import TORCH_SCHEDULES

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")


class Rows:
    """Batches of 8 rows, every second one without targets in its last rows; an evaluation of uneven ones."""

    n_tokens = n_bytes = 100

    def __init__(self, rows: int = 8) -> None:
        self.position, self.rows = 0, rows

    def next_batch(self) -> tuple[Tensor, Tensor]:
        self.position += 1
        return self._batch(self.position, self.rows)

    def evaluation_batches(self, max_batches: int | None = None) -> Any:
        return iter([self._batch(-1, 8), self._batch(-2, 5), self._batch(-3, 1)])

    def _batch(self, number: int, rows: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 + number)
        ids = torch.randint(0, 17, (rows, 8), generator=generator)
        targets = ids.roll(-1, 1)
        if number % 2 == 0:
            targets[rows // 2 + 1 :] = IGNORED
        return ids, targets

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def make_model(**settings: Any) -> Transformer:
    torch.manual_seed(3)
    shape = {"vocab_size": 17, "context_length": 8, "d_model": 16, "n_layers": 4, "n_heads": 2, "dropout": 0.0}
    return Transformer(TransformerConfig(**(shape | settings))).double()


def make_config(**settings: Any) -> TrainingConfig:
    defaults: dict[str, Any] = {
        "max_steps": 4,
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "min_learning_rate": 0.01,
        "grad_clip": 0.5,
        "gradient_accumulation_steps": 2,
        "eval_every": 2,
        "checkpoint_every": 2,
        "log_every": 1,
        "precision": "fp32",
        "device": "cpu",
    }
    return TrainingConfig(**(defaults | settings))


def train(folder: Path | None, plan: ParallelPlan | None, config: TrainingConfig, **model: Any) -> list[dict[str, Any]]:
    """The lines of metrics."""
    trainer = Trainer(make_model(**model), Rows(), Rows(), config, folder=folder, progress=False, parallel=plan)
    return trainer.train().history


def assert_same_curve(curve: list[dict[str, Any]], expected: list[dict[str, Any]], *, rel: float = 1e-6) -> None:
    assert len(curve) == len(expected)
    for line, reference in zip(curve, expected, strict=True):
        for name in ("step", "loss", "grad_norm", "validation_loss", "tokens", "learning_rate"):
            if name in reference:
                assert line[name] == pytest.approx(reference[name], rel=rel), name


def assert_same_checkpoint(folder: Path, expected: Path, step: int) -> None:
    ours, theirs = (load_checkpoint(place / "checkpoints", step=step) for place in (folder, expected))
    assert ours.model.keys() == theirs.model.keys()
    assert ours.optimizer.keys() == theirs.optimizer.keys()
    assert ours.state["tied"] == theirs.state["tied"]
    assert ours.state["optimizer_scalars"].keys() == theirs.state["optimizer_scalars"].keys()
    assert ours.data == theirs.data
    for mine, reference in ((ours.model, theirs.model), (ours.optimizer, theirs.optimizer)):
        for name, tensor in reference.items():
            assert mine[name].dtype == tensor.dtype, name
            torch.testing.assert_close(
                mine[name], tensor, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("one process")
    return folder, train(folder, None, make_config())


CHUNKED = [name for name, recipe in SCHEDULES.items() if recipe.takes_chunks]
PLANS = [
    *(ParallelPlan(pp=2, schedule=name, micro_batches=4, chunks=2 if name in CHUNKED else 1) for name in SCHEDULES),
    ParallelPlan(pp=4, schedule="1f1b", micro_batches=8),
    ParallelPlan(pp=4, schedule="zb-h2", micro_batches=4),
    ParallelPlan(pp=4, schedule="chimera", micro_batches=4),
    ParallelPlan(pp=3, schedule="gpipe", micro_batches=1),
    ParallelPlan(pp=2, dp=2, schedule="1f1b", micro_batches=4),
    ParallelPlan(pp=2, dp=2, schedule="zb-v", micro_batches=2),
    ParallelPlan(pp=2, dp=2, schedule="dualpipe", micro_batches=4),
    *(
        ParallelPlan(pp=2, schedule=name, micro_batches=4, chunks=2 if name in CHUNKED else 1, engine="torch")
        for name in TORCH_SCHEDULES
    ),
    ParallelPlan(pp=4, schedule="1f1b", micro_batches=8, engine="torch"),
    ParallelPlan(pp=2, dp=2, schedule="interleaved", micro_batches=2, chunks=2, engine="torch"),
]


def described(plan: ParallelPlan) -> str:
    return f"{plan.engine} {plan.schedule} {plan.pp}x{plan.dp} of {plan.n_micro_batches}"


@pytest.mark.parametrize("plan", PLANS, ids=described)
def test_every_plan_gives_the_curve_of_one_process(
    tmp_path: Path, one_process: tuple[Path, list[dict[str, Any]]], plan: ParallelPlan
) -> None:
    expected_folder, expected = one_process

    results = simulate_ranks(train, plan.n_ranks, tmp_path, plan, make_config()).results

    for curve in results:
        assert_same_curve(curve, expected)
    for step in (2, 4):
        assert_same_checkpoint(tmp_path, expected_folder, step)
