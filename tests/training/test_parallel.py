"""Training on several ranks: the loss curve, the parameters and the checkpoints of one process, by any plan."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from minillm.distributed import run_ranks, simulate_ranks
from minillm.models import Transformer, TransformerConfig
from minillm.models.moe_config import MoEConfig
from minillm.training import Trainer, TrainingConfig, load_checkpoint
from minillm.training.loss import IGNORED
from minillm.training.parallel import ParallelPlan

PLANS = [(zero, engine) for engine in ("minillm", "torch") for zero in range(4)]

# PyTorch's own, where it imports its optimizers.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning")


class Rows:
    """Batches of 5 rows (uneven for 2, 3 and 4 ranks), the second of which counts no target in its last row."""

    n_tokens = n_bytes = 100

    def __init__(self) -> None:
        self.position = 0

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.position += 1
        return self._batch(self.position)

    def evaluation_batches(self, max_batches: int | None = None) -> Any:
        return iter([self._batch(-1, rows=5), self._batch(-2, rows=1)])

    def _batch(self, number: int, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(1000 + number)
        ids = torch.randint(0, 17, (rows, 8), generator=generator)
        targets = ids.roll(-1, 1)
        if number % 2 == 0:
            targets[-1] = IGNORED
        return ids, targets

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]


def make_model(**settings: Any) -> Transformer:
    torch.manual_seed(3)
    shape = {"vocab_size": 17, "context_length": 8, "d_model": 16, "n_layers": 2, "n_heads": 2, "dropout": 0.0}
    return Transformer(TransformerConfig(**(shape | settings))).double()


def make_config(**settings: Any) -> TrainingConfig:
    defaults: dict[str, Any] = {
        "max_steps": 6,
        "learning_rate": 0.01,
        "grad_clip": 0.5,
        "gradient_accumulation_steps": 2,
        "eval_every": 3,
        "checkpoint_every": 3,
        "log_every": 1,
        "precision": "fp32",
        "device": "cpu",
    }
    return TrainingConfig(**(defaults | settings))


def train(folder: Path | None, plan: ParallelPlan | None, config: TrainingConfig, **model: Any) -> list[dict[str, Any]]:
    """The lines of metrics."""
    trainer = Trainer(make_model(**model), Rows(), Rows(), config, folder=folder, progress=False, parallel=plan)
    return trainer.train().history


def assert_same_curve(curve: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(curve) == len(expected)
    for line, reference in zip(curve, expected, strict=True):
        for name in ("step", "loss", "grad_norm", "validation_loss", "tokens", "learning_rate", "router_loss"):
            if name in reference:
                assert line[name] == pytest.approx(reference[name], rel=1e-6), name


def assert_same_checkpoint(folder: Path, expected: Path, step: int) -> None:
    ours, theirs = (load_checkpoint(place / "checkpoints", step=step) for place in (folder, expected))
    assert ours.model.keys() == theirs.model.keys()
    assert ours.optimizer.keys() == theirs.optimizer.keys()
    assert ours.state["tied"] == theirs.state["tied"]
    assert ours.data == theirs.data
    for mine, reference in ((ours.model, theirs.model), (ours.optimizer, theirs.optimizer)):
        for name, tensor in reference.items():
            torch.testing.assert_close(
                mine[name], tensor, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("one process")
    return folder, train(folder, None, make_config())


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize(("zero", "engine"), PLANS)
def test_every_plan_gives_the_curve_of_one_process(
    tmp_path: Path, one_process: tuple[Path, list[dict[str, Any]]], zero: int, engine: str, n: int
) -> None:
    expected_folder, expected = one_process

    results = simulate_ranks(train, n, tmp_path, ParallelPlan(n, zero, engine), make_config()).results

    for curve in results:
        assert_same_curve(curve, expected)
    for step in (3, 6):
        assert_same_checkpoint(tmp_path, expected_folder, step)


@pytest.mark.parametrize(("zero", "engine"), [(3, "minillm"), (3, "torch")])
def test_real_processes_too(
    tmp_path: Path, one_process: tuple[Path, list[dict[str, Any]]], zero: int, engine: str
) -> None:
    expected_folder, expected = one_process

    results = run_ranks(train, 2, tmp_path, ParallelPlan(2, zero, engine), make_config())

    for curve in results:
        assert_same_curve(curve, expected)
    assert_same_checkpoint(tmp_path, expected_folder, 6)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (ParallelPlan(2, 3), ParallelPlan(3, 1)),
        (ParallelPlan(3, 2, "torch"), ParallelPlan(2, 3)),
        (ParallelPlan(2, 0), None),
        (None, ParallelPlan(2, 2)),
        (ParallelPlan(2, 1), ParallelPlan(2, 1, "torch")),
        (ParallelPlan(2, 0, "torch"), ParallelPlan(4, 3, "torch")),
    ],
)
def test_a_run_goes_on_under_another_plan(
    tmp_path: Path, before: ParallelPlan | None, after: ParallelPlan | None
) -> None:
    """And under another number of ranks: half of the run each."""
    schedule = {"warmup_steps": 0, "min_learning_rate": 0.01}

    def sitting(plan: ParallelPlan | None, steps: int) -> list[dict[str, Any]]:
        config = make_config(max_steps=steps, **schedule)
        if plan is None:
            return train(tmp_path / "parts", None, config)
        return simulate_ranks(train, plan.dp, tmp_path / "parts", plan, config).results[0]  # type: ignore[no-any-return]

    whole = train(tmp_path / "whole", None, make_config(**schedule))
    sitting(before, 3)
    curve = sitting(after, 6)

    assert_same_curve(curve, whole)
    assert_same_checkpoint(tmp_path / "parts", tmp_path / "whole", 6)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_an_output_head_of_its_own(tmp_path: Path, zero: int) -> None:
    expected = train(tmp_path / "one", None, make_config(), tied_embeddings=False)

    results = simulate_ranks(
        lambda: train(tmp_path / "two", ParallelPlan(2, zero), make_config(), tied_embeddings=False), 2
    ).results

    for curve in results:
        assert_same_curve(curve, expected)
    assert_same_checkpoint(tmp_path / "two", tmp_path / "one", 6)


def test_experts_are_balanced_by_the_load_of_all_ranks() -> None:
    """The biases of sigmoid routers move by the whole batch's load: those of one process, to the bit."""
    moe = MoEConfig(n_experts=4, k=2, router="sigmoid")

    def ranks(plan: ParallelPlan | None) -> dict[str, torch.Tensor]:
        model = make_model(moe=moe)
        Trainer(model, Rows(), Rows(), make_config(eval_every=None), progress=False, parallel=plan).train()
        return {name: tensor for name, tensor in model.state_dict().items() if "bias" in name and "router" in name}

    expected = ranks(None)
    assert expected
    for result in simulate_ranks(ranks, 2, ParallelPlan(2)).results:
        for name, tensor in expected.items():
            assert torch.equal(result[name], tensor), name


def test_dropout_differs_from_rank_to_rank() -> None:
    def ranks() -> list[float]:
        model = make_model(dropout=0.5)
        seen: list[float] = []
        model.register_forward_hook(lambda _, __, output: seen.append(float(output.detach().sum())))

        class Same(Rows):
            def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
                ids, targets = super().next_batch()
                return ids[:1].repeat(2, 1), targets[:1].repeat(2, 1)

        Trainer(model, Same(), None, make_config(max_steps=1), progress=False, parallel=ParallelPlan(2)).train()
        return seen

    first, second = simulate_ranks(ranks, 2).results
    assert first[0] != second[0]


def test_ctrl_c_on_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    """Real processes: a signal reaches one of them."""

    def ranks() -> tuple[int, bool]:
        def press(line: dict[str, Any]) -> None:
            if line["step"] == 2 and dist.get_rank() == 1:
                signal.raise_signal(signal.SIGINT)

        config = make_config(eval_every=None, checkpoint_every=None)
        plan = ParallelPlan(2, 2)
        trainer = Trainer(
            make_model(), Rows(), None, config, folder=tmp_path, progress=False, parallel=plan, on_log=press
        )
        result = trainer.train()
        return result.step, result.interrupted

    assert run_ranks(ranks, 2) == [(2, True)] * 2
    assert load_checkpoint(tmp_path / "checkpoints").step == 2


def test_ctrl_c_before_the_first_line_of_a_run_that_goes_on(tmp_path: Path) -> None:
    """Between the two looks that follow a step of which nothing is written; one rank alone has earlier lines."""

    class Stopped(Trainer):
        looks = 0

        def _stopping(self, interrupt: Any) -> bool:
            self.looks += 1
            return self.looks == 3

    def ranks(kind: type[Trainer], steps: int) -> tuple[int, bool]:
        config = make_config(max_steps=steps, log_every=100, eval_every=None, checkpoint_every=None)
        plan = ParallelPlan(2)
        result = kind(make_model(), Rows(), None, config, folder=tmp_path, progress=False, parallel=plan).train()
        return result.step, result.interrupted

    simulate_ranks(ranks, 2, Trainer, 1)

    assert simulate_ranks(ranks, 2, Stopped, 4).results == [(2, True)] * 2
    assert load_checkpoint(tmp_path / "checkpoints").step == 2


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"dp": 0}, ValueError, "dp must be at least 1, got 0"),
        ({"dp": 2.0}, TypeError, "dp must be an integer, got 2.0"),
        ({"dp": 2, "zero": 4}, ValueError, "zero must be 0 to 3, got 4"),
        ({"dp": 2, "engine": "deepspeed"}, ValueError, "engine must be one of minillm, torch, got 'deepspeed'"),
        ({"zero": 1}, ValueError, "need more than one rank: dp is 1"),
        ({"engine": "torch"}, ValueError, "need more than one rank: dp is 1"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ParallelPlan(**arguments)


def test_a_plan_without_its_ranks_is_refused_with_the_command() -> None:
    with pytest.raises(
        RuntimeError, match=r"dp=4 needs 4 ranks, and there is 1: torchrun --standalone --nproc-per-node 4"
    ):
        Trainer(make_model(), Rows(), None, make_config(), parallel=ParallelPlan(4))


def test_compiling_on_several_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="compile=True trains in one process, and dp is 2"):
        Trainer(make_model(), Rows(), None, make_config(compile=True), parallel=ParallelPlan(2))
