"""Online softmax: the sums behind a softmax over blocks of scores, in one pass, and the merge of partial results.

A softmax over ``x_1 .. x_n`` needs the highest score ``m = max x_i`` (so that no exponential overflows) and the sum
``l = sum exp(x_i - m)``. Read off the definitions that takes two passes: every score is looked at for ``m`` before the
first exponential can be taken. Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", Algorithm 3,
do it in one, with a running maximum and a sum that is corrected whenever the maximum rises:

    m_j = max(m_{j-1}, x_j)            l_j = l_{j-1} * exp(m_{j-1} - m_j) + exp(x_j - m_j)

Why the two are equal. Claim: after j scores ``m_j = max_{i<=j} x_i`` and ``l_j = sum_{i<=j} exp(x_i - m_j)``. For j = 0
both are empty: ``m_0 = -inf, l_0 = 0``. If it holds for j - 1, then

    l_{j-1} * exp(m_{j-1} - m_j) = sum_{i<j} exp(x_i - m_{j-1}) * exp(m_{j-1} - m_j) = sum_{i<j} exp(x_i - m_j)

and adding ``exp(x_j - m_j)`` gives the sum to j. At j = n that is what two passes compute. Nothing in it needs ``x_j``
to be a single score: with a block of scores, its maximum and its sum, the same two lines hold. And nothing needs the
sum to be of ones: with ``exp(x_i - m) v_i`` in place of ``exp(x_i - m)`` it is the numerator of attention, which is
therefore computed in the same single pass (Rabe and Staats 2021; Dao et al. 2022, "FlashAttention", section 3.1).

The two lines are also a product of pairs, ``(m, l) * (m', l')``, that is associative and commutative: partial results
over any division of the keys can be merged in any order. Split-KV decoding and ring attention are that merge.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minillm.kernels.flash_decode.reference import merge_partial_attention as merge_partial_attention
from minillm.layers.arguments import at_least

_LOG2_E = math.log2(math.e)


def softmax_statistics_two_pass(scores: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """Highest score and ``sum exp(score - highest)`` over the last dimension, reading every block twice.

    Args:
        scores: (..., n), floating point.
        block_size: scores of a row that are looked at together.

    Returns: two tensors (...). A row of -inf only, or of no scores, has highest -inf and sum 0.
    """
    _check(scores, block_size)
    highest = scores.new_full(scores.shape[:-1], -math.inf)
    for block in torch.split(scores, block_size, -1) if scores.size(-1) else ():
        highest = torch.maximum(highest, block.amax(-1))
    pivot, total = finite(highest), torch.zeros_like(highest)
    for block in torch.split(scores, block_size, -1):
        total = total + (block - pivot[..., None]).exp().sum(-1)
    return highest, total


def softmax_statistics(scores: Tensor, *, block_size: int) -> tuple[Tensor, Tensor]:
    """:func:`softmax_statistics_two_pass`, reading every block once: the running sum follows the running maximum."""
    _check(scores, block_size)
    highest = scores.new_full(scores.shape[:-1], -math.inf)
    total = torch.zeros_like(highest)
    for block in torch.split(scores, block_size, -1) if scores.size(-1) else ():
        risen = torch.maximum(highest, block.amax(-1))
        pivot = finite(risen)
        total = total * (highest - pivot).exp() + (block - pivot[..., None]).exp().sum(-1)
        highest = risen
    return highest, total


def online_softmax(scores: Tensor, *, block_size: int) -> Tensor:
    """``softmax(scores)`` over the last dimension from :func:`softmax_statistics`; a row of -inf only gives zeros."""
    highest, total = softmax_statistics(scores, block_size=block_size)
    weights = (scores - finite(highest)[..., None]).exp()
    return weights / total.masked_fill(total == 0, 1.0)[..., None]


def _check(scores: Tensor, block_size: int) -> None:
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating point, got {scores.dtype}")
    at_least("block_size", block_size, 1)


def finite(highest: Tensor) -> Tensor:
    """What may be subtracted for ``highest``: 0 in place of -inf, as -inf - -inf is NaN, exp(-inf - 0) is 0."""
    return highest.masked_fill(highest == -math.inf, 0.0)


def exponential_(scores: Tensor) -> Tensor:
    """``exp(scores)`` in place, as ``2 ** (scores * log2(e))``.

    ``exp2`` takes the same time everywhere; torch's ``exp`` on a CPU is 10 to 150 times slower on -inf and on what
    underflows, and far scores do both.
    """
    return scores.mul_(_LOG2_E).exp2_()


@dataclass
class SoftmaxState:
    """What is known of some queries' attention after the keys seen so far; all floating point, of one dtype.

    highest: (..., queries, 1), the highest score, -inf if there was none.
    total: (..., queries, 1), ``sum exp(score - highest)``.
    weighted: (..., queries, value_dim), ``sum exp(score - highest) value``: the output before its division.
    """

    highest: Tensor
    total: Tensor
    weighted: Tensor

    @classmethod
    def empty(cls, queries: Tensor, value_dim: int) -> "SoftmaxState":
        """No key seen yet by ``queries`` (..., queries, head_dim)."""
        rows = queries.shape[:-1]
        highest = queries.new_full((*rows, 1), -math.inf)
        return cls(highest, torch.zeros_like(highest), queries.new_zeros(*rows, value_dim))

    def update(self, scores: Tensor, values: Tensor, kept: Tensor | None = None) -> None:
        """Look at more keys.

        Args:
            scores: (..., queries, keys), at least one key; -inf hides a key. Overwritten: a tile's worth of memory
            less. values: (..., keys, value_dim).
            kept: factors of the weights (..., queries, keys), as dropout's: they act on the output, not on the sum.
        """
        risen = torch.maximum(self.highest, scores.amax(-1, keepdim=True))
        pivot = finite(risen)
        weights = exponential_(scores.sub_(pivot))
        correction = exponential_(self.highest - pivot)
        self.total = self.total * correction + weights.sum(-1, keepdim=True)
        if kept is not None:
            weights.mul_(kept)
        self.weighted = self.weighted * correction + weights @ values
        self.highest = risen

    def result(self) -> tuple[Tensor, Tensor]:
        """The output (..., queries, value_dim), divided once, and the log of the sum of exp of all scores (...,
        queries).

        A query that has seen nothing gets zeros and -inf.
        """
        output = self.weighted / self.total.masked_fill(self.total == 0, 1.0)
        return output, (self.highest + self.total.log()).squeeze(-1)
