"""What flash attention refuses at its door, and what torch's own kernels can take off its hands."""

import math

import torch
from torch import Tensor

from minillm.layers.arguments import at_least, true_or_false
from minillm.layers.block_layout import BlockLayout
from minillm.layers.scaled_dot_product import scaled_dot_product_attention


def check_scores(
    n_heads: int, causal: bool, window: int | None, alibi_slopes: Tensor | None, scale: float | None
) -> None:
    """Refuse what cannot say which keys are seen and how they score."""
    true_or_false("causal", causal)
    if window is not None:
        at_least("window", window, 1)
    if scale is not None:
        if not isinstance(scale, int | float) or isinstance(scale, bool):
            raise TypeError(f"scale must be a number, got {scale!r}")
        if not -math.inf < scale < math.inf:
            raise ValueError(f"scale must be finite, got {scale}")
    if alibi_slopes is None:
        return
    if alibi_slopes.shape != (n_heads,) or not alibi_slopes.is_floating_point():
        raise ValueError(
            f"alibi_slopes must be floating point of shape (n_heads,) = ({n_heads},), "
            f"got {alibi_slopes.dtype} {tuple(alibi_slopes.shape)}"
        )
    if alibi_slopes.requires_grad:
        raise ValueError("alibi_slopes must not require a gradient: they are constants here, give them detached")


def check_seed(seed: int) -> None:
    """Refuse what is no key of Philox."""
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")


def check_layout(layout: BlockLayout, query_length: int, key_length: int) -> None:
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"layout must be a BlockLayout (Pattern.blocks makes one), got {type(layout).__name__}")
    if (layout.query_length, layout.key_length) != (query_length, key_length):
        raise ValueError(
            f"layout must be made for {query_length} queries and {key_length} keys, "
            f"got one for {layout.query_length} and {layout.key_length}"
        )


def torch_refuses(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    causal: bool,
    window: int | None,
    alibi_slopes: Tensor | None,
    *,
    layout: BlockLayout | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
) -> str | None:
    """Why ``F.scaled_dot_product_attention`` cannot compute the call without a matrix of all pairs; None if it can."""
    query_length, key_length = query.size(-2), key.size(-2)
    for name, given in (("window", window), ("alibi_slopes", alibi_slopes), ("layout", layout)):
        if given is not None:
            return f"scaled_dot_product_attention would need {name} as a matrix of all pairs"
    if return_lse:
        return "scaled_dot_product_attention does not return the log-sum-exp"
    if dropout:
        return "scaled_dot_product_attention draws its own dropout, not that of the seed"
    if causal and query_length not in (1, key_length):
        return (
            "the causal flag of scaled_dot_product_attention puts the first query at the first key; "
            f"it would need a matrix of all pairs for {query_length} queries and {key_length} keys"
        )
    if query.size(-1) != value.size(-1):
        return f"scaled_dot_product_attention keeps all scores if value_dim ({value.size(-1)}) is not head_dim"
    if query.is_cuda and not _fused_on_cuda(query, key, value, causal and query_length > 1):
        return f"scaled_dot_product_attention keeps all scores for {query.dtype} of these shapes on this GPU"
    return None


def torch_flash_attention(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> Tensor:
    """Torch's fused kernels, in the inputs' dtype; they take only tensors whose last dimension is dense."""
    query, key, value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):  # it would narrow them, and what comes out
        return scaled_dot_product_attention(query, key, value, causal=causal, scale=scale)


def _fused_on_cuda(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> bool:
    if query.dim() == 3:
        query, key, value = query[None], key[None], value[None]
    parameters = torch.backends.cuda.SDPAParams(query, key, value, None, 0.0, causal, query.size(1) != key.size(1))
    return torch.backends.cuda.can_use_flash_attention(parameters) or torch.backends.cuda.can_use_efficient_attention(
        parameters
    )
