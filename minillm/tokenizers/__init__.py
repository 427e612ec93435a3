"""From text to token ids and back."""

from minillm.tokenizers.added_tokens import AddedToken
from minillm.tokenizers.byte_bpe import ByteBPETokenizer
from minillm.tokenizers.character import CharacterTokenizer
from minillm.tokenizers.encoding import Encoding
from minillm.tokenizers.loading import load_tokenizer, train_tokenizer
from minillm.tokenizers.padding import Padding
from minillm.tokenizers.sentencepiece import SentencePieceTokenizer
from minillm.tokenizers.template import (
    Template,
    bert_template,
    gpt_template,
    llama_template,
    roberta_template,
    t5_template,
)
from minillm.tokenizers.tokenizer import Tokenizer
from minillm.tokenizers.truncation import Truncation
from minillm.tokenizers.unigram import UnigramTokenizer
from minillm.tokenizers.word import WordTokenizer
from minillm.tokenizers.wordpiece import WordPieceTokenizer

__all__ = [
    "AddedToken",
    "ByteBPETokenizer",
    "CharacterTokenizer",
    "Encoding",
    "Padding",
    "SentencePieceTokenizer",
    "Template",
    "Tokenizer",
    "Truncation",
    "UnigramTokenizer",
    "WordPieceTokenizer",
    "WordTokenizer",
    "bert_template",
    "gpt_template",
    "llama_template",
    "load_tokenizer",
    "roberta_template",
    "t5_template",
    "train_tokenizer",
]
