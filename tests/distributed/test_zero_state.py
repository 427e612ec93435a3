"""States: gathered for one process, in parts for as many ranks, and parts for another number of ranks."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from minillm.distributed import RankError, Zero, mics_groups, run_ranks, simulate_ranks


class Net(nn.Module):
    """Odd sizes, a tied weight, a frozen one, a scalar, buffers, parameters with fewer numbers than ranks."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(11, 5)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 5)) for _ in range(2))
        self.norm = nn.BatchNorm1d(5)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(5, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.blocks[1][0].bias.requires_grad_(False)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embedding(tokens))
        for block in self.blocks:
            x = x + block(x)
        out: Tensor = self.head(self.scale * x)
        return out


def optimizer_for(model: nn.Module, kind: str = "adamw") -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]  # the frozen bias is among them
    groups: list[dict[str, Any]] = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "lr": 0.02}]
    if kind == "sgd":
        groups[1]["momentum"] = 0.0
        return torch.optim.SGD(groups, lr=0.05, momentum=0.9)
    return torch.optim.AdamW(groups, lr=0.01, amsgrad=True)


def loss_of(model: nn.Module, step: int) -> Tensor:
    """The same on every rank, so that the number of ranks makes no difference."""
    tokens = torch.randint(11, (6,), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens).double(), tokens.roll(1))


def train_alone(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> dict[str, Tensor]:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train(zero: Zero, steps: range) -> None:
    for step in steps:
        zero.zero_grad()
        loss_of(zero.model, step).backward()
        zero.step()


def parameters_of(zero: Zero) -> dict[str, Tensor]:
    with zero.gathered():
        return {name: tensor.clone() for name, tensor in zero.model.state_dict().items()}


def save_ranks(stage: int, kind: str, full: bool, steps: range = range(3)) -> dict[str, Any]:
    model = Net()
    zero = Zero(model, optimizer_for(model, kind), stage=stage, bucket_bytes=300)
    train(zero, steps)
    return zero.state_dict(full=full)


def load_ranks(stage: int, kind: str, states: list[Any], settings: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(dist.get_rank())
    model = Net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(9.0)
    zero = Zero(model, optimizer_for(model, kind), stage=stage, bucket_bytes=500, **settings)
    train(zero, range(50, 51))  # what is loaded takes the place of what was learnt
    for group in zero.param_groups:
        group["lr"] = 7.0
    zero.load_state_dict(states[dist.get_rank()])
    train(zero, range(3, 6))
    return parameters_of(zero)


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Tensor]]:
    """The parameters of one process after six steps, by kind of optimizer."""
    found = {}
    for kind in ("sgd", "adamw"):
        model = Net()
        found[kind] = train_alone(model, optimizer_for(model, kind), range(6))
    return found


def agree(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_process_loads_the_whole_and_goes_on(stage: int, kind: str, expected: dict[str, dict[str, Tensor]]) -> None:
    whole, *others = simulate_ranks(save_ranks, 3, stage, kind, True).results

    assert others == [{}, {}]
    model = Net()
    reference = Net()
    optimizer, reference_optimizer = optimizer_for(model, kind), optimizer_for(reference, kind)
    train_alone(reference, reference_optimizer, range(3))
    plain = reference_optimizer.state_dict()
    assert list(whole["model"]) == list(reference.state_dict())
    assert whole["optimizer"]["param_groups"] == plain["param_groups"]
    torch.testing.assert_close(whole["optimizer"]["state"], plain["state"], rtol=1e-9, atol=1e-12)
    model.load_state_dict(whole["model"])
    optimizer.load_state_dict(whole["optimizer"])
    agree(train_alone(model, optimizer, range(3, 6)), expected[kind])


@pytest.mark.parametrize(("saved", "loaded"), [((1, 4), (3, 2)), ((2, 2), (1, 3)), ((3, 4), (2, 1)), ((3, 1), (3, 3))])
@pytest.mark.parametrize("full", [True, False])
def test_another_number_of_ranks_and_another_stage_go_on(
    saved: tuple[int, int], loaded: tuple[int, int], full: bool, expected: dict[str, dict[str, Tensor]]
) -> None:
    kind = "adamw" if full else "sgd"
    parts = simulate_ranks(save_ranks, saved[1], saved[0], kind, full).results
    states = [parts[0], {}, {}][: loaded[1]] if full else [parts[::-1]] * loaded[1]

    for found in simulate_ranks(load_ranks, loaded[1], loaded[0], kind, states, {}).results:
        agree(found, expected[kind])


@pytest.mark.parametrize("stage", [2, 3])
def test_each_ranks_own_part_is_enough_for_as_many_ranks(stage: int, expected: dict[str, dict[str, Tensor]]) -> None:
    def ranks() -> dict[str, Tensor]:
        model = Net()
        zero = Zero(model, optimizer_for(model), stage=stage)
        train(zero, range(3))
        part = zero.state_dict(full=False)
        train(zero, range(70, 72))
        zero.load_state_dict(part)
        train(zero, range(3, 6))
        return parameters_of(zero)

    for found in simulate_ranks(ranks, 3).results:
        agree(found, expected["adamw"])


def test_the_state_of_one_process_is_divided(expected: dict[str, dict[str, Tensor]]) -> None:
    def load(state: dict[str, Any]) -> dict[str, Tensor]:
        model = Net()
        zero = Zero(model, optimizer_for(model), stage=3)
        zero.load_state_dict(state)
        train(zero, range(3, 6))
        return parameters_of(zero)

    def begin_in_the_middle() -> dict[str, Tensor]:
        model = Net()
        optimizer = optimizer_for(model)
        train_alone(model, optimizer, range(3))
        zero = Zero(model, optimizer, stage=2)
        train(zero, range(3, 6))
        return parameters_of(zero)

    alone = Net()
    optimizer = optimizer_for(alone)
    train_alone(alone, optimizer, range(3))
    state = {"model": alone.state_dict(), "optimizer": optimizer.state_dict()}
    for found in simulate_ranks(load, 3, state).results + simulate_ranks(begin_in_the_middle, 2).results:
        agree(found, expected["adamw"])


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_without_a_number_of_their_own_count_the_same_steps(stage: int) -> None:
    def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.1)

    def steps_of(model: nn.Module, optimizer: Any, first: int) -> None:
        for step in range(first, first + 2):
            optimizer.zero_grad()
            model(torch.full((2, 3), step + 1.0)).square().mean().backward()
            optimizer.step()

    alone = nn.Linear(3, 1)
    start = {name: tensor.clone() for name, tensor in alone.state_dict().items()}
    optimizer = optimizer_of(alone)
    steps_of(alone, optimizer, 0)
    middle = {"model": alone.state_dict(), "optimizer": optimizer.state_dict()}
    middle = pickle.loads(pickle.dumps(middle))

    def ranks() -> tuple[dict[str, Any], dict[str, Any]]:
        model = nn.Linear(3, 1)
        model.load_state_dict(start)
        zero = Zero(model, optimizer_of(model), stage=stage)  # 5 numbers, 3 of padding
        zero.load_state_dict(middle)
        at_once = zero.state_dict(everywhere=True)
        steps_of(model, zero, 2)
        return at_once, zero.state_dict(everywhere=True)

    results = simulate_ranks(ranks, 8).results
    steps_of(alone, optimizer, 2)
    for at_once, later in results:
        assert torch.equal(at_once["optimizer"]["state"][1]["exp_avg"], middle["optimizer"]["state"][1]["exp_avg"])
        assert all(float(state["step"]) == 4 for state in later["optimizer"]["state"].values())
        torch.testing.assert_close(later["model"], dict(alone.state_dict()))


def test_parts_are_files_of_tensors_and_text(tmp_path: Path, expected: dict[str, dict[str, Tensor]]) -> None:
    """Saved by three real processes, loaded by two."""

    def save() -> None:
        state = save_ranks(3, "adamw", False)
        name = tmp_path / f"part-{dist.get_rank()}.safetensors"
        save_file(state["tensors"], name, metadata={"zero": "yes"})
        name.with_suffix(".json").write_text(json.dumps(state["metadata"]))

    def load() -> dict[str, Tensor]:
        parts = [
            {"tensors": load_file(path), "metadata": json.loads(path.with_suffix(".json").read_text())}
            for path in sorted(tmp_path.glob("*.safetensors"))
        ]
        return load_ranks(2, "adamw", [parts, parts], {})

    run_ranks(save, 3)
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert max(sizes) < 2 * min(sizes)
    for found in run_ranks(load, 2):
        agree(found, expected["adamw"])


def test_replicas_share_one_set_of_parts(expected: dict[str, dict[str, Tensor]]) -> None:
    def ranks(states: list[Any]) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
        group, replicate_group = mics_groups(2)
        found = load_ranks(3, "adamw", states, {"group": group, "replicate_group": replicate_group})
        model = Net()
        zero = Zero(model, optimizer_for(model), stage=3, group=group, replicate_group=replicate_group)
        train(zero, range(6))
        return found, zero.state_dict(), zero.state_dict(full=False)

    whole = simulate_ranks(save_ranks, 2, 3, "adamw", True).results[0]
    results = simulate_ranks(ranks, 4, [whole, {}, {}, {}]).results
    for found, _, _ in results:
        agree(found, expected["adamw"])
    assert [bool(whole) for _, whole, _ in results] == [True, False, False, False]
    agree(results[0][1]["model"], expected["adamw"])
    parts = [part for _, _, part in results]
    again = simulate_ranks(load_ranks, 3, 1, "adamw", [parts[:2]] * 3, {}).results[0]
    assert again.keys() == expected["adamw"].keys()


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3))
def test_parts_hold_every_number_once_and_are_put_together_again(
    sizes: list[int], n_saved: int, n_loaded: int, stage: int
) -> None:
    def model() -> nn.Module:
        torch.manual_seed(1)
        return nn.ParameterList([nn.Parameter(torch.randn(size)) for size in sizes])

    def save() -> dict[str, Any]:
        net = model()
        return Zero(net, torch.optim.SGD(net.parameters(), lr=1.0), stage=stage).state_dict(full=False)

    def load(parts: list[Any]) -> dict[str, Tensor]:
        net = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])
        zero = Zero(net, torch.optim.SGD(net.parameters(), lr=1.0), stage=stage)
        zero.load_state_dict(parts)
        return parameters_of(zero)

    parts = simulate_ranks(save, n_saved).results
    held = [tensor for part in parts for name, tensor in part["tensors"].items()]
    assert torch.equal(torch.cat(held).sort()[0], torch.cat([p.detach() for p in model().parameters()]).sort()[0])
    for found in simulate_ranks(load, n_loaded, parts).results:
        torch.testing.assert_close(found, model().state_dict(), rtol=0.0, atol=0.0)


def test_what_does_not_fit_is_refused_in_words() -> None:
    def load(states: list[Any]) -> None:
        model = Net()
        Zero(model, optimizer_for(model), stage=3).load_state_dict(states[dist.get_rank()])

    parts = simulate_ranks(save_ranks, 3, 3, "adamw", False).results
    whole = simulate_ranks(save_ranks, 1, 1, "adamw", True).results[0]
    lacking = {**whole, "model": {name: value for name, value in whole["model"].items() if name != "scale"}}
    bent = {**whole, "model": {**whole["model"], "scale": torch.zeros(2)}}
    fewer = {**whole, "optimizer": {**whole["optimizer"], "param_groups": whole["optimizer"]["param_groups"][:1]}}
    for state, words in [
        ([parts[0], parts[1]], "list of all the parts"),
        ([lacking, {}], "on the first rank: state must have scale, which is missing"),
        ([bent, bent], r"scale of shape \(\), got \(2,\)"),
        ([fewer, {}], "optimizer with groups of"),
        ([{}, {}], "state must have 'model' and 'optimizer'"),
        ([3, 3], "must be a dictionary or a list of parts, got int"),
        ([[{"a": 1}]] * 2, "must be parts of the format"),
    ]:
        with pytest.raises(RankError, match=words):
            simulate_ranks(load, 2, state)


def test_the_states_own_numbers_stay_when_training_goes_on() -> None:
    def ranks() -> bool:
        model = Net()
        zero = Zero(model, optimizer_for(model), stage=3)
        train(zero, range(1))
        before = [zero.state_dict(everywhere=True)["model"], zero.state_dict(full=False)["tensors"]]
        copies = [{name: tensor.clone() for name, tensor in state.items()} for state in before]
        train(zero, range(1, 3))
        return all(torch.equal(a[name], b[name]) for a, b in zip(before, copies, strict=True) for name in a)

    assert simulate_ranks(ranks, 2).results == [True, True]
