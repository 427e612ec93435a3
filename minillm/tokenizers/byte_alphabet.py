"""The byte alphabet of GPT-2: every byte as one visible character, which is how files spell byte-level tokens.

Printable Latin-1 bytes stand for themselves, the other 68 are moved to U+0100 and up (a space becomes "Ġ").

Source: Radford et al., "Language models are unsupervised multitask learners" (GPT-2, 2019), released code.
"""

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_MOVED = [byte for byte in range(256) if byte not in _PRINTABLE]
_SPELLING = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(0x100 + n) for n, byte in enumerate(_MOVED)}
_BYTE = {character: byte for byte, character in _SPELLING.items()}
# The single bytes in the order of their spelling: the order of their ids in GPT-2 and in every trained tokenizer.
BYTE_ALPHABET = [bytes([byte]) for byte in [*_PRINTABLE, *_MOVED]]


def spell(token: bytes) -> str:
    """One visible character a byte."""
    return token.decode("latin-1").translate(_SPELLING)


def unspell(text: str) -> bytes | None:
    """The token that `text` spells; None if a character of it stands for no byte."""
    try:
        return bytes([_BYTE[character] for character in text])
    except KeyError:
        return None


def spells_itself(text: str) -> bool:
    """Whether `text` is the spelling of its own UTF-8 bytes, as printable ASCII without spaces is."""
    return unspell(text) == text.encode()
