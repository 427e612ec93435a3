"""Distances between queries and keys, and how values that depend on the distance alone are laid out as a matrix."""

import torch
from torch import Tensor

from minillm.layers.positions.arguments import check_whole_numbers


def relative_range(query_length: int, key_length: int, offset: int | None = None) -> tuple[int, int]:
    """The least and the greatest place of a key seen from a query, ``j - (offset + i)`` for query ``i`` and key ``j``.

    ``offset`` is the place of the first query counted from the first key. None is ``key_length - query_length``: the
    last query stands at the last key, as in self-attention with or without a cache. In cross-attention any number
    makes sense; 0 lets both texts begin together. ValueError for negative lengths, TypeError for no whole numbers.
    """
    check_whole_numbers(query_length=query_length, key_length=key_length, offset=offset)
    if query_length < 0 or key_length < 0:
        raise ValueError(f"query_length and key_length must be at least 0, got {query_length} and {key_length}")
    offset = key_length - query_length if offset is None else offset
    return -(offset + query_length - 1), key_length - 1 - offset


def relative_positions(
    query_length: int, key_length: int, *, offset: int | None = None, device: torch.device | None = None
) -> Tensor:
    """Where each key stands seen from each query: int64 (query_length, key_length), negative to the left.

    Lengths and ``offset`` as in :func:`relative_range`.
    """
    low, _ = relative_range(query_length, key_length, offset)
    places = torch.arange(low, low + query_length, device=device).flip(0)  # of key 0, seen from query 0, 1, ...
    return places[:, None] + torch.arange(key_length, device=device)


def spread_diagonals(diagonals: Tensor, query_length: int, key_length: int) -> Tensor:
    """(..., query_length + key_length - 1) values, one for each relative position, to (..., query_length, key_length).

    The first value is that of the least relative position (the last query and the first key). A matrix that depends on
    ``j - i`` only is constant along its diagonals, so what is costly, and its gradient, is worked out once a diagonal.
    """
    if query_length == 0 or key_length == 0:
        return diagonals.new_zeros(*diagonals.shape[:-1], query_length, key_length)
    return diagonals.unfold(-1, key_length, 1).flip(-2)
