"""What each character becomes: the shape of every normalization that looks at one character at a time."""

from __future__ import annotations

from collections.abc import Callable

from minillm.tokenizers.aligned_text import AlignedText


class CharacterTable(dict[str, str]):
    """Character -> what it becomes: nothing, itself, or other characters. Filled as characters are met.

    Args:
        becomes: Called once for each different character.
    """

    def __init__(self, becomes: Callable[[str], str]) -> None:
        super().__init__()
        self._becomes = becomes

    def __missing__(self, character: str) -> str:
        self[character] = result = self._becomes(character)
        return result

    def __call__(self, text: str) -> str:
        """The text of what its characters become."""
        return "".join(map(self.__getitem__, text))

    def align(self, text: AlignedText) -> AlignedText:
        """The same, each character coming from where the one came from that became it."""
        parts = list(map(self.__getitem__, text.text))
        joined = "".join(parts)
        if len(joined) == len(parts) and all(parts):
            return AlignedText(joined, text.starts, text.ends)
        starts = [start for part, start in zip(parts, text.starts, strict=True) for _ in part]
        ends = [end for part, end in zip(parts, text.ends, strict=True) for _ in part]
        return AlignedText(joined, starts, ends)
