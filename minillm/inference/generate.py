"""Generation: feed the prompt, draw a token, feed it back; with a KV cache, for one prompt or unequal ones."""

import operator
from collections.abc import Collection, Iterator, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from minillm.inference.sampling import check_sampling, sample
from minillm.models.modes import evaluation_mode
from minillm.models.transformer import Transformer


@overload
def generate(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    stop_tokens: Collection[int] = ...,
    seed: int | None = ...,
) -> list[int]: ...
@overload
def generate(
    model: Transformer,
    prompt: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = ...,
    top_k: int | None = ...,
    top_p: float | None = ...,
    stop_tokens: Collection[int] = ...,
    seed: int | None = ...,
) -> list[list[int]]: ...
def generate(
    model: Transformer,
    prompt: Sequence[int] | Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Collection[int] = (),
    seed: int | None = None,
) -> list[int] | list[list[int]]:
    """Continue one prompt, or several at once.

    Args:
        model: its modules are put in evaluation mode meanwhile and each given back in the mode it had.
        prompt: token ids, or a list of such lists, of any lengths; none may be empty.
        max_new_tokens: at most so many are added to each prompt.
        temperature, top_k, top_p: see :func:`minillm.inference.candidates`; temperature 0 is greedy.
        stop_tokens: a row ends before the first of these; the stop token is not part of the result.
        seed: of the draws; None draws differently each time. Torch's global generator is neither used nor changed. With
            the same seed, prompts and library the result is the same; the rows of a batch share the draws, so a row
            alone draws otherwise than in a batch.

    Returns: the new tokens, without the prompt: a list, or a list of lists.

    Each token is drawn from the model's scores after at most the last ``context_length`` tokens. Up to there a step
    costs one token's pass, thanks to the cache. In a longer text the context slides on by a token each step. With
    positions that count from its beginning every token then stands at another one, so that the cached states no longer
    hold; for all models alike the whole context is run again in each step.
    """
    single, prompts = _prompts(model, prompt)
    stops = _stop_tokens(stop_tokens)
    results: list[list[int]] = [[] for _ in prompts]
    with evaluation_mode(model):
        steps = _steps(model, prompts, max_new_tokens, temperature, top_k, top_p, seed)
        if stops:
            running = set(range(len(prompts)))
            for drawn in steps:
                tokens = drawn.tolist()
                running -= {row for row in running if tokens[row] in stops}
                if not running:
                    break
                for row in running:
                    results[row].append(tokens[row])
        elif all_drawn := list(steps):
            # Without stop tokens nothing need be looked at on the way, so that a GPU is never waited for.
            results = torch.stack(all_drawn, dim=1).tolist()
    return results[0] if single else results


def stream(
    model: Transformer,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop_tokens: Collection[int] = (),
    seed: int | None = None,
) -> Iterator[int]:
    """The tokens of :func:`generate` for one prompt, each as soon as it is drawn; arguments are checked at the call.

    Between tokens the model is in the mode it had and no context is left open: a caller may use it, or stop reading, at
    any time.
    """
    single, prompts = _prompts(model, prompt)
    if not single:
        raise TypeError("prompt must be one list of token ids: several prompts cannot be streamed, use generate")
    stops = _stop_tokens(stop_tokens)
    steps = _steps(model, prompts, max_new_tokens, temperature, top_k, top_p, seed)

    def tokens() -> Iterator[int]:
        while True:
            with evaluation_mode(model):
                drawn = next(steps, None)
            if drawn is None or (token := int(drawn.item())) in stops:
                return
            yield token

    return tokens()


def _steps(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
) -> Iterator[Tensor]:
    """One int64 (batch,) of drawn tokens a step. Checks its arguments at the call, not at the first step."""
    check_sampling(temperature, top_k, top_p)
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool) or max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be an integer of at least 0, got {max_new_tokens!r}")
    device = model.token_embedding.weight.device
    generator = _generator(device, seed)

    # Rows are aligned at their ends, so that every row's next token is in the same column; shorter ones are padded in
    # front.
    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * pad + prompt + [0] * max_new_tokens for pad, prompt in zip(padding, prompts, strict=True)]

    def steps() -> Iterator[Tensor]:
        context_length = model.config.context_length
        capacity = min(longest + max_new_tokens, context_length)
        with torch.inference_mode():
            tokens = torch.tensor(rows, device=device)
            first = torch.tensor(padding, device=device).unsqueeze(1)  # the column of each row's first token
            columns = torch.arange(tokens.size(1), device=device)
            cache = model.new_cache(len(prompts), capacity) if longest <= context_length else None
        for end in range(longest, longest + max_new_tokens):
            begin = max(0, end - context_length)
            if begin:
                cache = None
            fed = begin if cache is None else cache.length
            with torch.inference_mode():
                positions = mask = token_mask = None
                if max(padding) > begin:
                    start = first.clamp(min=begin)
                    positions = (columns[fed:end] - start).clamp(min=0)  # padding's own position does not matter
                    mask = (columns[begin:end] >= start)[:, None, None, :]
                    token_mask = columns[fed:end] >= start
                given = {"positions": positions, "mask": mask, "token_mask": token_mask}
                logits = model(tokens[:, fed:end], cache=cache, last_only=True, **given)
                drawn = sample(logits[:, -1], temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
                tokens[:, end] = drawn
            yield drawn

    return steps()


def _generator(device: torch.device, seed: int | None) -> torch.Generator:
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()
        return generator
    try:
        number = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an integer or None, got {seed!r}") from None
    if not -(2**63) <= number < 2**64:
        raise ValueError(f"seed must fit into 64 bits, got {seed!r}")
    return generator.manual_seed(number)


def _prompts(model: Transformer, prompt: Sequence[int] | Sequence[Sequence[int]]) -> tuple[bool, list[list[int]]]:
    """Whether one prompt was given, and the prompts as lists of ints that the model knows."""
    if isinstance(prompt, str | bytes):
        raise TypeError(f"prompt must be token ids, got {type(prompt).__name__}: encode it with the model's tokenizer")
    try:
        given: list[Any] = list(prompt.tolist() if isinstance(prompt, Tensor) else prompt)
    except TypeError:
        raise TypeError(f"prompt must be a list of token ids, or of such lists, got {prompt!r:.60}") from None
    if not given:
        raise ValueError("prompt must hold at least one token, got none")
    single = not isinstance(given[0], Sequence | Tensor)
    prompts = []
    for number, row in enumerate([given] if single else given):
        where = "prompt" if single else f"prompt[{number}]"
        try:
            ids = [operator.index(token) for token in row]
        except TypeError:
            raise TypeError(f"{where} must be a list of token ids (integers), got {row!r:.60}") from None
        if not ids:
            raise ValueError(f"{where} must hold at least one token, got none")
        if min(ids) < 0 or max(ids) >= model.config.vocab_size:
            raise ValueError(
                f"{where} must hold ids in [0, {model.config.vocab_size}) (vocab_size), "
                f"got values from {min(ids)} to {max(ids)}"
            )
        prompts.append(ids)
    return single, prompts


def _stop_tokens(stop_tokens: Collection[int]) -> frozenset[int]:
    try:
        return frozenset(operator.index(token) for token in stop_tokens)
    except TypeError:
        raise TypeError(f"stop_tokens must be a collection of token ids (integers), got {stop_tokens!r:.60}") from None
