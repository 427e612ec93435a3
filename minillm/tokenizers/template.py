"""Templates: what a model wants around a text or a pair of texts, such as BERT's `[CLS] text [SEP] text [SEP]`.

    [CLS] $A [SEP]                        for one text
    [CLS] $A [SEP] $B:1 [SEP]:1           for a pair

`$A` and `$B` are the texts, `:1` is a type id (which segment a token belongs to; 0 if left out), all else is a special
token: see `template_slots`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from minillm.tokenizers.added_tokens import WHITE_SPACE
from minillm.tokenizers.arguments import checked_flag, checked_integer
from minillm.tokenizers.encoding import Encoding
from minillm.tokenizers.json_file import kind
from minillm.tokenizers.template_slots import (
    LARGEST_ID,
    Slot,
    TextSlot,
    TokenSlot,
    checked_slot,
    slot_from_json,
    slot_to_json,
    slots_from_string,
    slots_to_string,
)

SPACE = "Ġ"  # how byte-level tokens spell a space
Token = tuple[str, int]


class Template:
    """Puts special tokens around a text, or a pair.

    Args:
        single: For one text: slots, or a string such as "[CLS] $A [SEP]".
        pair: For two.
        special_tokens: The id of each special token that is used; or, for a name that stands for several tokens, a list
            of (token, id).
        trim_offsets: Take white space at the ends of a token out of its offsets, as byte-level tokenizers do whose
            tokens begin with the space before a word.
        add_prefix_space: Only with `trim_offsets`: the pre-tokenizer puts a space before a text, so that one space at
            its beginning is not in the text and nothing is taken off.

    Raises:
        TypeError: A template is neither a string nor slots, or an argument is of another wrong type.
        ValueError: A template string cannot be read; `single` does not have the first text once and `pair` each of
            them; a special token has no id; an id or type id is out of range.
    """

    def __init__(
        self,
        single: str | Iterable[Slot] = "$A",
        pair: str | Iterable[Slot] = "$A $B:1",
        special_tokens: Mapping[str, int | Sequence[Token]] | None = None,
        *,
        trim_offsets: bool = False,
        add_prefix_space: bool = False,
    ) -> None:
        self.single = tuple(map(checked_slot, slots_from_string(single) if isinstance(single, str) else single))
        self.pair = tuple(map(checked_slot, slots_from_string(pair) if isinstance(pair, str) else pair))
        if not isinstance(special_tokens, Mapping | None):
            raise TypeError(f"special_tokens must be a mapping of names to ids, got {special_tokens!r}")
        self.special_tokens = {name: _tokens(name, entry) for name, entry in (special_tokens or {}).items()}
        self.trim_offsets = checked_flag("trim_offsets", trim_offsets)
        self.add_prefix_space = checked_flag("add_prefix_space", add_prefix_space) and trim_offsets
        for name, slots, wanted in (("single", self.single, [0]), ("pair", self.pair, [0, 1])):
            if sorted(slot.sequence for slot in slots if isinstance(slot, TextSlot)) != wanted:
                texts = "the first text ($A) once" if name == "single" else "each text ($A, $B) once"
                raise ValueError(f"template {name} must have {texts}, got {slots_to_string(slots)!r}")
            for slot in slots:
                if isinstance(slot, TokenSlot) and slot.name not in self.special_tokens:
                    raise ValueError(f"special_tokens must have {slot.name!r}, which template {name} uses")

    def __repr__(self) -> str:
        strings = f"single={slots_to_string(self.single)!r}, pair={slots_to_string(self.pair)!r}"
        trimming = f", trim_offsets=True, add_prefix_space={self.add_prefix_space}" if self.trim_offsets else ""
        return f"Template({strings}, special_tokens={self.special_tokens}{trimming})"

    def __eq__(self, other: object) -> bool:
        return vars(self) == vars(other) if isinstance(other, Template) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def n_added(self, pair: bool = False) -> int:
        """How many tokens are added to one text, or to a pair."""
        slots = self.pair if pair else self.single
        return sum(len(self.special_tokens[slot.name]) for slot in slots if isinstance(slot, TokenSlot))

    def apply(self, first: Encoding, second: Encoding | None = None) -> Encoding:
        """The encoding of a text, or of a pair, with everything around it.

        What has overflowed gets the template as well: each stretch of one text with each stretch of the other, in the
        order in which `tokenizers` lists them. (It leaves them the type ids 0 and 1 where a template asks for others,
        and loses their sequence ids where there is no template; here they are treated like all encodings.)
        """
        given = (first,) if second is None else (first, second)
        slots = self.single if second is None else self.pair
        order = [slot.sequence for slot in slots if isinstance(slot, TextSlot)]
        stretches = [[self._trimmed(part) for part in (given[i], *given[i].overflowing)] for i in order]
        filled = [
            Encoding.joined(self._fill(slot, dict(zip(order, parts, strict=True))) for slot in slots)
            for parts in product(*stretches)
        ]
        n = len(stretches[-1])  # the first n have what stays of the first text
        return replace(filled[0], overflowing=(*filled[n:], *filled[1:n]))

    def _fill(self, slot: Slot, texts: Mapping[int, Encoding]) -> Encoding:
        if isinstance(slot, TextSlot):
            text = texts[slot.sequence]
            n = len(text)
            return replace(text, type_ids=[slot.type_id] * n, sequence_ids=[slot.sequence] * n)
        tokens = self.special_tokens[slot.name]
        n = len(tokens)
        return Encoding(
            ids=[i for _, i in tokens],
            tokens=[token for token, _ in tokens],
            offsets=[(0, 0)] * n,
            type_ids=[slot.type_id] * n,
            special_tokens_mask=[1] * n,
            attention_mask=[1] * n,
            word_ids=[None] * n,
            sequence_ids=[None] * n,
        )

    def _trimmed(self, encoding: Encoding) -> Encoding:
        """Offsets without the white space at the ends of tokens."""
        if not self.trim_offsets:
            return encoding
        offsets = []
        for i, (token, (start, end)) in enumerate(zip(encoding.tokens, encoding.offsets, strict=True)):
            leading = len(token) - len(token.lstrip(SPACE + WHITE_SPACE))
            trailing = len(token) - len(token.rstrip(SPACE + WHITE_SPACE))
            if not (leading == 1 and self.add_prefix_space and (i == 0 or start == 0)):
                start = min(start + leading, end)
            if trailing <= end:
                end = max(end - trailing, start)
            offsets.append((start, end))
        return replace(encoding, offsets=offsets)

    def to_json(self) -> dict[str, Any]:
        """The "post_processor" of a tokenizer.json."""
        byte_level = {
            "type": "ByteLevel",
            "add_prefix_space": self.add_prefix_space,
            "trim_offsets": True,
            "use_regex": True,
        }
        processing = {
            "type": "TemplateProcessing",
            "single": list(map(slot_to_json, self.single)),
            "pair": list(map(slot_to_json, self.pair)),
            "special_tokens": {
                name: {"id": name, "ids": [i for _, i in tokens], "tokens": [token for token, _ in tokens]}
                for name, tokens in self.special_tokens.items()
            },
        }
        return {"type": "Sequence", "processors": [byte_level, processing]} if self.trim_offsets else processing


def bert_template(cls: Token = ("[CLS]", 101), sep: Token = ("[SEP]", 102)) -> Template:
    """BERT's: `[CLS] A [SEP]`, `[CLS] A [SEP] B [SEP]`, the second text and what ends it with type id 1."""
    begin, end = TokenSlot(cls[0]), TokenSlot(sep[0])
    single: list[Slot] = [begin, TextSlot(0), end]
    return Template(single, [*single, TextSlot(1, 1), TokenSlot(sep[0], 1)], dict([cls, sep]))


def roberta_template(
    cls: Token = ("<s>", 0),
    sep: Token = ("</s>", 2),
    *,
    trim_offsets: bool = True,
    add_prefix_space: bool = False,
) -> Template:
    """RoBERTa's: `<s> A </s>`, `<s> A </s> </s> B </s>`, all with type id 0."""
    begin, end = TokenSlot(cls[0]), TokenSlot(sep[0])
    single: list[Slot] = [begin, TextSlot(0), end]
    pair = [*single, end, TextSlot(1), end]
    return Template(single, pair, dict([cls, sep]), trim_offsets=trim_offsets, add_prefix_space=add_prefix_space)


def t5_template(eos: Token = ("</s>", 1)) -> Template:
    """T5's: `A </s>`, `A </s> B </s>`, all with type id 0."""
    end = TokenSlot(eos[0])
    return Template([TextSlot(0), end], [TextSlot(0), end, TextSlot(1), end], dict([eos]))


def llama_template(bos: Token = ("<s>", 1), eos: Token | None = None) -> Template:
    """Llama's: `<s> A`, `<s> A <s> B`, the second text and its `<s>` with type id 1; with `eos`, also behind each text.

    Llama 3's token is ("<|begin_of_text|>", 128000).
    """
    return _around_each(bos, eos)


def gpt_template(end: Token = ("<|endoftext|>", 50256), *, before: bool = False, after: bool = False) -> Template:
    """GPT's: nothing is added; or its one special token, which separates documents, before or after each text."""
    return _around_each(end if before else None, end if after else None)


def _around_each(before: Token | None, after: Token | None) -> Template:
    """A token before each text, a token after it, or both; type id 1 for all of the second."""

    def around(sequence: int) -> list[Slot]:
        slots: list[Slot] = [TokenSlot(before[0], sequence)] if before else []
        slots.append(TextSlot(sequence, sequence))
        return [*slots, TokenSlot(after[0], sequence)] if after else slots

    return Template(around(0), around(0) + around(1), dict(token for token in (before, after) if token))


def template_from_json(part: Any) -> Template | None:
    """The template that a tokenizer.json's "post_processor" stands for; None if that does nothing.

    Known are TemplateProcessing, BertProcessing, RobertaProcessing, ByteLevel, and a Sequence of ByteLevel and then one
    of the first two, as Llama 3 has it. ValueError names any other, and what is wrong with these.
    """
    if part is None:
        return None
    steps = part.get("processors") if kind(part) == "Sequence" else [part]
    kinds = list(map(kind, steps)) if isinstance(steps, list) else []
    if kinds not in _KNOWN:
        raise ValueError(f"post_processor must be one of {_KNOWN}, several being a Sequence, got {kinds or part!r}")
    step = steps[-1]
    try:
        if step["type"] == "BertProcessing":
            template = bert_template(_token(step["cls"]), _token(step["sep"]))
        elif step["type"] == "RobertaProcessing":
            template = roberta_template(_token(step["cls"]), _token(step["sep"]))
        elif step["type"] == "TemplateProcessing":
            template = Template(
                map(slot_from_json, step["single"]),
                map(slot_from_json, step["pair"]),
                {
                    name: [*zip(token["tokens"], token["ids"], strict=True)]
                    for name, token in step["special_tokens"].items()
                },
            )
        else:
            template = Template()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"post_processor {step['type']} is incomplete or wrong: {error!r}") from None
    for flag in ("trim_offsets", "add_prefix_space"):
        if not isinstance(steps[0].get(flag, True), bool):
            raise ValueError(f"post_processor {kinds[0]}: {flag} must be true or false, got {steps[0][flag]!r}")
    trims = kinds[0] in ("ByteLevel", "RobertaProcessing") and steps[0].get("trim_offsets", True)
    if kinds == ["ByteLevel"] and not trims:
        return None
    return Template(
        template.single,
        template.pair,
        template.special_tokens,
        trim_offsets=trims,
        add_prefix_space=trims and steps[0].get("add_prefix_space", True),
    )


_KNOWN = [
    ["TemplateProcessing"],
    ["BertProcessing"],
    ["RobertaProcessing"],
    ["ByteLevel"],
    ["ByteLevel", "TemplateProcessing"],
    ["ByteLevel", "BertProcessing"],
]


def _tokens(name: str, entry: int | Sequence[Token]) -> tuple[Token, ...]:
    """What a name of `Template.special_tokens` stands for: one token of this name, or several of any."""
    return tuple(map(_token, entry)) if isinstance(entry, list | tuple) else (_token((name, entry)),)


def _token(entry: Any) -> Token:
    match entry:
        case [str(text), token_id]:
            return text, checked_integer(f"the id of special token {text!r}", token_id, 0, LARGEST_ID)
    raise TypeError(f"a special token must be a string and an id, got {entry!r}")
