"""Added tokens: texts such as `[MASK]` or `<|endoftext|>` that are one token wherever they stand.

They are looked for before everything else and cut out, so that neither normalization nor pre-tokenization nor the model
sees them: first those that are not normalized, in the text as it is; then, in the normalized stretches between them,
the normalized form of the others. The search goes from left to right; of several tokens that begin at the same place
the longest is found, and the search goes on behind it.

How the flags act follows Hugging Face's `tokenizers`, where they come from (its documentation of `AddedToken`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from os.path import commonprefix
from typing import Any, NamedTuple, Protocol

import regex

from minillm.tokenizers.aligned_text import AlignedText

# Unicode's White_Space: \s of `re` has four control characters more (U+001C to U+001F).
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"
_WHITE_SPACES = re.compile(f"[{WHITE_SPACE}]*")
# What belongs to a word by Unicode's technical standard 18, annex C: \w of `re` lacks the combining marks.
_WORD_CHARACTER = regex.compile(r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]")

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class AddedToken:
    """A text that is one token, and where it counts as found.

    Attributes:
        text: How it is written. Not empty, no lone surrogates.
        id: Its token id, at least 0.
        lstrip, rstrip: The token takes the white space to its left, its right along.
        single_word: Found only where neither neighbour is part of a word (a letter, mark, digit or `_`).
        normalized: Looked for in the normalized text, in its own normalized form.
        special: Left out by `decode(..., skip_special_tokens=True)`; text for `encode(..., allow_special=False)`.
    """

    text: str
    id: int
    _: KW_ONLY
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False
    special: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise ValueError(f"the text of an added token must be a str that is not empty, got {self.text!r}")
        try:
            self.text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"an added token must not contain lone surrogates, got {self.text!r}") from None
        if not isinstance(self.id, int) or isinstance(self.id, bool) or self.id < 0:
            raise ValueError(f"the id of added token {self.text!r} must be an integer of at least 0, got {self.id!r}")

    @classmethod
    def from_json(cls, entry: Any) -> AddedToken:
        """An entry of a tokenizer.json's `added_tokens`; ValueError says what in it is missing or of a wrong type."""
        if not (isinstance(entry, dict) and "content" in entry and "id" in entry):
            raise ValueError(f"an added token must be an object with 'content' and 'id', got {entry!r}")
        for flag in FLAGS:
            if not isinstance(entry.get(flag, False), bool):
                raise ValueError(f"added token {entry['content']!r}: {flag} must be true or false, got {entry[flag]!r}")
        return cls(entry["content"], entry["id"], **{flag: entry.get(flag, False) for flag in FLAGS})

    def to_json(self) -> dict[str, Any]:
        """The entry of a tokenizer.json's `added_tokens`."""
        return {"id": self.id, "content": self.text} | {flag: getattr(self, flag) for flag in FLAGS}


class FoundToken(NamedTuple):
    """An added token in a text: its id, how it is written there, and the characters of the original that it takes."""

    id: int
    text: str
    start: int
    end: int


class AligningNormalizer(Protocol):
    """What `cut_aligned` asks of a normalizer."""

    def __call__(self, text: str) -> str: ...
    def align(self, text: AlignedText) -> AlignedText: ...


class AddedTokens:
    """The added tokens of a tokenizer, and the cutting of texts at them.

    Raises:
        ValueError: Two tokens have the same text, or the same id.
    """

    def __init__(self, tokens: Iterable[AddedToken] = ()) -> None:
        self._by_id: dict[int, AddedToken] = {}
        by_text: dict[str, AddedToken] = {}
        for token in tokens:
            if (same := by_text.setdefault(token.text, token)) != token:
                raise ValueError(f"added token {token.text!r} must be there once, got ids {same.id} and {token.id}")
            if (same := self._by_id.setdefault(token.id, token)) != token:
                raise ValueError(f"added tokens {same.text!r} and {token.text!r} must not share the id {token.id}")
        self._by_text = by_text
        self._raw = _Finder({text: token for text, token in by_text.items() if not token.normalized})
        self._normalized: tuple[Callable[[str], str] | None, _Finder] | None = None

    @classmethod
    def from_json(cls, entries: Any) -> AddedTokens:
        """The `added_tokens` of a tokenizer.json, a list or null."""
        if not isinstance(entries, list | None):
            raise ValueError(f"added_tokens must be a list or null, got {entries!r}")
        return cls(map(AddedToken.from_json, entries or []))

    def to_json(self) -> list[dict[str, Any]]:
        """The `added_tokens` of a tokenizer.json: in the order of their ids."""
        return [token.to_json() for _, token in sorted(self._by_id.items())]

    def __iter__(self) -> Iterator[AddedToken]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def __repr__(self) -> str:
        return f"AddedTokens({list(self)!r})"

    def __eq__(self, other: object) -> bool:
        return self._by_id == other._by_id if isinstance(other, AddedTokens) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    @property
    def special(self) -> dict[str, int]:
        """Text -> id of the special ones."""
        return {token.text: token.id for token in self if token.special}

    def with_text(self, text: str) -> AddedToken | None:
        """The token of this text, None if there is none."""
        return self._by_text.get(text)

    def cut(
        self, text: str, normalizer: Callable[[str], str] | None = None, *, allow_special: bool = True
    ) -> list[int | str]:
        """The ids of the added tokens in a text, and between them the stretches of other text, normalized.

        Args:
            text: The text as the user wrote it.
            normalizer: Applied to each stretch by itself; None leaves them as they are.
            allow_special: False leaves special tokens in the text as if they were any other text.
        """
        out: list[int | str] = []
        normalized = self._normalized_finder(normalizer)
        for token, start, end in self._raw.find(text, allow_special):
            if token is not None:
                out.append(token.id)
                continue
            stretch = text[start:end] if normalizer is None else normalizer(text[start:end])
            for inner, inner_start, inner_end in normalized.find(stretch, allow_special):
                out.append(stretch[inner_start:inner_end] if inner is None else inner.id)
        return out

    def cut_aligned(
        self, text: AlignedText, normalizer: AligningNormalizer | None = None, *, allow_special: bool = True
    ) -> list[FoundToken | AlignedText]:
        """`cut`, with the place of each token and the origin of each stretch."""
        out: list[FoundToken | AlignedText] = []
        normalized = self._normalized_finder(normalizer)
        for token, start, end in self._raw.find(text.text, allow_special):
            if token is not None:
                out.append(FoundToken(token.id, text.text[start:end], *text.span(start, end)))
                continue
            stretch = text.slice(start, end)
            if normalizer is not None:
                stretch = normalizer.align(stretch)
            for inner, *span in normalized.find(stretch.text, allow_special):
                part = stretch.slice(*span)
                out.append(part if inner is None else FoundToken(inner.id, part.text, *stretch.span(*span)))
        return out

    def _normalized_finder(self, normalizer: Callable[[str], str] | None) -> _Finder:
        """The finder of normalized tokens; made anew only when the normalizer is another one than the last time."""
        if self._normalized is None or self._normalized[0] is not normalizer:
            forms: dict[str, AddedToken] = {}
            for token in self:
                if token.normalized:
                    # Of two tokens with the same form the first is found: in `tokenizers` either, at random.
                    forms.setdefault(token.text if normalizer is None else normalizer(token.text), token)
            forms.pop("", None)  # nothing is left of it to be found
            self._normalized = normalizer, _Finder(forms)
        return self._normalized[1]


class _Finder:
    """Finds texts that stand for added tokens."""

    def __init__(self, tokens: Mapping[str, AddedToken]) -> None:
        self._tokens = tokens
        self._pattern = re.compile(longest_of(tokens)) if tokens else None

    def find(self, text: str, allow_special: bool) -> Iterator[tuple[AddedToken | None, int, int]]:
        """All of a text, from left to right, in stretches that are not empty: (token or None, start, end)."""
        done = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            token, (start, end) = self._tokens[match.group()], match.span()
            if token.special and not allow_special:
                continue
            if token.single_word and (
                (start > 0 and _WORD_CHARACTER.match(text, start - 1)) or _WORD_CHARACTER.match(text, end)
            ):
                continue
            if token.lstrip:
                # White space that the token before has taken is gone; a token that is white space may be gone with it.
                start = max(done, start - len(text[done:start]) + len(text[done:start].rstrip(WHITE_SPACE)))
                if start >= end:
                    continue
            if token.rstrip:
                end = _WHITE_SPACES.match(text, end).end()  # type: ignore[union-attr]  # it matches everywhere
            if done < start:
                yield None, done, start
            yield token, start, end
            done = end
        if done < len(text):
            yield None, done, len(text)


def longest_of(texts: Iterable[str], depth: int = 32) -> str:
    """A regular expression that matches the longest of several texts that stands at a place.

    Common beginnings are written once, so that a search tries only the texts that go on like the one at hand: thousands
    of tokens that begin with `<` cost little more than one. Beyond `depth` groups within each other, which `re` does
    not like, the texts are just listed, longest first.
    """
    branches: dict[str, list[str]] = defaultdict(list)
    for text in sorted(texts, key=len, reverse=True):
        branches[text[0]].append(text)
    if depth == 0:
        return "|".join(re.escape(text) for branch in branches.values() for text in branch)
    alternatives = []
    for branch in branches.values():
        beginning = commonprefix(branch)  # noqa: RUF071 - of characters, which is what is wanted
        rests = [text[len(beginning) :] for text in branch if text != beginning]
        optional = "?" if beginning in branch else ""
        tail = f"(?:{longest_of(rests, depth - 1)}){optional}" if rests else ""
        alternatives.append(re.escape(beginning) + tail)
    return "|".join(alternatives)
