"""T5's relative positions: one learned number a head for each bucket of distances, near ones fine, far ones coarse."""

import math

import torch
from torch import Tensor, nn

from minillm.layers.positions.arguments import check_integer_tensor
from minillm.layers.positions.relative import relative_range, spread_diagonals


def t5_bucket(
    relative_position: Tensor, *, bidirectional: bool, n_buckets: int = 32, max_distance: int = 128
) -> Tensor:
    """The bucket of each relative position (key's place minus query's), int64 of the same shape, in [0, n_buckets).

    Raffel et al. 2020, section 2.1. With n buckets for a direction, distances below n / 2 have one each; the others
    share distances up to ``max_distance`` in equal steps of the logarithm,
    ``n/2 + floor(log(distance / (n/2)) / log(max_distance / (n/2)) * n/2)``; all further ones are in the last.

    Args:
        relative_position: integers of any shape, negative for keys to the left.
        bidirectional: half of the buckets are for keys to the left, half for keys to the right. Else keys to the right
            are in the bucket of distance 0.
        n_buckets: even if bidirectional; at least two a direction.
        max_distance: more than the distances that have a bucket of their own.
    """
    _check(bidirectional, n_buckets, max_distance)
    check_integer_tensor("relative_position", relative_position)
    relative_position = relative_position.long()  # int8 cannot hold the distances that it is compared with
    n = n_buckets // 2 if bidirectional else n_buckets
    exact = n // 2
    # One logarithm a distance, not one a pair, and always on the CPU: where a distance lies on the edge of a bucket the
    # rounding of float32 decides (T5 was trained with it), and devices round logarithms differently.
    distances = torch.arange(max_distance + 1, device="cpu")
    steps = (distances.clamp(min=exact).float() / exact).log() / math.log(max_distance / exact) * (n - exact)
    buckets = torch.where(distances < exact, distances, (exact + steps.long()).clamp(max=n - 1))
    buckets = buckets.to(relative_position.device)
    if not bidirectional:
        return buckets[(-relative_position).clamp(0, max_distance)]
    right = relative_position > 0
    return buckets[relative_position.abs().clamp(max=max_distance)] + n * right


class RelativePositionBias(nn.Module):
    """T5's relative position bias (Raffel et al. 2020, section 2.1), added to the scores of every layer.

    T5 does not divide its scores by the root of head_dim: give attention ``scale=1.0`` to be T5.

    Args:
        n_heads: each has its own number for a bucket.
        n_buckets, max_distance, bidirectional: as in :func:`t5_bucket`. An encoder is bidirectional, a decoder not.

    Attributes: ``weight``, (n_buckets, n_heads).
    """

    def __init__(
        self, n_heads: int, *, n_buckets: int = 32, max_distance: int = 128, bidirectional: bool = True
    ) -> None:
        super().__init__()
        if n_heads < 1:
            raise ValueError(f"n_heads must be at least 1, got {n_heads}")
        _check(bidirectional, n_buckets, max_distance)
        self.n_buckets, self.max_distance, self.bidirectional = n_buckets, max_distance, bidirectional
        self.weight = nn.Parameter(torch.empty(n_buckets, n_heads))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, query_length: int, key_length: int, *, offset: int | None = None) -> Tensor:
        """The bias, (n_heads, query_length, key_length) in the dtype of ``weight``.

        Places as in :func:`relative_range`; None: the last query is at the last key.
        """
        low, high = relative_range(query_length, key_length, offset)
        buckets = t5_bucket(
            torch.arange(low, high + 1, device=self.weight.device),
            bidirectional=self.bidirectional,
            n_buckets=self.n_buckets,
            max_distance=self.max_distance,
        )
        return spread_diagonals(self.weight[buckets].t(), query_length, key_length)

    def extra_repr(self) -> str:
        return (
            f"n_heads={self.weight.size(1)}, n_buckets={self.n_buckets}, max_distance={self.max_distance}, "
            f"bidirectional={self.bidirectional}"
        )


def _check(bidirectional: bool, n_buckets: int, max_distance: int) -> None:
    if bidirectional and n_buckets % 2:
        raise ValueError(f"n_buckets must be even if bidirectional (half for each direction), got {n_buckets}")
    directions = 2 if bidirectional else 1
    if n_buckets < 2 * directions:
        raise ValueError(f"n_buckets must be at least {2 * directions} with {bidirectional=}, got {n_buckets}")
    exact = n_buckets // directions // 2
    if max_distance <= exact:
        raise ValueError(
            f"max_distance must be above {exact}, the distances that have their own bucket with {n_buckets=} and "
            f"{bidirectional=}, got {max_distance}"
        )
