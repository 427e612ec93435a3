"""Weight stashing: old values stay as long as a pass needs them, no longer, and in no more memory than that."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from minillm.distributed.pipeline.weight_versions import WeightVersions


def module(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def bytes_of(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def update(versions: WeightVersions, model: nn.Module, by: float = 0.5) -> None:
    versions.update()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by


def grads_of(model: nn.Module, weights: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """By one process, from copies of the weights."""
    copies = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    functional_call(model, copies, (x,)).square().sum().backward()
    return [copy.grad for copy in copies.values() if copy.grad is not None]


def test_a_backward_pass_after_updates_has_the_gradient_of_the_old_weights() -> None:
    model, x = module(), torch.randn(5, 3, dtype=torch.float64)
    versions = WeightVersions(model, Counter({0: 1, 1: 1}))
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    out = functional_call(model, versions.leaves(0), (x,)).square().sum()
    update(versions, model)
    new = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = functional_call(model, versions.leaves(1), (x,)).square().sum()
    update(versions, model)

    out.backward()
    versions.collect(0)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads_of(model, old, x), strict=True))
    model.zero_grad()
    after.backward()
    versions.collect(1)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads_of(model, new, x), strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_as_many_versions_are_in_memory_as_are_needed(dtype: torch.dtype) -> None:
    model = module(dtype)
    own = bytes_of(model)
    versions = WeightVersions(model, Counter({0: 1, 2: 2}))
    x = torch.randn(5, 3, dtype=dtype)
    first = functional_call(model, versions.leaves(0), (x,)).sum()
    assert (versions.n_versions, versions.n_bytes) == (1, own)
    update(versions, model)  # 0 is needed, so 1 is new memory
    assert (versions.n_versions, versions.n_bytes) == (2, 2 * own)
    places = [p.data_ptr() for p in model.parameters()]
    update(versions, model)  # nobody needs 1: changed in place
    assert [p.data_ptr() for p in model.parameters()] == places
    assert (versions.n_versions, versions.n_bytes) == (2, 2 * own)
    update(versions, model)  # 2 is needed by passes that have not begun
    assert (versions.n_versions, versions.n_bytes, versions.most_versions) == (3, 3 * own, 3)
    first.backward()
    versions.collect(0)
    assert (versions.n_versions, versions.n_bytes) == (2, 2 * own)
    for left in (1, 0):
        functional_call(model, versions.leaves(2), (x,)).sum().backward()
        versions.collect(2)
        assert versions.n_versions == 1 + bool(left)
    assert versions.n_bytes == own


def test_a_frozen_parameter_is_there_once() -> None:
    model = module()
    model[0].requires_grad_(False)
    frozen = bytes_of(model[0])
    versions = WeightVersions(model, Counter({0: 1, 1: 1}))
    update(versions, model)
    assert versions.n_bytes == 2 * bytes_of(model) - frozen
    out = functional_call(model, versions.leaves(0), (torch.ones(1, 3, dtype=torch.float64),)).sum()
    out.backward()
    versions.collect(0)
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None


def test_gradients_add_up_and_run_in_accumulated_memory_of_their_own() -> None:
    model, x = module(), torch.randn(5, 3, dtype=torch.float64)
    versions = WeightVersions(model, Counter({0: 2}))
    single = grads_of(model, dict(model.named_parameters()), x)
    for _ in range(2):
        functional_call(model, versions.leaves(0), (x,)).square().sum().backward()
        versions.collect(0)
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), single, strict=True))


def test_without_stashing_autograd_goes_back_through_other_weights_and_says_nothing() -> None:
    """f = w2 (w1 x): the gradient of w1 is w2 x, and with w2 changed in between it is the new w2's."""
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)).double()
    with torch.no_grad():
        model[0].weight.fill_(3.0)
        model[1].weight.fill_(5.0)
    x = torch.tensor([[2.0]], dtype=torch.float64)
    stashed = {}
    for stashing in (True, False):
        for parameter in model.parameters():
            parameter.grad = None
        versions = WeightVersions(model, Counter({0: 1}), stashing=stashing)
        out = functional_call(model, versions.leaves(0), (x,)).sum()
        update(versions, model, by=1.0)
        out.backward()
        versions.collect(0)
        stashed[stashing] = [p.grad.item() for p in model.parameters() if p.grad is not None]
        update(versions, model, by=-1.0)
    assert stashed[True] == [5.0 * 2.0, 3.0 * 2.0]
    assert stashed[False] == [6.0 * 2.0, 3.0 * 2.0]  # of no function of these weights: w1's is the new w2's
    assert versions.n_versions == 1


def test_a_version_that_is_gone_is_named() -> None:
    model = module()
    versions = WeightVersions(model, Counter())
    update(versions, model)
    with pytest.raises(LookupError, match="version 0 are gone: version 1 is the newest"):
        versions.leaves(0)


def test_a_run_begins_with_the_weights_of_now() -> None:
    model = module()
    versions = WeightVersions(model, Counter({0: 1}))
    update(versions, model)
    versions.begin()
    leaves = versions.leaves(0)
    assert all(torch.equal(leaves[name], p) for name, p in model.named_parameters())
    assert versions.n_bytes == bytes_of(model)
