"""Philox is Random123's and Triton's; dropped weights are as many as asked for and independent of each other."""

import os

import pytest
import torch

from minillm.layers.counter_random import attention_dropout_kept, philox_4x32

# Random123's own known answers, tests/kat_vectors, lines "philox4x32": rounds, counter, key, result.
KNOWN_ANSWERS = """
7  00000000 00000000 00000000 00000000  00000000 00000000  5f6fb709 0d893f64 4f121f81 4f730a48
7  ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  5207ddc2 45165e59 4d8ee751 8c52f662
7  243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  4dfccaba 190a87f0 c47362ba b6b5242a
10 00000000 00000000 00000000 00000000  00000000 00000000  6627e8d5 e169c58d bc57ac4c 9b00dbd8
10 ffffffff ffffffff ffffffff ffffffff  ffffffff ffffffff  408f276d 41c83b0e a20bc7c6 6d5451fd
10 243f6a88 85a308d3 13198a2e 03707344  a4093822 299f31d0  d16cfe09 94fdcceb 5001e420 24126ea1
"""


@pytest.mark.parametrize("line", KNOWN_ANSWERS.strip().splitlines())
def test_known_answers(line: str) -> None:
    rounds, *words = line.split()
    numbers = [int(word, 16) for word in words]
    counter = tuple(torch.tensor([number]) for number in numbers[:4])
    seed = numbers[4] | numbers[5] << 32
    assert [word.item() for word in philox_4x32(counter, seed, n_rounds=int(rounds))] == numbers[6:]


def test_counters_broadcast() -> None:
    axes = [torch.arange(3 + axis).view(-1, *(1,) * (3 - axis)) for axis in range(4)]
    words = philox_4x32(tuple(axes), 2**63 + 5)
    for i, j, k, n in ((0, 0, 0, 0), (2, 1, 3, 5), (1, 3, 4, 0)):
        single = philox_4x32(tuple(torch.tensor(number) for number in (i, j, k, n)), 2**63 + 5)
        assert [word[i, j, k, n].item() for word in words] == [word.item() for word in single]


@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton needs a GPU, or its interpreter (TRITON_INTERPRET=1)",
)
@pytest.mark.parametrize("seed", [0, 12345, 2**31 + 7, 2**40 + 3])
def test_triton_has_the_same_numbers(seed: int) -> None:
    triton = pytest.importorskip("triton")
    tl = triton.language

    @triton.jit
    def draw(out_ptr, seed, query, n: tl.constexpr):
        key = tl.arange(0, n)
        word, second, third, fourth = tl.philox(seed, key, query + key * 0, key * 0 + 1, key * 0 + 2)
        for row, numbers in enumerate((word, second, third, fourth)):
            tl.store(out_ptr + row * n + key, numbers.to(tl.int64))

    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = torch.zeros(4, 16, dtype=torch.int64, device=device)
    draw[(1,)](out, seed, 9, 16)
    counter = (torch.arange(16), torch.tensor(9), torch.tensor(1), torch.tensor(2))
    assert torch.equal(out.cpu() & 0xFFFFFFFF, torch.stack(philox_4x32(counter, seed)))


def _numbers(batch: int, heads: int, queries: int, keys: int) -> list[torch.Tensor]:
    return [torch.arange(size).view(-1, *(1,) * (3 - axis)) for axis, size in enumerate((batch, heads, queries, keys))]


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.97])
def test_as_many_are_dropped_as_asked_for(p: float) -> None:
    kept = attention_dropout_kept(*_numbers(2, 3, 100, 150), p=p, seed=11).double()
    spread = (p * (1 - p)) ** 0.5
    for axes in ((0, 1, 2, 3), (1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2)):  # in all, and along each axis
        count = kept.numel() / kept.mean(axes).numel()
        assert ((kept.mean(axes) - (1 - p)).abs() <= 4.5 * spread / count**0.5 + 1e-12).all()


def test_neighbours_and_seeds_share_nothing() -> None:
    kept = attention_dropout_kept(*_numbers(2, 3, 60, 70), p=0.5, seed=3)
    signs = kept.double() * 2 - 1
    others = [signs.roll(1, axis) for axis in range(4)]
    others.append(attention_dropout_kept(*_numbers(2, 3, 60, 70), p=0.5, seed=4).double() * 2 - 1)
    others.append(attention_dropout_kept(*_numbers(2, 3, 60, 70), p=0.5, seed=3 + 2**32).double() * 2 - 1)
    for other in others:
        assert abs((signs * other).mean()) < 4.5 / signs.numel() ** 0.5
    above = torch.ones(60, 60).triu(1).bool()  # the numbers of query and key change places
    assert abs((signs[..., :60] * signs[..., :60].mT)[..., above].mean()) < 4.5 / (6 * above.sum()) ** 0.5


def test_the_counter_is_key_query_head_batch() -> None:
    batch, head, query, key = _numbers(2, 3, 5, 7)
    kept = attention_dropout_kept(batch, head, query, key, p=0.25, seed=9)
    assert torch.equal(kept, philox_4x32((key, query, head, batch), 9)[0] >= 2**30)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_that_is_no_key_is_refused(seed: int) -> None:
    with pytest.raises(ValueError, match="seed must be in"):
        philox_4x32((torch.tensor(0),) * 4, seed)
