"""CPUAdam: AdamW over master weights in one pass, held against torch.optim.AdamW with conversions around it."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from minillm.optim import AdamW, CPUAdam

SHAPES = [(5, 7), (7,), (2, 3, 4), (), (0, 3)]
HYPER = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def draw(seed: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@settings(max_examples=25, deadline=None)
@given(
    tile=st.sampled_from([1, 3, 8, 2**18]),
    low=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    master=st.sampled_from([torch.float32, torch.float64]),
    in_place=st.booleans(),
)
def test_equals_torch_with_gradients_widened_and_parameters_rounded(
    tile: int, low: torch.dtype, master: torch.dtype, in_place: bool
) -> None:
    ours, theirs = draw(0, master), [tensor.requires_grad_() for tensor in draw(0, master)]
    optimizer, oracle = CPUAdam(ours, **HYPER, tile=tile), torch.optim.AdamW(theirs, **HYPER, fused=True)
    for step in range(1, 5):
        gradients = draw(step, low)
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient.to(master)
        oracle.step()
        rounded = gradients if in_place else [torch.empty(shape, dtype=low) for shape in SHAPES]
        optimizer.step(gradients=dict(zip(ours, gradients, strict=True)), copies=dict(zip(ours, rounded, strict=True)))
        for mine, other, copied in zip(ours, theirs, rounded, strict=True):
            torch.testing.assert_close(mine, other.detach(), rtol=1e-6 if master is torch.float32 else 1e-13, atol=0)
            assert torch.equal(copied, mine.to(low))


def test_takes_grad_like_any_optimizer_and_leaves_alone_what_has_none() -> None:
    ours, theirs = draw(0, torch.float64), draw(0, torch.float64)
    optimizer, oracle = CPUAdam(ours, **HYPER), torch.optim.AdamW(theirs, **HYPER)
    for step in range(6):
        for mine, other, gradient in zip(ours, theirs, draw(step, torch.float64), strict=True):
            mine.grad = other.grad = gradient
        if step % 2:
            ours[1].grad = theirs[1].grad = None
        optimizer.step()
        oracle.step()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-13, atol=1e-15)
    assert optimizer.state[ours[1]]["step"].item() == 3


def test_masters_gather_updates_that_bfloat16_would_lose() -> None:
    master, rounded = torch.ones(8), torch.ones(8, dtype=torch.bfloat16)
    optimizer = CPUAdam([master], lr=1e-4, weight_decay=0.0)
    alone = AdamW([lonely := torch.ones(8, dtype=torch.bfloat16)], lr=1e-4, weight_decay=0.0, fused=True)
    gradient = torch.ones(8, dtype=torch.bfloat16)
    for _ in range(100):
        optimizer.step(gradients={master: gradient}, copies={master: rounded})
        lonely.grad = gradient
        alone.step()
    assert (lonely == 1).all()  # each update is less than half of bfloat16's last bit
    torch.testing.assert_close(master, torch.full((8,), 0.99), rtol=1e-5, atol=0)
    assert (rounded == torch.tensor(0.99).bfloat16()).all()


@pytest.mark.parametrize("other_kind", [AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("ours_first", [True, False])
def test_state_goes_over_to_and_from_other_adamws(other_kind: type[torch.optim.Optimizer], ours_first: bool) -> None:
    kinds = (CPUAdam, other_kind) if ours_first else (other_kind, CPUAdam)
    parameters = draw(0, torch.float64)
    first = kinds[0](parameters, **HYPER)
    for step in range(3):
        for parameter, gradient in zip(parameters, draw(step, torch.float64), strict=True):
            parameter.grad = gradient
        first.step()
    moved = [parameter.clone() for parameter in parameters]
    second = kinds[1](moved, lr=0.5)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for parameter, twin, gradient in zip(parameters, moved, draw(9, torch.float64), strict=True):
        parameter.grad, twin.grad = gradient, gradient.clone()
    first.step()
    second.step()
    for one, other in zip(parameters, moved, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)


def test_a_copy_of_the_optimizer_keeps_its_tile() -> None:
    assert copy.deepcopy(CPUAdam([torch.zeros(3)], tile=5)).param_groups[0]["tile"] == 5


def test_returns_the_closures_loss() -> None:
    weight = torch.tensor([3.0], requires_grad=True)
    optimizer = CPUAdam([weight], lr=0.1)

    def closure() -> float:
        loss = (weight**2).sum()
        loss.backward()
        return loss.item()

    assert optimizer.step(closure) == 9.0
    assert weight.item() < 3.0


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="tile must be at least 1, got 0"):
        CPUAdam([torch.zeros(2)], tile=0)
    with pytest.raises(TypeError, match="tile must be an integer"):
        CPUAdam([torch.zeros(2)], tile=1.5)
    with pytest.raises(ValueError, match="lr must be"):
        CPUAdam([torch.zeros(2)], lr=-1.0)
    crooked = torch.zeros(2, 3).t()
    with pytest.raises(ValueError, match=r"contiguous and on the CPU, got one of shape \(3, 2\)"):
        CPUAdam([crooked]).step(gradients={crooked: torch.zeros(3, 2)})
    weight = torch.zeros(2)
    with pytest.raises(TypeError, match="dense gradients"):
        CPUAdam([weight]).step(gradients={weight: torch.zeros(2).to_sparse()})
