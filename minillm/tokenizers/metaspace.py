"""Spaces as symbols: SentencePiece's `▁`, which makes a text and its tokens, put end to end, the same.

    Hello  world  ->  ▁Hello ▁ ▁world

Source: Kudo and Richardson, "SentencePiece" (2018), section 3.1; as Hugging Face's `tokenizers` has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from minillm.tokenizers.aligned_text import AlignedText
from minillm.tokenizers.arguments import checked_flag
from minillm.tokenizers.json_options import read_options
from minillm.tokenizers.piece_pattern import BLOCK_LENGTH

SPACE = "▁"  # U+2581, how SentencePiece writes a space
PrependScheme = Literal["always", "first", "never"]


class Metaspace:
    """Makes each space a visible symbol, and cuts in front of it.

    Args:
        replacement: The symbol; one that is in the text already counts as a space.
        prepend_scheme: Whether a text that does not begin with a space gets one: "always", also behind a special
            token, "first", only where the user's text begins, "never".
        split: False does not cut: the whole text is one piece.

    Raises:
        TypeError: `split` is no bool.
        ValueError: `replacement` is not one character other than a space, or `prepend_scheme` is unknown.
    """

    def __init__(self, replacement: str = SPACE, prepend_scheme: PrependScheme = "always", split: bool = True) -> None:
        if not isinstance(replacement, str) or len(replacement) != 1 or replacement == " ":
            raise ValueError(f"replacement must be one character other than a space, got {replacement!r}")
        if prepend_scheme not in get_args(PrependScheme):
            known = ", ".join(map(repr, get_args(PrependScheme)))
            raise ValueError(f"prepend_scheme must be one of {known}, got {prepend_scheme!r}")
        self.replacement = replacement
        self.prepend_scheme = prepend_scheme
        self.splits = checked_flag("split", split)

    def split(self, text: str, block_length: int = BLOCK_LENGTH, *, at_start: bool = True) -> Iterator[list[str]]:
        """Yield the pieces of `text` in order, those of a block at a time.

        Args:
            text: Any text.
            block_length: About how many characters a block has.
            at_start: Whether `text` begins where the user's text does.
        """
        if not text:
            return
        text = text.replace(self.replacement, " ")
        prefix = self._prefix(text, at_start)
        if not self.splits:
            yield [prefix + text.replace(" ", self.replacement)]
            return
        start = 0
        while start < len(text):
            end = text.find(" ", start + max(block_length, 1))
            end = len(text) if end < 0 else end
            # In front of each symbol stands a space now, and nowhere else.
            pieces = text[start:end].replace(" ", " " + self.replacement).split(" ")
            pieces[0] = prefix + pieces[0]
            yield pieces if pieces[0] else pieces[1:]
            prefix = ""
            start = end

    def _prefix(self, text: str, at_start: bool) -> str:
        prepends = self.prepend_scheme == "always" or (self.prepend_scheme == "first" and at_start)
        return self.replacement if prepends and text[0] not in (" ", self.replacement) else ""

    def align(self, text: AlignedText) -> list[AlignedText]:
        """The same pieces, and where their characters come from; a symbol put in front, from the first character.

        The user's text begins here if the first character comes from its first one: not if a normalizer took that away.
        """
        if not text.text:
            return []
        marked = AlignedText(text.text.replace(" ", self.replacement), text.starts, text.ends)
        pieces = []
        start = 0
        while self.splits and (end := marked.text.find(self.replacement, start + 1)) > 0:
            pieces.append(marked.slice(start, end))
            start = end
        pieces.append(marked.slice(start, len(marked.text)))
        if prefix := self._prefix(marked.text, text.starts[0] == 0):
            first = pieces[0]
            starts, ends = [first.starts[0], *first.starts], [first.ends[0], *first.ends]
            pieces[0] = AlignedText(prefix + first.text, starts, ends)
        return pieces

    def to_json(self) -> dict[str, Any]:
        """Its part of a tokenizer.json."""
        return {
            "type": "Metaspace",
            "replacement": self.replacement,
            "prepend_scheme": self.prepend_scheme,
            "split": self.splits,
        }


def metaspace_from_json(part: Mapping[str, Any]) -> Metaspace:
    """A pre-tokenizer or a decoder of a tokenizer.json, whose options are the same; ValueError for others than these.

    Older files say add_prefix_space instead of prepend_scheme, and have str_rep, the symbol once more.
    """
    options = read_options(
        part,
        replacement=(str,),
        prepend_scheme=(str, "always" if part.get("add_prefix_space", True) is True else "never"),
        split=(bool, True),
        add_prefix_space=(bool, True),
        str_rep=(str, part.get("replacement")),
    )
    if not options["add_prefix_space"] and options["prepend_scheme"] != "never":
        raise ValueError(f"prepend_scheme must be 'never' without add_prefix_space, got {options['prepend_scheme']!r}")
    return Metaspace(options["replacement"], options["prepend_scheme"], options["split"])
