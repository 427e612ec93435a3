"""Stages 1 to 3: the training of one process, in float64; PyTorch's own; and bytes and traffic to the closed forms."""

import copy
import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from minillm.costs.zero import zero_bytes_by_kind, zero_communication_bytes
from minillm.distributed import RankError, count_traffic, run_ranks, simulate_ranks
from minillm.distributed.memory import measure_memory
from minillm.distributed.zero import Zero
from minillm.models import Transformer, TransformerConfig
from minillm.optim import AdamW, parameter_groups

with warnings.catch_warnings():  # it compiles functions in a way that PyTorch itself calls outdated
    warnings.simplefilter("ignore", DeprecationWarning)
    from torch.distributed.optim import ZeroRedundancyOptimizer

MICRO_BATCHES, MAX_NORM = 2, 0.5


def small_transformer(dtype: torch.dtype = torch.float64) -> Transformer:
    torch.manual_seed(3)
    # Sizes that 3 and 4 do not divide; the embedding is the head too.
    config = TransformerConfig(vocab_size=29, d_model=14, n_layers=2, n_heads=2, d_ff=22, context_length=8)
    assert config.tied_embeddings
    return Transformer(config).to(dtype)


def optimizer_for(kind: str, model: nn.Module) -> torch.optim.Optimizer:
    groups = parameter_groups(model, weight_decay=0.1)
    groups[1]["lr"] = 0.03
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    return AdamW(groups, lr=0.01)


def batch(step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    """Ranks have one to three rows, in another order in each step."""
    draw = torch.Generator().manual_seed(1000 * step + 10 * micro + rank)
    tokens = torch.randint(29, (1 + (rank + step) % 3, 7), generator=draw)
    return tokens[:, :-1], tokens[:, 1:]


def share_of_loss(model: nn.Module, tokens: Tensor, targets: Tensor, n_targets: int) -> Tensor:
    logits = model(tokens).flatten(0, 1).double()
    return nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum") / n_targets


def n_targets(step: int, n_ranks: int) -> int:
    return sum(batch(step, micro, rank)[1].numel() for micro in range(MICRO_BATCHES) for rank in range(n_ranks))


@functools.cache
def one_process(kind: str, n_ranks: int, steps: int) -> tuple[dict[str, Tensor], list[float]]:
    """What the ranks should come to: the parameters after all steps, and each step's norm of the gradients."""
    model = small_transformer()
    optimizer = optimizer_for(kind, model)
    norms = []
    for step in range(steps):
        for micro in range(MICRO_BATCHES):
            for rank in range(n_ranks):
                share_of_loss(model, *batch(step, micro, rank), n_targets(step, n_ranks)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict(), norms


def zero_ranks(kind: str, stage: int, settings: dict[str, Any], steps: int) -> tuple[dict[str, Tensor], list[float]]:
    model = small_transformer()
    rank, n_ranks = dist.get_rank(), dist.get_world_size()
    if rank > 0:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(rank)  # ranks that were seeded differently: the first one counts
    zero = Zero(model, optimizer_for(kind, model), stage=stage, reduction="sum", **settings)
    norms = []
    for step in range(steps):
        for micro in range(MICRO_BATCHES):
            with zero.no_sync() if micro < MICRO_BATCHES - 1 else nullcontext():
                share_of_loss(model, *batch(step, micro, rank), n_targets(step, n_ranks)).backward()
        norms.append(float(zero.clip_grad_norm_(MAX_NORM)))
        zero.step()
        zero.zero_grad()
    with zero.gathered():
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, norms


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize(
    ("stage", "settings", "numbers_of_ranks"),
    [
        (1, {"bucket_bytes": 12000}, (1, 2, 3, 4)),
        (2, {"bucket_bytes": 12000}, (1, 2, 3, 4)),
        (3, {}, (1, 2, 3, 4)),
        (1, {}, (3,)),
        (3, {"reshard_after_forward": False}, (3,)),
    ],
)
def test_twenty_steps_are_those_of_one_process(
    kind: str, stage: int, settings: dict[str, Any], numbers_of_ranks: tuple[int, ...]
) -> None:
    for n_ranks in numbers_of_ranks:
        expected, expected_norms = one_process(kind, n_ranks, 20)
        for found, norms in simulate_ranks(zero_ranks, n_ranks, kind, stage, settings, 20).results:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
            assert norms == pytest.approx(expected_norms, rel=1e-9)


def test_real_processes_agree() -> None:
    for stage in (1, 3):
        expected, expected_norms = one_process("sgd", 3, 4)
        for found, norms in run_ranks(zero_ranks, 3, "sgd", stage, {"bucket_bytes": 12000}, 4):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
            assert norms == pytest.approx(expected_norms, rel=1e-9)


# -- PyTorch's own


def torch_and_zero(stage: int, kind: type[torch.optim.Optimizer], settings: dict[str, Any]) -> tuple[float, float]:
    """DDP with `ZeroRedundancyOptimizer` beside `Zero`: the largest difference of gradients and of parameters."""
    theirs, ours = DistributedDataParallel(small_transformer(torch.float32)), small_transformer(torch.float32)
    their_optimizer = ZeroRedundancyOptimizer(theirs.parameters(), kind, **settings)
    zero = Zero(ours, kind(ours.parameters(), **settings), stage=stage)
    gradients = []
    for step in range(5):
        for micro in range(2):
            tokens, targets = batch(step, micro, dist.get_rank())
            last = micro == 1
            with nullcontext() if last else theirs.no_sync():
                share_of_loss(theirs, tokens, targets, 10).backward()
            with nullcontext() if last else zero.no_sync():
                share_of_loss(ours, tokens, targets, 10).backward()
        found = zero.gradients()
        gradients += [(p.grad - found[name]).abs().max() for name, p in theirs.module.named_parameters()]
        their_optimizer.step()
        their_optimizer.zero_grad()
        zero.step()
        zero.zero_grad()
    parameters = [
        (p - q).detach().abs().max() for p, q in zip(theirs.module.parameters(), ours.parameters(), strict=True)
    ]
    del theirs, their_optimizer
    return float(torch.stack(gradients).max()), float(torch.stack(parameters).max())


@pytest.mark.parametrize("stage", [1, 2])
def test_stages_1_and_2_are_ddp_with_zero_redundancy_optimizer(stage: int) -> None:
    for gradients, parameters in run_ranks(torch_and_zero, 2, stage, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}):
        assert gradients < 1e-6
        assert parameters < 1e-6
    for gradients, parameters in run_ranks(torch_and_zero, 2, stage, torch.optim.AdamW, {"lr": 1e-3}):
        assert gradients < 1e-4  # Adam divides by the gradients' size: what is rounded otherwise where they are 0 shows
        assert parameters < 1e-3


# -- bytes and traffic


def divisible(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Numbers of parameters that 2, 3 and 4 divide, block by block: Psi = 2,304."""
    torch.manual_seed(0)
    net = nn.Sequential()
    net.first = nn.Linear(24, 24, bias=False)
    net.blocks = nn.ModuleList(nn.Linear(24, 24, bias=False) for _ in range(3))

    def forward(x: Tensor) -> Tensor:
        x = net.first(x)
        for block in net.blocks:
            x = torch.tanh(block(x))
        return x

    net.forward = forward  # type: ignore[method-assign]
    return net.to(dtype)


N_PARAMETERS = 4 * 24 * 24


def measured(stage: int, dtype: torch.dtype | None) -> dict[str, dict[str, int]]:
    model = divisible()
    zero = Zero(model, AdamW(model.parameters()), stage=stage, parameter_dtype=dtype, bucket_bytes=24 * 24 * 2)
    x = torch.ones(1, 24)
    with measure_memory(model, zero) as memory:
        for _ in range(2):
            zero.zero_grad()
            loss = model(x).sum()
            memory.reset_peak()
            loss.backward()
            memory.marks["peak"] = memory.peak
            memory.mark("after backward")
            zero.step()
    return memory.marks


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bytes_of_a_rank_are_the_papers(stage: int, n_ranks: int) -> None:
    """4 Psi + 12 Psi / N, 2 Psi + 14 Psi / N, 16 Psi / N; and in float32 with 4, 4 and 8 bytes in place of 2, 2, 12."""
    for dtype, each in ((torch.bfloat16, (2, 2, 12)), (None, (4, 4, 8))):
        sizes = dict(zip(("parameter_bytes", "gradient_bytes", "optimizer_bytes"), each, strict=True))
        expected = zero_bytes_by_kind(N_PARAMETERS, n_ranks, stage, **sizes)
        for marks in simulate_ranks(measured, n_ranks, stage, dtype).results:
            found = marks["after backward"]
            nan, step_counts = (each[0] if stage == 3 and n_ranks > 1 else 0), 4
            # Beside the paper's: for each of 4 buffers the NaN that freed parameters show, and Adam's count of steps.
            assert found["gradients"] == expected["gradients"]
            assert found["parameters"] == expected["parameters"] + 4 * nan
            assert found["optimizer state"] == expected["optimizer state"] + 4 * step_counts


@pytest.mark.parametrize("stage", [1, 3])
def test_gradients_in_the_masters_dtype_are_there_during_the_update_alone(stage: int) -> None:
    def ranks() -> bool:
        model = small_transformer(torch.float32)
        zero = Zero(model, optimizer_for("adamw", model), stage=stage, parameter_dtype=torch.bfloat16)
        share_of_loss(model, *batch(0, 0, 0), 10).backward()
        zero.step()
        return all(segment.grad is None for group in zero.param_groups for segment in group["params"])

    assert simulate_ranks(ranks, 2).results == [True, True]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buffers_and_frozen_parameters_are_the_first_ranks_too(stage: int) -> None:
    def ranks() -> list[bool]:
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        model[0].requires_grad_(False)
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(dist.get_rank() + 7)
        zero = Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=stage)
        with zero.gathered():
            return [bool((tensor == 7).all()) for tensor in model.state_dict().values()]

    assert simulate_ranks(ranks, 3).results == [[True] * 9] * 3


def test_gradients_in_stages_2_and_3_are_a_part_and_two_buckets_at_the_most() -> None:
    """One bucket is on its way, one is being filled, with a gradient that autograd has just made."""
    for stage in (2, 3):
        for marks in simulate_ranks(measured, 4, stage, torch.bfloat16).results:
            bucket = 24 * 24 * 2
            just_made = bucket
            assert marks["peak"]["gradients"] <= 2 * N_PARAMETERS / 4 + 2 * bucket + just_made


@pytest.mark.parametrize("n_ranks", [2, 3, 4])
@pytest.mark.parametrize(
    ("stage", "reshard"), [(1, True), (2, True), (3, True), (3, False)], ids=["1", "2", "3", "3, not resharded"]
)
def test_traffic_is_the_papers(stage: int, reshard: bool, n_ranks: int) -> None:
    def ranks() -> tuple[int, int]:
        model = divisible(torch.bfloat16)
        zero = Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=stage, reshard_after_forward=reshard)
        sent = []
        for micro_batches in (1, 3):
            with count_traffic() as traffic:
                for micro in range(micro_batches):
                    with zero.no_sync() if micro < micro_batches - 1 else nullcontext():
                        model(torch.ones(1, 24, dtype=torch.bfloat16)).sum().backward()
                zero.step()
            sent.append(traffic.bytes_sent)
        return sent[0], sent[1]

    once, thrice = (
        zero_communication_bytes(N_PARAMETERS, stage, n_ranks, micro_batches=k, reshard_after_forward=reshard)
        for k in (1, 3)
    )
    factor = 3 if stage == 3 and reshard else 2
    assert once == pytest.approx(factor * N_PARAMETERS * 2 * (n_ranks - 1) / n_ranks)
    assert simulate_ranks(ranks, n_ranks).results == [(pytest.approx(once), pytest.approx(thrice))] * n_ranks


# -- gradients


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_passes_that_all_synchronise_add_up(stage: int) -> None:
    """Accumulation by someone who forgets `no_sync`, or who mixes it."""

    def ranks() -> bool:
        model, plain = small_transformer(), small_transformer()
        zero = Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=stage, bucket_bytes=12000)
        for micro, sync in enumerate((True, True, False, False, True, False)):
            with nullcontext() if sync else zero.no_sync():
                share_of_loss(model, *batch(0, micro, dist.get_rank()), 10).backward()
        for micro in range(6):
            for rank in range(3):
                (share_of_loss(plain, *batch(0, micro, rank), 10) / 3).backward()
        found = zero.gradients()
        return all(torch.allclose(found[name], p.grad, atol=1e-15) for name, p in plain.named_parameters())

    assert simulate_ranks(ranks, 3).results == [True] * 3


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_a_rank_does_not_use_counts_as_zero(stage: int) -> None:
    class Idle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ParameterList(nn.Parameter(torch.ones(3)) for _ in range(4))
            self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            # The ranks differ in what they use; nobody uses the last part or the second block.
            return self.blocks[0](x * self.parts[dist.get_rank()])

    def ranks() -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = Idle()
        zero = Zero(model, torch.optim.SGD(model.parameters(), lr=1.0), stage=stage, reduction="sum", bucket_bytes=16)
        before = {name: tensor.clone() for name, tensor in zero.state_dict(everywhere=True)["model"].items()}
        model(torch.ones(1, 3)).sum().backward()
        zero.step()
        after = zero.state_dict(everywhere=True)["model"]
        return {name: before[name] - after[name] for name in before}

    for change in simulate_ranks(ranks, 3).results:
        for used in range(3):
            assert torch.equal(change[f"parts.{used}"], change["parts.0"])
        assert float(change["parts.0"].abs().min()) > 0.0
        assert torch.equal(change["blocks.0.bias"], torch.full((3,), 3.0))
        assert not change["parts.3"].any()
        assert not change["blocks.1.weight"].any()


def test_mean_and_sum_differ_by_the_number_of_ranks() -> None:
    def ranks(reduction: str) -> dict[str, Tensor]:
        model = small_transformer()
        zero = Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=2, reduction=reduction)
        share_of_loss(model, *batch(0, 0, dist.get_rank()), 10).backward()
        return zero.gradients()

    mean, total = (simulate_ranks(ranks, 3, reduction).results[1] for reduction in ("mean", "sum"))
    for name, gradient in mean.items():
        torch.testing.assert_close(3 * gradient, total[name])


def test_an_endless_norm_only_measures() -> None:
    def ranks() -> tuple[Tensor, Tensor, bool]:
        model = small_transformer(torch.float32)
        zero = Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=2, parameter_dtype=torch.bfloat16)
        nothing = zero.clip_grad_norm_(1.0)
        share_of_loss(model, *batch(0, 0, 0), 10).backward()
        before = zero.gradients()
        norm = zero.clip_grad_norm_(float("inf"))
        return nothing, norm, all(torch.equal(before[name], value) for name, value in zero.gradients().items())

    (nothing, norm, same), (_, other, _) = simulate_ranks(ranks, 2).results
    assert (float(nothing), same) == (0.0, True)
    assert norm.dtype == torch.float32
    assert torch.equal(norm, other)


# -- optimizers


class TrustRatio(torch.optim.SGD):
    """As in LARS: the step depends on the norm of a whole parameter."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(group["lr"] * parameter.norm() * parameter.grad)


def lbfgs(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(model.parameters())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda model: TrustRatio(model.parameters(), lr=0.1), "optimizer must be elementwise, but TrustRatio"),
        (lambda model: torch.optim.Adafactor(model.parameters()), "Adafactor"),
        (lbfgs, "LBFGS cannot update parts"),
        (lambda model: torch.optim.Muon(p for p in model.parameters() if p.dim() == 2), "must have every trainable"),
        (lambda model: torch.optim.SGD(list(model.parameters())[1:], lr=0.1), "freeze or add token_embedding.weight"),
        (
            lambda model: torch.optim.SGD([nn.Parameter(torch.ones(3))], lr=0.1),
            r"also has some of the shapes \[\(3,\)\]",
        ),
        (lambda model: model, "optimizer must be a torch.optim.Optimizer, got Transformer"),
    ],
)
def test_an_optimizer_that_cannot_be_divided_is_refused_in_words(
    make: Callable[[nn.Module], torch.optim.Optimizer], words: str
) -> None:
    def ranks() -> None:
        model = small_transformer()
        Zero(model, make(model), stage=1)

    with pytest.raises(RankError, match=words):
        simulate_ranks(ranks, 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.Adam(parameters, foreach=True),
        lambda parameters: torch.optim.AdamW(parameters, fused=True, amsgrad=True),
        lambda parameters: AdamW(parameters, fused=True),
        torch.optim.NAdam,
        torch.optim.RAdam,
        torch.optim.Adamax,
        torch.optim.Adagrad,
        torch.optim.Adadelta,
        torch.optim.RMSprop,
        torch.optim.Rprop,
        torch.optim.ASGD,
    ],
)
def test_elementwise_optimizers_step_as_alone(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    def ranks() -> bool:
        model, plain = small_transformer(), small_transformer()
        optimizer = make(plain.parameters())
        inner = make(model.parameters())
        schedule = torch.optim.lr_scheduler.ExponentialLR(inner, 0.5)
        plain_schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        zero = Zero(model, inner, stage=1)
        for step in range(3):
            for net in (model, plain):
                share_of_loss(net, *batch(step, 0, 0), 10).backward()
            optimizer.step()
            optimizer.zero_grad()
            plain_schedule.step()
            zero.step()
            zero.zero_grad()
            schedule.step()
        pairs = zip(model.parameters(), plain.parameters(), strict=True)
        return all(torch.allclose(p, q, rtol=1e-9, atol=1e-8) for p, q in pairs)

    assert simulate_ranks(ranks, 3).results == [True] * 3


def test_state_that_cannot_be_divided_is_refused() -> None:
    def ranks() -> None:
        model = small_transformer()
        optimizer = AdamW(model.parameters())
        share_of_loss(model, *batch(0, 0, 0), 10).backward()
        optimizer.step()
        list(model.parameters())[3].grad = None  # it takes one step less than its neighbours
        optimizer.step()
        Zero(model, optimizer, stage=1)

    with pytest.raises(RankError, match="cannot be divided: they are neighbours in one"):
        simulate_ranks(ranks, 2)


# -- at the door


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stage": 0}, "stage must be 1, 2 or 3, got 0"),
        ({"stage": True}, "stage must be 1, 2 or 3, got True"),
        ({"reduction": "max"}, "reduction must be"),
        ({"bucket_bytes": 0}, "bucket_bytes must be an int of at least 1, got 0"),
        ({"parameter_dtype": torch.int8}, "parameter_dtype must be None or a floating dtype"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], words: str) -> None:
    def ranks() -> None:
        model = small_transformer()
        Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), **({"stage": 1} | settings))

    with pytest.raises(RankError, match=words):
        simulate_ranks(ranks, 1)


def test_without_a_process_group_there_is_nothing_to_divide_over() -> None:
    model = small_transformer()
    with pytest.raises(ValueError, match="needs an initialised process group"):
        Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=1)


def test_misuse_is_refused_in_words() -> None:
    def train(use: Callable[[nn.Module, Zero], object]) -> None:
        model = small_transformer()
        zero = Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=2)
        use(model, zero)

    def thaw(model: nn.Module, zero: Zero) -> None:
        model.get_parameter("final_norm.weight").requires_grad_(False)
        zero.step()

    for use, words in (
        (thaw, "requires_grad of final_norm.weight must be what it was"),
        (lambda _, zero: zero.clip_grad_norm_(0.0), "max_norm must be above 0, got 0.0"),
        (lambda _, zero: copy.deepcopy(zero), "a Zero belongs to its model and its process group"),
    ):
        with pytest.raises(RankError, match=words):
            simulate_ranks(train, 2, use)

    def sparse() -> None:
        model = nn.Embedding(4, 3, sparse=True)
        Zero(model, torch.optim.SGD(model.parameters(), lr=0.1), stage=1)
        model(torch.tensor([1])).sum().backward()

    with pytest.raises(RankError, match="weight has a sparse gradient"):
        simulate_ranks(sparse, 2)
