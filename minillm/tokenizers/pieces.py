"""Pieces of text: counting them, which is what every trainer does first, and remembering what became of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from minillm.tokenizers.pre_tokenization import PreTokenizer

# Pieces repeat: ten megabytes of Python source hold 2.5 million of GPT-2's pieces, 44 thousand of them different, and 3
# million between spaces, 175 thousand of them different.
CACHE_PIECES = 1 << 18
CACHE_PIECE_LENGTH = 128

Result = TypeVar("Result")


class PieceCache(dict[str, Result], Generic[Result]):
    """piece -> what `compute` makes of it, when first asked for; emptied when full, long pieces left out.

    With `dict`'s own look-up, a piece that is there costs no call of a Python function.
    """

    def __init__(self, compute: Callable[[str], Result]) -> None:
        self._compute = compute

    def __missing__(self, piece: str) -> Result:
        result = self._compute(piece)
        if len(piece) <= CACHE_PIECE_LENGTH:
            if len(self) >= CACHE_PIECES:
                self.clear()
            self[piece] = result
        return result


def count_pieces(
    texts: Iterable[str], normalizer: Callable[[str], str] | None, pre_tokenizer: PreTokenizer | None
) -> Counter[str]:
    """How often each piece occurs in texts, which are read one after the other and not kept: what trainers count.

    Raises:
        TypeError: `texts` is one string, or holds something else than strings.
        ValueError: A text has a lone surrogate.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be an iterable of documents, got one str; for a single document pass [text]")
    check_steps(normalizer, pre_tokenizer)
    pieces: Counter[str] = Counter()
    for text in texts:
        check_text(text)
        normalized = normalizer(text) if normalizer else text
        for block in pre_tokenizer.split(normalized) if pre_tokenizer else [[normalized]]:
            pieces.update(block)
    pieces.pop("", None)
    return pieces


def check_text(text: object, name: str = "text") -> None:
    """TypeError unless `text` is a str; ValueError if it has a lone surrogate, which has no UTF-8 form."""
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise ValueError(f"{name} must not contain lone surrogates, got {text[at]!r} at index {at}") from None


def check_names(special_tokens: Iterable[str]) -> None:
    """TypeError if the special tokens to be are one str: its characters would become tokens."""
    if isinstance(special_tokens, str):
        raise TypeError(f"special_tokens must be a sequence of texts, got one str; pass [{special_tokens!r}]")


def check_steps(normalizer: object, pre_tokenizer: object) -> None:
    """TypeError for a normalizer or pre-tokenizer that is none, such as the name of one."""
    if normalizer is not None and not callable(normalizer):
        raise TypeError(f"normalizer must be None or a Normalizer such as NFC(), got {normalizer!r}")
    # A str, too, has a method `split`.
    if pre_tokenizer is not None and not hasattr(pre_tokenizer, "align"):
        raise TypeError(f"pre_tokenizer must be None or a PreTokenizer such as Whitespace(), got {pre_tokenizer!r}")
