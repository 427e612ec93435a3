"""What the command line tells of a run: its losses in words, its figures, and text as the model writes it."""

import codecs
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minillm.inference import generate, stream
from minillm.models import Transformer
from minillm.plots import attention_map, loss_curve, save
from minillm.tokenizers import ByteBPETokenizer
from minillm.training import TrainingResult


def summary(result: TrainingResult) -> str:
    """The losses of a run, from its first step to its last, beside what they are to be compared with."""
    if not result.history:
        return "No step was made."
    lines = [f"loss at step 1       {result.history[0]['loss']:.3f} nats per token"]
    lines += [f"loss at step {result.step:<7} {result.loss:.3f}"] if result.step > 1 else []
    if result.validation_loss is not None:
        lines.append(f"validation loss      {result.validation_loss:.3f}, or {result.bits_per_byte:.3f} bits per byte")
    if result.unigram_entropy is not None:
        lines.append(f"unigram entropy      {result.unigram_entropy:.3f}: what word frequencies alone would reach")
    if result.entropy_floor is not None and result.validation_loss is not None:
        above = result.validation_loss / result.entropy_floor - 1
        lines.append(
            f"exact entropy        {result.entropy_floor:.3f}: no model can do better; this one is {above:.1%} above"
        )
    if result.seconds:
        rate = result.tokens / result.seconds
        lines.append(f"trained on           {result.tokens:,} tokens in {result.seconds:.0f} s: {rate:,.0f} tokens/s")
    return "\n".join(lines)


def save_figures(folder: Path, result: TrainingResult, model: Transformer, tokenizer: ByteBPETokenizer) -> list[Path]:
    """Draw the loss curve, and what the last layer looks at in a sentence of its own; returns the files written."""
    import torch

    references = {f"guessing, log({tokenizer.vocab_size})": math.log(tokenizer.vocab_size)}
    if result.unigram_entropy is not None:
        references["unigram entropy"] = result.unigram_entropy
    if result.entropy_floor is not None:
        references["exact entropy"] = result.entropy_floor
    curve = loss_curve(result.history, references=references, title=f"Training in {folder.name}")
    ids = tokenizer.encode("The")[: model.config.context_length]
    ids += generate(model, ids, max_new_tokens=min(20, model.config.context_length - len(ids)), temperature=0.7, seed=0)
    device = model.token_embedding.weight.device
    weights = model.attention_weights(torch.tensor([ids], device=device))[-1][0]
    pieces = [tokenizer.token_bytes(token).decode("utf-8", "backslashreplace") for token in ids]
    attention = attention_map(
        weights, pieces, title=f"Layer {model.config.n_layers - 1}: each row looks at earlier columns"
    )
    return [save(curve, folder / "loss_curve.png"), save(attention, folder / "attention.png")]


def write(model: Transformer, tokenizer: ByteBPETokenizer, prompt: str, **options: Any) -> Iterator[str]:
    """`prompt` and then its continuation, as soon as there are whole characters of it, up to the end of the text.

    An empty prompt stands for the beginning of a new text. options: those of `minillm.inference.stream`.
    Raises ValueError for an empty prompt where the tokenizer has no special token that ends a text.
    """
    stops = tuple(tokenizer.special_tokens.values())
    ids = tokenizer.encode(prompt, allow_special=False) or list(stops[:1])
    if not ids:
        raise ValueError("prompt must not be empty for a tokenizer without special tokens")
    tokens = stream(model, ids, stop_tokens=stops, **options)  # first, for it refuses options that cannot be
    yield prompt
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may be spread over several tokens
    for token in tokens:
        yield decoder.decode(tokenizer.token_bytes(token))
    yield decoder.decode(b"", final=True)
