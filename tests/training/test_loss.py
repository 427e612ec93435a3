"""Gradient accumulation gives the gradient of the one big batch, however the tokens are spread over the batches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from minillm.training.loss import IGNORED, accumulate_gradients, mean_loss, summed_cross_entropy

CPU = torch.device("cpu")
VOCAB_SIZE = 11


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCAB_SIZE, 6), nn.Tanh(), nn.Linear(6, VOCAB_SIZE)).double()


def make_batch(rows: int, length: int, ignored: float, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = (torch.randint(VOCAB_SIZE, (rows, length), generator=generator) for _ in range(2))
    return inputs, targets.masked_fill(torch.rand(rows, length, generator=generator) < ignored, IGNORED)


def gradients(model: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 9), st.sampled_from([0.0, 0.5, 1.0])), min_size=1, max_size=4
    ),
    seed=st.integers(0, 1000),
)
def test_equals_the_one_big_batch(shapes: list[tuple[int, int, float]], seed: int) -> None:
    batches = [make_batch(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    if all((targets == IGNORED).all() for _, targets in batches):
        return
    ours = make_model()
    loss, n_targets = accumulate_gradients(ours, batches, CPU)
    oracle = make_model()
    logits = torch.cat([oracle(inputs).flatten(0, 1) for inputs, _ in batches])
    targets = torch.cat([targets.flatten() for _, targets in batches])
    expected = F.cross_entropy(logits, targets)
    expected.backward()
    assert n_targets == (targets != IGNORED).sum()
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(ours), gradients(oracle), rtol=1e-12, atol=1e-14)
    assert mean_loss(ours, batches, CPU) == pytest.approx(expected.item(), rel=1e-5)


def test_the_mean_of_means_would_be_wrong() -> None:
    """The mistake that this guards against does change the gradient."""
    batches = [make_batch(4, 9, 0.0, 0), make_batch(1, 2, 0.0, 1)]
    ours, mistaken = make_model(), make_model()
    accumulate_gradients(ours, batches, CPU)
    for inputs, targets in batches:
        (F.cross_entropy(mistaken(inputs).flatten(0, 1), targets.flatten()) / 2).backward()
    assert not torch.allclose(gradients(ours), gradients(mistaken), rtol=1e-2)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary() -> None:
    total = summed_cross_entropy(torch.zeros(3, 5, VOCAB_SIZE), torch.ones(3, 5, dtype=torch.int64))
    assert total.item() == pytest.approx(15 * math.log(VOCAB_SIZE))


def test_nothing_to_learn_from_is_an_error() -> None:
    nothing = make_batch(2, 3, 1.1, 0)
    with pytest.raises(ValueError, match="no target to learn from"):
        accumulate_gradients(make_model(), [nothing], CPU)
    with pytest.raises(ValueError, match="no target to evaluate on"):
        mean_loss(make_model(), [], CPU)
