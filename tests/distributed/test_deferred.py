"""The two halves of a backward pass: together they are autograd's whole one."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from minillm.distributed.memory import measure_memory
from minillm.distributed.pipeline.deferred import DeferredGradients, deferring


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


def whole(module: nn.Module, x: Tensor, out_grad: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, object]:
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    out = module(x)
    out.backward(out_grad(out))
    return x.grad, gradients(module)


def halves(module: nn.Module, x: Tensor, out_grad: Callable[[Tensor], Tensor]) -> tuple[Tensor | None, object]:
    later = DeferredGradients()
    x = x.detach().clone().requires_grad_(x.is_floating_point())
    with deferring(later):
        out = module(x)
    out.backward(out_grad(out))
    later.run()
    assert len(later) == 0
    return x.grad, gradients(module)


class Shared(nn.Module):
    """One weight twice, and a functional call by keywords."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.inner(x)) * self.scale
        return F.linear(input=self.inner(x), weight=self.inner.weight, bias=None)


class Tied(nn.Module):
    """A batch of integers: the first half begins at nothing that needs a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.embedding(tokens), self.embedding.weight)


def frozen(weight: bool, bias: bool) -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6), nn.LayerNorm(6))
    module[2].weight.requires_grad_(not weight)
    module[2].bias.requires_grad_(not bias)
    return module


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 3),
    "no bias": lambda: nn.Linear(6, 3, bias=False),
    "deep": lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2), nn.Tanh()),
    "one weight twice": Shared,
    "tied": Tied,
    "no linear": lambda: nn.Sequential(nn.LayerNorm(6), nn.Conv1d(4, 2, 3)),
    "frozen weight": lambda: frozen(weight=True, bias=False),
    "frozen bias": lambda: frozen(weight=False, bias=True),
    "all of a layer frozen": lambda: frozen(weight=True, bias=True),
    "attention": lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0, batch_first=True),
    "weight made from another": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)),
}


@pytest.mark.parametrize("name", MODULES)
def test_halves_together_are_the_whole_backward(name: str) -> None:
    module = MODULES[name]().double()
    x = torch.randint(11, (5, 4)) if name == "tied" else torch.randn(5, 4, 6, dtype=torch.float64)

    def out_grad(out: Tensor) -> Tensor:
        return torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)

    expected = whole(copy.deepcopy(module), x, out_grad)
    found = halves(module, x, out_grad)

    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-15)


@settings(max_examples=25, deadline=None)
@given(
    lead=st.lists(st.integers(0, 3), max_size=3),
    d_in=st.integers(1, 5),
    d_out=st.integers(1, 5),
    bias=st.booleans(),
    input_gradient=st.booleans(),
)
def test_any_shape_of_input(lead: list[int], d_in: int, d_out: int, bias: bool, input_gradient: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(d_in, d_out, bias=bias).double()
    x, grad = torch.randn(*lead, d_in, dtype=torch.float64), torch.randn(*lead, d_out, dtype=torch.float64)
    results = []
    for kept in (None, DeferredGradients()):
        layer.zero_grad()
        leaf = x.clone().requires_grad_(input_gradient)
        with deferring(kept):
            out = layer(leaf)
        out.backward(grad)
        if kept is not None:
            assert all(parameter.grad is None for parameter in layer.parameters())
            kept.run()
        results.append((out.detach(), leaf.grad, gradients(layer)))

    torch.testing.assert_close(results[1], results[0], rtol=1e-13, atol=1e-15)


def test_the_first_half_leaves_the_weights_alone_and_half_of_the_products_to_the_second() -> None:
    module = nn.Sequential(*(nn.Linear(16, 16) for _ in range(3)))
    later = DeferredGradients()
    x = torch.randn(10, 16, requires_grad=True)
    with deferring(later):
        out = module(x)
    with FlopCounterMode(display=False) as first:
        out.sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in module.parameters())
    assert len(later) == 3
    with FlopCounterMode(display=False) as second:
        later.run()
    assert first.get_total_flops() == second.get_total_flops() == 3 * 2 * 10 * 16 * 16


def test_gradients_are_added_to_what_is_there_and_several_micro_batches_may_wait() -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    other = copy.deepcopy(module)
    batches = [torch.randn(n, 4, dtype=torch.float64) for n in (3, 1, 4)]
    for _ in range(2):
        waiting = []
        for x in batches:
            other(x).square().sum().backward()
            waiting.append(DeferredGradients())
            with deferring(waiting[-1]):
                loss = module(x).square().sum()
            loss.backward()
        for later in reversed(waiting):
            later.run()

    torch.testing.assert_close(gradients(module), gradients(other), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2)).to(dtype)
    x = torch.randn(5, 6, dtype=dtype)

    expected = whole(copy.deepcopy(module), x, torch.ones_like)
    found = halves(module, x, torch.ones_like)

    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)).to(dtype)
    x = torch.randn(5, 6, dtype=dtype)

    with torch.autocast("cpu", torch.bfloat16):
        expected_out = copy.deepcopy(module)(x)
        with deferring(DeferredGradients()):
            out = module(x)
    assert out.dtype == expected_out.dtype
    torch.testing.assert_close(out, expected_out)
    results = []
    for run in (whole, halves):
        one = copy.deepcopy(module)
        with torch.autocast("cpu", torch.bfloat16):
            results.append(run(one, x, torch.ones_like))

    torch.testing.assert_close(results[1], results[0])


def test_dtypes_that_do_not_fit_are_refused_as_ever() -> None:
    with pytest.raises(RuntimeError, match="must have the same dtype"), deferring(DeferredGradients()):
        nn.Linear(3, 3)(torch.ones(2, 3, dtype=torch.bfloat16))


def test_without_gradients_nothing_is_kept() -> None:
    layer, later = nn.Linear(3, 3), DeferredGradients()
    with deferring(later), torch.no_grad():
        assert not layer(torch.ones(2, 3)).requires_grad
    layer.requires_grad_(False)
    with deferring(later):
        assert not layer(torch.ones(2, 3)).requires_grad
        x = torch.ones(2, 3, requires_grad=True)
        layer(x).sum().backward()
    assert x.grad is not None
    assert len(later) == 0


def test_what_waits_is_freed_when_it_is_done() -> None:
    layer = nn.Linear(64, 64, bias=False)
    later = DeferredGradients()
    with measure_memory(layer) as memory:
        x = torch.randn(100, 64)
        with deferring(later):
            out = layer(x).square()
        out.sum().backward()
        del out, x
        waiting = memory.live
        later.run()
        done = memory.live
    assert waiting["activations"] + waiting["other"] >= 2 * 100 * 64 * 4  # x and the output's gradient
    assert done["activations"] + done["other"] < 100
    assert done["gradients"] == 64 * 64 * 4


def test_an_update_between_the_halves_forward_and_backward_is_told() -> None:
    layer = nn.Linear(3, 3)
    x = torch.ones(2, 3, requires_grad=True)
    with deferring(DeferredGradients()):
        loss = layer(x).sum()
    with torch.no_grad():
        layer.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
