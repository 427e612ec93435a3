"""Normalization as SentencePiece does it: the character map, then spaces.

    " Hello  world "  ->  "▁Hello▁world"

White space is text like any other: it becomes the visible character "▁", and the tokens of a text, put end to end, are
the text. Two options give that up: one space for several, and a space in front of every text (which decoding takes off
again), so that a word is spelled alike at the begin of a text and inside.

Source: Kudo and Richardson, "SentencePiece" (2018), sections 3.1 and 3.2, and the library's `normalizer.cc`.
"""

from __future__ import annotations

from typing import Any

from minillm.tokenizers.aligned_text import AlignedText
from minillm.tokenizers.character_map import CharacterMap
from minillm.tokenizers.metaspace import SPACE
from minillm.tokenizers.normalization import Normalizer, NormalizerSequence, Prepend, Replace
from minillm.tokenizers.text_pattern import Regex


class SentencePieceNormalizer:
    """What the library does to a text before it cuts it.

    Args:
        character_map: Applied first.
        add_dummy_prefix: Put a space in front of a text that is not empty.
        remove_extra_whitespaces: Drop spaces at both ends, and all but one where several follow each other.
        suffix: Put the dummy space behind the text instead.
    """

    def __init__(
        self,
        character_map: CharacterMap,
        *,
        add_dummy_prefix: bool = True,
        remove_extra_whitespaces: bool = False,
        suffix: bool = False,
    ) -> None:
        self.character_map = character_map
        self.add_dummy_prefix = add_dummy_prefix
        self.remove_extra_whitespaces = remove_extra_whitespaces
        self.suffix = suffix

    def __call__(self, text: str) -> str:
        """The normalized text."""
        if not text:
            return text
        mapped = self.character_map(text)
        if self.remove_extra_whitespaces:
            if self.character_map.keeps_double_spaces or not mapped.strip(" " + SPACE):
                return self.align(AlignedText.of(text)).text
            if "  " in mapped:
                mapped = " ".join(filter(None, mapped.split(" ")))
            mapped = mapped.lstrip(" ").rstrip(" " + SPACE)
        normalized = mapped.replace(" ", SPACE)
        if not self.add_dummy_prefix:
            return normalized
        return normalized + SPACE if self.suffix else SPACE + normalized

    def align(self, text: AlignedText) -> AlignedText:
        """The same, with the origin of each character, which reaches to where that of the next one starts.

        So a word takes the dropped spaces behind it, and the dummy prefix, in front of the first word, takes nothing.
        """
        chunks = list(self.character_map.steps(text.text))
        first = 0
        while self.remove_extra_whitespaces and first < len(chunks) and chunks[first][1] == " ":
            first += 1
        if first == len(chunks):
            return AlignedText("", [], [])
        characters: list[str] = []
        origins: list[int] = []
        if self.add_dummy_prefix and not self.suffix:
            characters.append(SPACE)
            origins.append(chunks[first][0])
        after_space = self.remove_extra_whitespaces
        for start, replacement in chunks[first:]:
            shown = replacement.lstrip(" ") if after_space else replacement
            if shown:
                characters += shown.replace(" ", SPACE)
                origins += [start] * len(shown)
                after_space = self.remove_extra_whitespaces and shown.endswith(" ")
        end = len(text.text)
        while self.remove_extra_whitespaces and characters[-1:] == [SPACE]:
            characters.pop()
            end = origins.pop()
        if self.add_dummy_prefix and self.suffix:
            characters.append(SPACE)
            origins.append(end)
        boundaries = [text.starts[origin] if origin < len(text.starts) else text.ends[-1] for origin in [*origins, end]]
        return AlignedText("".join(characters), boundaries[:-1], boundaries[1:])

    def to_json(self) -> dict[str, Any]:
        """The "normalizer" of a tokenizer.json; ValueError for a dummy suffix, which none of its steps can add."""
        if self.add_dummy_prefix and self.suffix:
            raise ValueError(
                "a tokenizer.json cannot say that a space is put behind the text (treat_whitespace_as_suffix)"
            )
        steps: list[Normalizer] = [self.character_map] if self.character_map.compiled else []
        if self.remove_extra_whitespaces:
            # Not ^ and $, which other engines find at the ends of lines, nor \z, which this one does not know.
            steps += [Replace(Regex(r"(?<![\s\S]) +|[ ▁]+(?![\s\S])"), ""), Replace(Regex(" {2,}"), " ")]
        if self.add_dummy_prefix:
            steps.append(Prepend(SPACE))
        return NormalizerSequence([*steps, Replace(" ", SPACE)]).to_json()
