"""Characters as tokens: little is unknown, but texts become long.

A hundred tokens write all of English, and a character that the training texts did not have is rare; Chinese, though,
has tens of thousands of characters. A model reads four or five times as many tokens as with subwords, and first of all
it has to learn what the words are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

from minillm.tokenizers.added_tokens import AddedToken
from minillm.tokenizers.normalization import Normalizer
from minillm.tokenizers.padding import Padding
from minillm.tokenizers.pieces import check_names, count_pieces
from minillm.tokenizers.split import Split
from minillm.tokenizers.template import Template
from minillm.tokenizers.text_pattern import Regex
from minillm.tokenizers.truncation import Truncation
from minillm.tokenizers.word_level import WordLevelTokenizer, most_frequent

ANY_CHARACTER = Regex(r"[\s\S]")


class CharacterTokenizer(WordLevelTokenizer):
    """A tokenizer whose tokens are characters (code points), spaces and line ends too, made by `train` or `load`.

    `decode` gives the text back, with the unknown token in place of each character that was unknown.

    Args:
        vocabulary: Character -> id, the unknown token among them.
        unknown_token: What every other character becomes.
        normalizer, special_tokens, template, truncation, padding: See `Tokenizer`.

    Raises:
        ValueError: The unknown token is not in the vocabulary; what `Tokenizer` refuses.
    """

    def __init__(
        self,
        vocabulary: Mapping[str, int],
        *,
        unknown_token: str = "[UNK]",
        normalizer: Normalizer | None = None,
        special_tokens: Mapping[str, int] | Iterable[AddedToken] = (),
        template: Template | None = None,
        truncation: Truncation | None = None,
        padding: Padding | None = None,
    ) -> None:
        super().__init__(
            vocabulary,
            unknown_token=unknown_token,
            separator="",
            normalizer=normalizer,
            pre_tokenizer=Split(ANY_CHARACTER, "isolated"),
            special_tokens=special_tokens,
            template=template,
            truncation=truncation,
            padding=padding,
        )

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
    ) -> Self:
        """The most frequent characters of texts, which are read one after the other and not kept.

        Ids: special tokens, then characters, the most frequent first, equally frequent ones by code point.

        Args:
            texts: Documents. A special token in them is text like any other.
            vocab_size: Number of tokens wanted, special tokens included. Fewer come out of texts with fewer characters.
            unknown_token: What a character becomes that is not in the vocabulary; the first id, unless `special_tokens`
                has it.
            special_tokens: Such as ["[PAD]"]; they get the first ids.
            min_frequency: Leave out characters that occur less often.
            normalizer: Changes the text first.

        Raises:
            TypeError: `texts` is one string, or holds something else than strings; a number is no integer.
            ValueError: The texts are empty; `vocab_size` leaves no room for a character; `min_frequency` is below 1; a
                text has a lone surrogate; special tokens repeat.
        """
        counts = count_pieces(texts, normalizer, Split(ANY_CHARACTER, "isolated"))
        check_names(special_tokens)
        vocabulary, special = most_frequent(counts, vocab_size, unknown_token, special_tokens, min_frequency)
        return cls(vocabulary, unknown_token=unknown_token, normalizer=normalizer, special_tokens=special)

    @classmethod
    def _from_json(cls, content: Mapping[str, Any], common: dict[str, Any]) -> Self:
        options = cls._model_options(content)
        pre_tokenizer = common.pop("pre_tokenizer")
        if options.pop("separator") or not isinstance(pre_tokenizer, Split) or not _cuts_everywhere(pre_tokenizer):
            raise ValueError("pre_tokenizer must be Split at every character, and decoder Fuse")
        return cls(**options, **common)


def _cuts_everywhere(split: Split) -> bool:
    isolates = split.behavior == "isolated" and not split.invert
    return isolates and split.pattern in ("", ANY_CHARACTER)
