"""A tokenizer whose ids anyone can check: the bytes of the text."""

from __future__ import annotations

import pytest


class ByteTokenizer:
    def __init__(self, vocab_size: int = 256) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("latin-1")


@pytest.fixture(scope="session")
def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture(scope="session")
def wide_tokenizer() -> ByteTokenizer:
    """Its vocabulary does not fit into 16 bits."""
    return ByteTokenizer(100_000)
