"""From scores to the next token: temperature, top-k, nucleus (top-p), and the draw."""

import torch
from torch import Tensor


def candidates(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their probabilities.

    The logits are divided by ``temperature``; the ``top_k`` largest are kept (Fan et al. 2018, section 5.1); of these
    the smallest set whose probability reaches ``top_p`` (Holtzman et al. 2020, "nucleus", section 3.1), never fewer
    than one; what is left is normalised. Among equal logits at the edge an arbitrary one is kept.

    Args:
        logits: (batch, vocab_size), any floating dtype; computed in float32.
        temperature: above 0. Small is near greedy; 1 is the model's own distribution.
        top_k: at least 1, or None for all.
        top_p: in (0, 1], or None for all.

    Returns: probabilities float32 (batch, n), 0 for what top_p cut off, and token ids int64 (batch, n); n is top_k or
    vocab_size. Sorted by falling probability if top_k or top_p is given.
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0.0:
        raise ValueError("temperature must be above 0 for probabilities; 0 is greedy, see sample")
    scores = logits.float()
    if temperature != 1.0:
        # Shifted first so that a tiny temperature overflows to -inf (probability 0), never to inf - inf; and divided by
        # no less than float32 can hold, for 0 / 0 is NaN.
        scores = (scores - scores.amax(-1, keepdim=True)) / max(temperature, torch.finfo(torch.float32).tiny)
    if top_k is not None and top_k < scores.size(-1):
        scores, ids = scores.topk(top_k, dim=-1)
    elif top_p is not None:
        scores, ids = scores.sort(dim=-1, descending=True)
    else:
        ids = torch.arange(scores.size(-1), device=scores.device).expand_as(scores)
    probabilities = scores.softmax(-1)
    if top_p is not None and top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities
        outside = before >= top_p
        outside[:, 0] = False  # the likeliest always stays
        probabilities = probabilities.masked_fill(outside, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities, ids


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token for each row of ``logits`` (batch, vocab_size): int64 (batch,).

    ``temperature`` 0 takes the largest logit (the first among equals) and draws nothing; otherwise see
    :func:`candidates`.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    probabilities, ids = candidates(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return ids.gather(-1, drawn).squeeze(-1)


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse settings that :func:`sample` could not follow."""
    if not 0.0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be 0 (greedy) or a positive finite number, got {temperature}")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
        raise ValueError(f"top_k must be None or an integer of at least 1, got {top_k!r}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must be None or a number above 0 and at most 1, got {top_p!r}")
