"""Whole words as tokens: the oldest tokenizer, and what is wrong with it.

The vocabulary is the most frequent words of a corpus; every other word is unknown. New text keeps bringing new words:
however large the vocabulary is, some share of a text is lost, and `unknown_rate` measures it. And to a model, `hug`,
`hugs` and `Hugging` have nothing in common. Subword tokenizers were made against both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

from minillm.tokenizers.normalization import Normalizer
from minillm.tokenizers.pieces import check_names, count_pieces
from minillm.tokenizers.pre_tokenization import PreTokenizer, Whitespace
from minillm.tokenizers.word_level import WordLevelTokenizer, most_frequent


class WordTokenizer(WordLevelTokenizer):
    """A tokenizer whose tokens are words, made by `train` or `load`.

    `decode` puts a space between any two words: which white space there was, or none, is lost.
    """

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        *,
        unknown_token: str = "[UNK]",
        special_tokens: Sequence[str] = (),
        min_frequency: int = 1,
        normalizer: Normalizer | None = None,
        pre_tokenizer: PreTokenizer | None = None,
    ) -> Self:
        """The most frequent words of texts, which are read one after the other and not kept.

        Ids: special tokens, then words, the most frequent first, equally frequent ones by code point.

        Args:
            texts: Documents. A special token in them is text like any other.
            vocab_size: Number of tokens wanted, special tokens included. Fewer come out of texts with fewer words.
            unknown_token: What a word becomes that is not in the vocabulary; the first id, unless `special_tokens` has
                it.
            special_tokens: Such as ["[PAD]"]; they get the first ids.
            min_frequency: Leave out words that occur less often.
            normalizer: Changes the text first.
            pre_tokenizer: Cuts it into words; `Whitespace` if left out.

        Raises:
            TypeError: `texts` is one string, or holds something else than strings; a number is no integer.
            ValueError: There are no words; `vocab_size` leaves no room for one; `min_frequency` is below 1; a text
                has a lone surrogate; special tokens repeat.
        """
        pre_tokenizer = pre_tokenizer or Whitespace()
        counts = count_pieces(texts, normalizer, pre_tokenizer)
        check_names(special_tokens)
        vocabulary, special = most_frequent(counts, vocab_size, unknown_token, special_tokens, min_frequency)
        return cls(
            vocabulary,
            unknown_token=unknown_token,
            normalizer=normalizer,
            pre_tokenizer=pre_tokenizer,
            special_tokens=special,
        )
