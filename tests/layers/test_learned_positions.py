"""Learned positions against torch's Embedding."""

import pytest
import torch

from minillm.layers import LearnedPositions


def test_learned_positions_are_an_embedding_of_the_place():
    layer = LearnedPositions(10, 4)
    twin = torch.nn.Embedding(10, 4, _weight=layer.weight.detach().clone())
    positions = torch.tensor([[0, 3], [9, 3]])
    torch.testing.assert_close(layer(positions), twin(positions))
    torch.testing.assert_close(layer.span(2, 5), twin(torch.arange(2, 7)))
    layer.span(2, 5).square().sum().backward()
    twin(torch.arange(2, 7)).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, twin.weight.grad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LearnedPositions(0, 4), "at least 1"),
        (lambda: LearnedPositions(8, 4)(torch.tensor([3, 8])), r"positions must be in \[0, 8\) .* 3 to 8"),
        (lambda: LearnedPositions(8, 4).span(5, 4), "positions 5 to 8 asked for, of 8"),
    ],
)
def test_bad_input_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()
