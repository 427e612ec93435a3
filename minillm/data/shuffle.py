"""A random order of n things that is computed, not stored.

Training visits every window of the corpus once an epoch, in random order. A stored permutation of n windows costs 8 n
bytes and must be drawn anew before a run can be resumed. Here the position is *enciphered* instead: a small Feistel
network maps 0 .. 2^(2h) - 1 one-to-one onto itself, and an output that falls outside 0 .. n - 1 is enciphered again
until it falls inside ("cycle walking"). The memory is O(1), any position can be asked for at once, and the order is a
function of (n, key) alone: the same on every machine and with every version of every library.

Sources: Luby and Rackoff, "How to construct pseudorandom permutations from pseudorandom functions", 1988 (Feistel
networks of random functions); Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, section 4 (cycle
walking); Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014, section 3 (the mixing
function).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

UInt64 = np.uint64
ROUNDS = 8


def mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64: each input bit changes each output bit with probability about one half."""
    x = x + UInt64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> UInt64(30))) * UInt64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> UInt64(27))) * UInt64(0x94D049BB133111EB)
    return x ^ (x >> UInt64(31))


def random_integer(n: int, *key: int) -> int:
    """A number in 0 .. n - 1 that depends on the integers in `key` alone (bias below n / 2^64)."""
    return int(_key(key)[0]) % n


def permute(positions: npt.NDArray[Any], n: int, *key: int) -> npt.NDArray[np.int64]:
    """Where each position goes in a random permutation of 0 .. n - 1 that is fixed by the integers in `key`.

    positions: integers in 0 .. n - 1, any shape. Returns int64 of the same shape; `permute(np.arange(n), n, key)` holds
    every number once. Costs 8 hashes an element where n is a power of 4, and up to 4 times as many just above one.

    Raises ValueError if n < 1 or a position lies outside 0 .. n - 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    values = np.asarray(positions).astype(np.uint64)
    if values.size and int(values.max()) >= n:
        raise ValueError(f"positions must lie in 0 .. {n - 1}, got {int(values.max())}")
    half_bits = max(1, ((n - 1).bit_length() + 1) // 2)
    half, mask = UInt64(half_bits), UInt64((1 << half_bits) - 1)
    round_keys = [_key((*key, index)) for index in range(ROUNDS)]

    flat = values.reshape(-1)
    walking = np.arange(flat.size)
    while walking.size:
        left, right = flat[walking] >> half, flat[walking] & mask
        for round_key in round_keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        flat[walking] = (left << half) | right
        walking = walking[flat[walking] >= n]
    return flat.astype(np.int64).reshape(values.shape)


def _key(parts: tuple[int, ...]) -> npt.NDArray[np.uint64]:
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = mix(state ^ np.array([part % 2**64], dtype=np.uint64))
    return state
