"""Published sparse attentions as compounds of the atomic patterns."""

from collections.abc import Iterable

from minillm.layers.arguments import at_least
from minillm.layers.sparse_algebra import Pattern
from minillm.layers.sparse_patterns import (
    band,
    block_local,
    causal,
    dilated,
    global_tokens,
    random_blocks,
)


def sparse_transformer_strided(stride: int) -> Pattern:
    """Child et al. 2019 ("Generating Long Sequences with Sparse Transformers", section 4.3): strided, causal.

    Query ``i`` sees the keys ``i - stride .. i`` and every earlier key with ``(i - j) % stride == 0``: this is the
    paper's merged head. The two heads of the other variant are ``band(stride, 0)`` and ``dilated(None, 0, stride)``.
    """
    at_least("stride", stride, 1)
    return band(stride, 0) | dilated(None, 0, stride)


def sparse_transformer_fixed(stride: int, c: int) -> Pattern:
    """Child et al. 2019, section 4.3: fixed, causal, the merged head.

    Query ``i`` sees the keys of its own block of ``stride`` up to itself, and the last ``c`` of every earlier block,
    which sum it up. Raises ValueError unless ``1 <= c <= stride``.
    """
    at_least("stride", stride, 1)
    at_least("c", c, 1)
    if c > stride:
        raise ValueError(f"c must be in [1, stride={stride}], got {c}")
    summaries = global_tokens(range(stride - c, stride), every=stride, symmetric=False)
    return causal() & (block_local(stride) | summaries)


def longformer(window: int, *, global_places: int | Iterable[int] = 1, dilation: int = 1) -> Pattern:
    """Beltagy et al. 2020 ("Longformer", section 3.1): a window of ``window / 2`` keys on each side, and global tokens.

    window: even. dilation: of the window (the paper dilates it in two heads of the upper layers, 1 is no gaps).
    global_places: the first so many tokens or which; they see everyone and are seen by everyone.
    """
    at_least("window", window, 2)
    if window % 2:
        raise ValueError(f"window must be even and at least 2 (half of it on each side), got {window}")
    return dilated(window // 2, window // 2, dilation) | global_tokens(global_places)


def big_bird(
    block_size: int = 64,
    *,
    window_blocks: int = 3,
    n_random_blocks: int = 3,
    global_blocks: int | Iterable[int] = (0, -1),
    seed: int = 0,
) -> Pattern:
    """Zaheer et al. 2020 ("Big Bird", section 2 and appendix D), the ITC form: everything in blocks of ``block_size``.

    window_blocks: odd, the query's own block in their middle. n_random_blocks: drawn for each block of queries from all
    blocks, so that one may fall on the window. global_blocks: the first so many or which; the authors' code takes
    the first and the last.
    """
    at_least("window_blocks", window_blocks, 1)
    if window_blocks % 2 == 0:
        raise ValueError(f"window_blocks must be odd and at least 1, got {window_blocks}")
    return (
        block_local(block_size, behind=window_blocks // 2, ahead=window_blocks // 2)
        | global_tokens(global_blocks, block_size=block_size)
        | random_blocks(n_random_blocks, block_size=block_size, seed=seed)
    )


def star() -> Pattern:
    """Guo et al. 2019 ("Star-Transformer", section 3.1): satellites in a ring around one relay.

    Token 0 is the relay: it sees everyone and everyone sees it. A satellite sees itself and its two neighbours, and the
    ring is closed: the first satellite and the last token are neighbours.
    """
    keys = {place: global_tokens([place], symmetric=False) for place in (1, -1)}  # everyone looks there
    rows = {place: global_tokens([place]) & ~keys[place] for place in (1, -1)}  # it looks everywhere
    return global_tokens(1) | band(1) | (rows[1] & keys[-1]) | (rows[-1] & keys[1])
