"""Train and validation text, divided by document.

Two rules at once. For a corpus of any size the side of a document is a hash of (seed, text): no state, no order, and
two equal documents are never on different sides. But the hash counts documents, and where documents are few and
unequal, a tenth of them can be a quarter of the text. So the documents at the beginning (as many as fit into a fixed
amount of memory; for a small corpus, all of them) are divided by size: in the order of their hashes they become
validation text until that has its share, within a tenth of it; those too large for what is left are passed over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

HELD_CHARACTERS = 2**25
HELD_DOCUMENTS = 2**18


def split_documents(
    documents: Iterable[str],
    validation_fraction: float,
    seed: int = 0,
    *,
    held_characters: int = HELD_CHARACTERS,
) -> Iterator[tuple[str, str]]:
    """Yield ("train" or "validation", document) in the order of the documents; empty ones are left out.

    validation_fraction: the share of the text for validation, in [0, 1). Where it is above 0 neither side stays empty:
    of two documents one goes to each side, and a lone document (or copies of one) is cut in two, after the end of a
    line or else after a space, and its tail becomes the validation text.

    Raises TypeError for a document that is no str, ValueError when there is no text, or a single character to cut.
    """
    if not 0.0 <= validation_fraction < 1.0:
        raise ValueError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
    if isinstance(documents, str):
        raise TypeError("documents must be an iterable of str, one for each document, got one str; pass [text]")
    stream = _with_hashes(documents, seed)
    held, n_characters = [], 0
    for value, document in stream:
        held.append((value, document))
        n_characters += len(document)
        if value != held[0][0] and (n_characters > held_characters or len(held) >= HELD_DOCUMENTS):
            break
    if not held:
        raise ValueError("there is no text: no document has a single character")
    if validation_fraction > 0 and all(value == held[0][0] for value, _ in held):
        for _, document in held:
            head, tail = _cut(document, 1 - validation_fraction)
            yield "train", head
            yield "validation", tail
        return
    chosen = _choose(held, validation_fraction * n_characters) if validation_fraction > 0 else set()
    seen = {value for value, _ in held}
    for value, document in held:
        yield "validation" if value in chosen else "train", document
    held.clear()
    for value, document in stream:
        validation = value in chosen if value in seen else value < validation_fraction * 2**64
        yield "validation" if validation else "train", document


def _with_hashes(documents: Iterable[str], seed: int) -> Iterator[tuple[int, str]]:
    """Each document that is not empty, with a number in 0 .. 2^64 - 1 that is a hash of (seed, text)."""
    key = hashlib.blake2b(str(seed).encode(), digest_size=16).digest()
    for number, document in enumerate(documents):
        if not isinstance(document, str):
            raise TypeError(f"documents must be str, but document {number} is {type(document).__name__}")
        if document:
            text = document.encode("utf-8", "surrogatepass")
            yield int.from_bytes(hashlib.blake2b(text, digest_size=8, key=key).digest(), "big"), document


def _choose(held: list[tuple[int, str]], share: float) -> set[int]:
    """The hashes of the validation documents: about `share` characters, at least one document, never all."""
    sizes: dict[int, int] = {}
    for value, document in held:
        sizes[value] = sizes.get(value, 0) + len(document)
    chosen, n_characters = set[int](), 0
    for value in sorted(sizes)[:-1]:
        if n_characters >= 0.9 * share:
            break
        if n_characters + sizes[value] <= 1.1 * share:
            chosen.add(value)
            n_characters += sizes[value]
    return chosen or {min(sizes, key=lambda value: (sizes[value], value))}


def _cut(document: str, fraction: float) -> tuple[str, str]:
    """Two parts, neither empty, the first of about `fraction` of the length."""
    if len(document) < 2:
        raise ValueError("a corpus of one character cannot be split: pass validation_fraction=0")
    middle = min(max(1, round(len(document) * fraction)), len(document) - 1)
    for boundary in ("\n", " "):
        before, after = document.rfind(boundary, 0, middle), document.find(boundary, middle - 1, len(document) - 1)
        found = [at + 1 for at in (before, after) if at >= 0]
        if found:
            return document[: (at := min(found, key=lambda at: abs(at - middle)))], document[at:]
    return document[:middle], document[middle:]
