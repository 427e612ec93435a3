"""Training through a pipeline: the loss curve, the parameters and the checkpoints of one process, by any plan."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from minillm.distributed import run_ranks, simulate_ranks
from minillm.distributed.errors import RankError
from minillm.distributed.pipeline import SCHEDULES
from minillm.models import Transformer, TransformerConfig
from minillm.models.moe_config import MoEConfig
from minillm.training import NonFiniteError, Trainer, TrainingConfig, load_checkpoint
from minillm.training.loss import IGNORED
from minillm.training.parallel import ParallelPlan
from minillm.training.plan import TORCH_SCHEDULES
from minillm.training.run import check_run, train_run

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
        "max_steps": 2,
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "min_learning_rate": 0.01,
        "grad_clip": 0.5,
        "gradient_accumulation_steps": 2,
        "eval_every": 1,
        "checkpoint_every": 1,
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
    for step in (1, 2):
        assert_same_checkpoint(tmp_path, expected_folder, step)


@pytest.mark.parametrize(
    "plan",
    [
        ParallelPlan(pp=2, dp=2, schedule="zb-h1", micro_batches=4),
        ParallelPlan(pp=2, schedule="interleaved", micro_batches=4, chunks=2, engine="torch"),
    ],
    ids=described,
)
def test_real_processes_too(tmp_path: Path, one_process: tuple[Path, list[dict[str, Any]]], plan: ParallelPlan) -> None:
    expected_folder, expected = one_process

    results = run_ranks(train, plan.n_ranks, tmp_path, plan, make_config())

    for curve in results:
        assert_same_curve(curve, expected)
    assert_same_checkpoint(tmp_path, expected_folder, 2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (ParallelPlan(pp=4, micro_batches=4), ParallelPlan(pp=2, schedule="interleaved", micro_batches=4, chunks=2)),
        (ParallelPlan(pp=2, schedule="zb-v", dp=2), ParallelPlan(dp=3, zero=3)),
        (ParallelPlan(dp=2, zero=1), ParallelPlan(pp=2, schedule="chimera", micro_batches=4)),
        (ParallelPlan(pp=3, micro_batches=4), None),
        (None, ParallelPlan(pp=2, schedule="gpipe", engine="torch")),
        (ParallelPlan(pp=2, schedule="zb-v", engine="torch"), ParallelPlan(pp=4, dp=2, micro_batches=4)),
    ],
)
def test_a_run_goes_on_under_another_plan(
    tmp_path: Path,
    one_process: tuple[Path, list[dict[str, Any]]],
    before: ParallelPlan | None,
    after: ParallelPlan | None,
) -> None:
    expected_folder, expected = one_process

    def sitting(plan: ParallelPlan | None, steps: int) -> list[dict[str, Any]]:
        config = make_config(max_steps=steps)
        if plan is None:
            return train(tmp_path, None, config)
        return simulate_ranks(train, plan.n_ranks, tmp_path, plan, config).results[0]  # type: ignore[no-any-return]

    sitting(before, 1)
    curve = sitting(after, 2)

    assert_same_curve(curve, expected)
    assert_same_checkpoint(tmp_path, expected_folder, 2)


@pytest.mark.parametrize(
    "model",
    [
        {"tied_embeddings": False, "positions": "rope", "norm": "rmsnorm", "activation": "swiglu"},
        {"positions": "t5"},  # its table stands on every stage that has blocks
        {"positions": "learned", "n_layers": 2},  # the embedding and the head may stand alone
    ],
    ids=["llama", "t5", "thin"],
)
@pytest.mark.parametrize("engine", ["minillm", "torch"])
def test_other_models(tmp_path: Path, model: dict[str, Any], engine: str) -> None:
    expected = train(tmp_path / "one", None, make_config(), **model)
    plan = ParallelPlan(pp=4, schedule="1f1b", micro_batches=4, engine=engine)

    results = simulate_ranks(lambda: train(tmp_path / "four", plan, make_config(), **model), 4).results

    for curve in results:
        assert_same_curve(curve, expected)
    assert_same_checkpoint(tmp_path / "four", tmp_path / "one", 2)


class Words(nn.Sequential):
    """A model of no type that is known here, of which one matrix has two names and one layer is frozen."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        super().__init__(nn.Embedding(17, 8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 17))
        self[-1].weight = self[0].weight
        self[1].requires_grad_(False)


@pytest.mark.parametrize("engine", ["minillm", "torch"])
def test_a_plain_sequence_of_layers_with_one_matrix_under_two_names(tmp_path: Path, engine: str) -> None:
    def run(folder: Path, plan: ParallelPlan | None, steps: int) -> None:
        model, config = Words().double(), make_config(max_steps=steps)
        Trainer(model, Rows(), Rows(), config, folder=folder, progress=False, parallel=plan).train()

    plan = ParallelPlan(pp=2, schedule="1f1b", micro_batches=2, engine=engine)
    run(tmp_path / "one", None, 2)
    simulate_ranks(run, 2, tmp_path / "two", plan, 1)
    simulate_ranks(run, 2, tmp_path / "two", plan, 2)

    assert_same_checkpoint(tmp_path / "two", tmp_path / "one", 2)


@pytest.mark.parametrize("engine", ["minillm", "torch"])
def test_bf16(engine: str) -> None:
    """The same passes in another order of sums: as near as one process with other batches."""
    config = make_config(precision="bf16", checkpoint_every=None)

    def run(plan: ParallelPlan | None) -> list[dict[str, Any]]:
        return Trainer(make_model().float(), Rows(), Rows(), config, progress=False, parallel=plan).train().history

    expected = run(None)
    for curve in simulate_ranks(run, 2, ParallelPlan(pp=2, micro_batches=4, engine=engine)).results:
        assert_same_curve(curve, expected, rel=0.02)


def test_ctrl_c_on_one_rank_stops_all_after_the_same_step(tmp_path: Path) -> None:
    """Real processes: a signal reaches the last stage."""

    def ranks() -> tuple[int, bool]:
        def press(line: dict[str, Any]) -> None:
            if line["step"] == 2 and dist.get_rank() == 1:
                signal.raise_signal(signal.SIGINT)

        config = make_config(max_steps=4, eval_every=None, checkpoint_every=None)
        plan = ParallelPlan(pp=2)
        trainer = Trainer(
            make_model(), Rows(), None, config, folder=tmp_path, progress=False, parallel=plan, on_log=press
        )
        result = trainer.train()
        return result.step, result.interrupted

    assert run_ranks(ranks, 2) == [(2, True)] * 2
    assert load_checkpoint(tmp_path / "checkpoints").step == 2


def test_a_rank_keeps_its_own_pieces_alone() -> None:
    def ranks() -> tuple[list[str], int]:
        model = make_model(tied_embeddings=False)
        trainer = Trainer(model, Rows(), None, make_config(), progress=False, parallel=ParallelPlan(pp=2))
        trainer.train()
        here = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
        moments = sum(len(state) for state in trainer.optimizer.state.values())
        return here, moments

    first, last = (set(here) for here, _ in simulate_ranks(ranks, 2).results)
    assert first | last == {name for name, _ in make_model(tied_embeddings=False).named_parameters()}
    assert not first & last
    assert "token_embedding.weight" in first
    assert "lm_head.weight" in last


def test_a_loss_that_is_not_finite_ends_all_ranks_at_the_same_step(tmp_path: Path) -> None:
    def ranks() -> tuple[int, bool]:
        model = make_model()
        plan = ParallelPlan(pp=2)
        config = make_config(max_steps=4, eval_every=None)
        trainer = Trainer(
            model, Rows(), None, config, folder=tmp_path, progress=False, parallel=plan, on_log=lambda line: spoil(line)
        )

        def spoil(line: dict[str, Any]) -> None:
            if line["step"] == 3 and dist.get_rank() == 1:
                with torch.no_grad():
                    model.final_norm.weight.fill_(float("nan"))

        with pytest.raises(NonFiniteError) as caught:
            trainer.train()
        return caught.value.step, caught.value.checkpoint is not None

    assert simulate_ranks(ranks, 2).results == [(4, True)] * 2


def test_a_checkpoint_of_another_model_is_refused_on_every_rank(tmp_path: Path) -> None:
    train(tmp_path, None, make_config())

    def ranks() -> str:
        with pytest.raises(ValueError, match="is a checkpoint of another model") as caught:
            train(tmp_path, ParallelPlan(pp=2), make_config(max_steps=6), n_layers=5)
        return str(caught.value)

    first, last = simulate_ranks(ranks, 2).results
    assert first == last
    assert "blocks.4.attention.qkv.weight" in first


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"pp": 0}, ValueError, "pp must be at least 1, got 0"),
        ({"pp": True}, TypeError, "pp must be an integer, got True"),
        ({"pp": 2, "micro_batches": 0}, ValueError, "micro_batches must be at least 1, got 0"),
        ({"pp": 2, "schedule": "1f1"}, ValueError, "got '1f1'; the nearest is \"1f1b\""),
        ({"pp": 2, "schedule": "pipedream"}, ValueError, "in your own loop, or take a synchronous schedule"),
        ({"pp": 2, "schedule": "pipedream_2bw"}, ValueError, 'the nearest is "1f1b"'),
        ({"pp": 2, "chunks": 2}, ValueError, r"interleaved or breadth-first.*1f1b"),
        (
            {"pp": 4, "schedule": "interleaved", "micro_batches": 6, "chunks": 2},
            ValueError,
            "micro_batches of interleaved.* got 6, the nearest that will do: 4 or 8",
        ),
        (
            {"pp": 3, "schedule": "chimera", "micro_batches": 4},
            ValueError,
            "^pp of .* the nearest that will do: 2 or 4",
        ),
        ({"pp": 2, "zero": 1}, ValueError, "zero=1 and pp=2 do not go together"),
        ({"pp": 2, "schedule": "zb-h2", "engine": "torch"}, ValueError, "with engine='torch' take one of gpipe, 1f1b"),
        (
            {"pp": 2, "schedule": "zb-h1", "micro_batches": 5, "engine": "torch"},
            ValueError,
            "got micro_batches=5; the nearest that will do is 4",
        ),
        (
            {"pp": 2, "schedule": "interleaved", "micro_batches": 9, "engine": "torch"},  # one chunk, as by default
            ValueError,
            "PyTorch's interleaved takes 4 rounds .* got micro_batches=9; the nearest that will do is 8",
        ),
        (
            {"pp": 4, "micro_batches": 3, "engine": "torch"},
            ValueError,
            "got micro_batches=3; the nearest that will do is 4",
        ),
        ({"schedule": "gpipe"}, ValueError, "schedule='gpipe' is for pipelines: pp is 1"),
        ({"dp": 2, "micro_batches": 8, "chunks": 2}, ValueError, "micro_batches=8 and chunks=2 are for pipelines"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        ParallelPlan(**arguments)


@pytest.mark.parametrize(
    ("plan", "model", "words"),
    [
        (
            ParallelPlan(pp=8, schedule="chimera"),
            {},
            r"at least 8 layers, and this one has 6 \(with its embedding and head\): the nearest pp that will do is 6",
        ),
        (ParallelPlan(pp=4, schedule="interleaved", chunks=2), {}, "at least 8 layers.* will do is 2"),
        (ParallelPlan(pp=2), {"moe": MoEConfig(n_experts=4, k=2)}, "for models without experts.* take pp=1, dp=2"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(plan: ParallelPlan, model: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plan.split(make_model(**model))


@pytest.mark.parametrize(
    ("plan", "rows", "words"),
    [
        (ParallelPlan(pp=2, micro_batches=3), 8, "batch_size that will do is 6 or 9, the nearest micro_batches 2"),
        (ParallelPlan(pp=2, dp=2, micro_batches=8), 8, "is 16, the nearest micro_batches 4"),
        (ParallelPlan(pp=3, schedule="interleaved", chunks=2, micro_batches=3), 10, "that will do is 9 or 12$"),
        (ParallelPlan(pp=2, dp=3, micro_batches=2), 8, "2 micro-batches on each of 3 pipelines.*is 6 or 12$"),
    ],
)
def test_rows_that_do_not_divide_are_refused(plan: ParallelPlan, rows: int, words: str) -> None:
    def ranks() -> None:
        Trainer(make_model(), Rows(rows), None, make_config(), progress=False, parallel=plan).train()

    with pytest.raises(RankError, match=words):
        simulate_ranks(ranks, plan.n_ranks)
    ParallelPlan(dp=3).check_rows(8)  # without a pipeline ranks may get different numbers


def test_a_plan_without_its_ranks_is_refused_with_the_command() -> None:
    with pytest.raises(
        RuntimeError, match=r"pp=4, dp=2 needs 8 ranks, and there is 1: torchrun --standalone --nproc-per-node 8"
    ):
        Trainer(make_model(), Rows(), None, make_config(), parallel=ParallelPlan(pp=4, dp=2))


def test_compiling_is_refused() -> None:
    with pytest.raises(ValueError, match="compile=True trains in one process, and pp is 2"):
        Trainer(make_model(), Rows(), None, make_config(compile=True), parallel=ParallelPlan(pp=2))


def test_a_run_is_refused_before_anything_is_prepared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a batch of 6 rows does not divide into 4 micro-batches"):
        train_run(tmp_path / "run", parallel=ParallelPlan(pp=2, micro_batches=4), data={"batch_size": 6})
    with pytest.raises(ValueError, match="the nearest pp that will do is 5"):
        train_run(tmp_path / "run", parallel=ParallelPlan(pp=8), model={"n_layers": 3, "d_model": 16, "n_heads": 2})
    with pytest.raises(ValueError, match="compile=True trains in one process, and dp is 2"):
        check_run(ParallelPlan(dp=2), training={"compile": True})
    assert not (tmp_path / "run").exists()
