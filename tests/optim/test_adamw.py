"""AdamW and its decay groups, held against torch.optim.AdamW."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from minillm.optim import AdamW, parameter_groups


def make_parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(5, 7), (7,), (2, 3, 4), ()]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(parameters: list[nn.Parameter], step: int) -> None:
    """Random gradients; the last parameter has none at odd steps."""
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    if step % 2:
        parameters[-1].grad = None


def tensors_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state_dict()["state"].values() for value in state.values()]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equals_torch_over_many_steps(dtype: torch.dtype, fused: bool) -> None:
    ours, theirs = make_parameters(dtype), make_parameters(dtype)
    settings_ = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    optimizer = AdamW(ours, **settings_, fused=fused)
    oracle = torch.optim.AdamW(theirs, **settings_, fused=fused)
    for step in range(60):
        for group in (*optimizer.param_groups, *oracle.param_groups):
            group["lr"] = 0.02 * (1 + step % 7)
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        oracle.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)
    for mine, other in zip(tensors_of(optimizer), tensors_of(oracle), strict=True):
        assert torch.equal(mine, other)


def test_fused_and_readable_forms_agree() -> None:
    readable, fused = make_parameters(), make_parameters()
    optimizers = [AdamW(readable, lr=0.03, weight_decay=0.2), AdamW(fused, lr=0.03, weight_decay=0.2, fused=True)]
    for step in range(50):
        set_gradients(readable, step)
        set_gradients(fused, step)
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(readable, fused, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    lr=st.floats(0, 1),
    beta1=st.floats(0, 0.999),
    beta2=st.floats(0, 0.999),
    eps=st.floats(1e-10, 1e-2),
    weight_decay=st.floats(0, 1),
    scale=st.sampled_from([1e-12, 1e-3, 1.0, 1e6]),
)
def test_equals_torch_for_any_hyperparameters(
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, scale: float
) -> None:
    ours, theirs = make_parameters(), make_parameters()
    hyper = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay}
    optimizer, oracle = AdamW(ours, **hyper), torch.optim.AdamW(theirs, **hyper)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        for parameter in (*ours, *theirs):
            if parameter.grad is not None:
                parameter.grad *= scale
        optimizer.step()
        oracle.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("direction", ["ours to torch", "torch to ours"])
def test_state_dicts_are_interchangeable(direction: str, fused: bool) -> None:
    parameters = make_parameters()
    kinds = [AdamW, torch.optim.AdamW]
    first_kind, second_kind = kinds if direction == "ours to torch" else kinds[::-1]
    first = first_kind(parameters, lr=0.01, weight_decay=0.1, fused=fused)
    for step in range(3):
        set_gradients(parameters, step)
        first.step()
    moved = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    second = second_kind(moved, lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(3, 6):
        set_gradients(parameters, step)
        set_gradients(moved, step)
        first.step()
        second.step()
    for one, other in zip(parameters, moved, strict=True):
        assert torch.equal(one, other)


def test_closure_is_called_with_gradients() -> None:
    weight = nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamW([weight], lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (weight**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 9.0
    assert weight.item() < 3.0


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)


def test_groups_of_a_model_with_tied_and_frozen_weights() -> None:
    model = Tied()
    decayed, plain = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0.0
    assert [id(p) for p in decayed["params"]] == [id(model.embedding.weight), id(model.hidden.weight)]
    assert [id(p) for p in plain["params"]] == [id(p) for p in (model.hidden.bias, *model.norm.parameters())]


def test_zero_gradients_show_what_decays() -> None:
    model = Tied()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = AdamW(parameter_groups(model, 0.5), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 0.95 if parameter.dim() >= 2 and parameter.requires_grad else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_a_model_of_matrices_only_gives_one_group() -> None:
    assert len(parameter_groups(nn.Linear(3, 3, bias=False), 0.1)) == 1


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan"), float("inf")])
def test_groups_refuse_a_bad_decay(weight_decay: float) -> None:
    with pytest.raises(ValueError, match="weight_decay"):
        parameter_groups(nn.Linear(2, 2), weight_decay)


def test_groups_refuse_a_frozen_model() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(nn.Linear(2, 2).requires_grad_(False), 0.1)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("lr", -1.0), ("lr", float("nan")), ("eps", -1e-8), ("weight_decay", -0.1), ("betas", (0.9, 1.0))],
)
def test_bad_hyperparameters_are_named(argument: str, value: object) -> None:
    with pytest.raises(ValueError, match=argument):
        AdamW(make_parameters(), **{argument: value})


def test_sparse_gradients_and_complex_parameters_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="sparse"):
        AdamW(embedding.parameters()).step()
    with pytest.raises(TypeError, match="complex64"):
        AdamW([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
