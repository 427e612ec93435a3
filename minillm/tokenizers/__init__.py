"""From text to token ids and back."""

from minillm.tokenizers.byte_bpe import ByteBPETokenizer

__all__ = ["ByteBPETokenizer"]
