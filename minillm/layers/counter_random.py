"""Random numbers without a state: Philox 4x32-10, a function of a counter and a key (Salmon et al. 2011).

A generator with a state gives its numbers in order. Tiles are visited in another order by the backward pass than by the
forward pass, and on a GPU in no order at all; yet each must drop the same weights. A counter-based generator is asked
for number (key, query, head, batch) and gives it, whoever asks, whenever.
"""

from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # the golden ratio and the square root of 3, less one


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int, *, n_rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for a counter of four (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", sec.
    4).

    A round multiplies two of the words to 64 bits, and mixes the high halves with the other two words and the key; the
    key is moved on between rounds. The same numbers as Random123's ``philox4x32`` and Triton's ``tl.philox``.

    Args:
        counter: four int64 tensors of words in [0, 2**32), which broadcast.
        seed: the key, in [0, 2**64); its low word is the first.
        n_rounds: ten are customary; seven passed the paper's tests.

    Returns: four int64 tensors of words in [0, 2**32), of a shape to which the counter broadcasts.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    a, b, c, d = counter
    low, high = seed & _MASK, seed >> 32
    for _ in range(n_rounds):
        # The product of two 32-bit words needs 64 bits and here has 63 and a sign: it wraps around, its bits are right.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = ((second >> 32) & _MASK) ^ b ^ low
        c = ((first >> 32) & _MASK) ^ d ^ high
        b, d = second & _MASK, first & _MASK
        low, high = (low + _KEY_STEPS[0]) & _MASK, (high + _KEY_STEPS[1]) & _MASK
    return a, b, c, d


def attention_dropout_kept(batch: Tensor, head: Tensor, query: Tensor, key: Tensor, *, p: float, seed: int) -> Tensor:
    """Which attention weights dropout keeps: boolean, False with probability ``p``.

    The first word of Philox at the counter (key, query, head, batch) is held against ``p * 2**32``, so that a weight's
    fate hangs on its four numbers and the seed alone: not on tiles, order or device.

    Args:
        batch, head, query, key: int64 tensors of numbers from 0 that broadcast.
        p: probability of dropping, in [0, 1).
        seed: in [0, 2**64).
    """
    return philox_4x32((key, query, head, batch), seed)[0] >= round(p * 2**32)
