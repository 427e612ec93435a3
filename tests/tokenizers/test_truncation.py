"""Truncation: what stays of texts and what overflows, as `enable_truncation` of `tokenizers` has it."""

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st
from tokenizers import Encoding as PeerEncoding
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from minillm.tokenizers.encoding import Encoding
from minillm.tokenizers.prepare import prepare
from minillm.tokenizers.template import Template, bert_template, roberta_template, t5_template
from minillm.tokenizers.truncation import SIDES, STRATEGIES, Truncation, truncation_from_json

FIELDS = [field.name for field in fields(Encoding) if field.name != "overflowing"]
CLS, SEP = ("[CLS]", 101), ("[SEP]", 102)
BERT = ("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
SECOND_FIRST = ("$A [SEP]", "[CLS]:1 $B:1 [SEP] [SEP] $A")
TEMPLATES: dict[str, tuple[Template | None, Any]] = {
    "none": (None, None),
    "bert": (bert_template(), processors.TemplateProcessing(*BERT, special_tokens=[CLS, SEP])),
    "bert of old": (bert_template(), processors.BertProcessing(SEP, CLS)),
    "roberta": (roberta_template(CLS, SEP), processors.RobertaProcessing(SEP, CLS, add_prefix_space=False)),
    "t5": (t5_template(SEP), processors.TemplateProcessing("$A [SEP]", "$A [SEP] $B [SEP]", special_tokens=[SEP])),
    "second first": (
        Template(*SECOND_FIRST, dict([CLS, SEP])),
        processors.TemplateProcessing(*SECOND_FIRST, special_tokens=[CLS, SEP]),
    ),
}
texts = st.text("abc .", max_size=14)
strategies, sides = st.sampled_from(list(STRATEGIES)), st.sampled_from(list(SIDES))


def character_tokenizer() -> Tokenizer:
    """Each character is a token, each run of letters a word."""
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate("abc .")}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return tokenizer


def encoding_of(peer: PeerEncoding) -> Encoding:
    return Encoding.of_text(peer.ids, peer.tokens, peer.offsets, peer.word_ids)


def as_lists(encoding: Encoding | PeerEncoding, left_out: str = "") -> dict[str, list[Any]]:
    return {field: getattr(encoding, field) for field in FIELDS if field != left_out}


def encode(text: str) -> Encoding:
    return encoding_of(character_tokenizer().encode(text))


@given(
    st.sampled_from(list(TEMPLATES)), texts, st.none() | texts, st.integers(4, 16), strategies, st.integers(0, 3), sides
)
def test_as_tokenizers_truncates(
    name: str, first: str, second: str | None, max_length: int, strategy: str, stride: int, side: str
) -> None:
    template, post_processor = TEMPLATES[name]
    assume(stride <= max_length - (template or Template()).n_added())  # others the peer refuses before there is a text
    encodings = [encode(text) for text in (first, second) if text is not None]
    room = max_length - (template or Template()).n_added(second is not None)
    tokenizer = character_tokenizer()
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    tokenizer.enable_truncation(max_length, strategy=strategy, stride=stride, direction=side)
    try:
        ours = prepare(*encodings, template=template, truncation=Truncation(max_length, strategy, stride, side))
    except ValueError as error:
        event(f"refused: {str(error)[:12]}")
        if room > 0 or strategy == "longest_first":  # without room the peer takes all of both texts away
            with pytest.raises(BaseException, match=r"stride|Truncation error"):  # it panics: that is no Exception
                tokenizer.encode(first, second)
        return
    expected = tokenizer.encode(first, second)
    event(f"overflowing: {min(len(expected.overflowing), 3)}")
    assert as_lists(ours) == as_lists(expected)
    # Of these the peer forgets what the template says of types, and without a template which text is which.
    left_out = {"none": "sequence_ids", "t5": "type_ids"}.get(name, "")
    theirs = [as_lists(part, left_out) for part in expected.overflowing]
    assert [as_lists(part, left_out) for part in ours.overflowing] == theirs


def test_types_and_texts_of_what_overflows() -> None:
    """Where `tokenizers` forgets them."""
    t5 = prepare(encode("abca"), encode("bc"), template=t5_template(("|", 1)), truncation=Truncation(5))
    assert ["".join(part.tokens) for part in (t5, *t5.overflowing)] == ["ab|b|", "ca|b|", "ca|c|", "ab|c|"]
    assert all(part.type_ids == [0] * 5 for part in (t5, *t5.overflowing))
    plain = prepare(encode("aaaa"), encode("bbb"), truncation=Truncation(5))
    assert ["".join(part.tokens) for part in (plain, *plain.overflowing)] == ["aaabb", "abb", "ab", "aaab"]
    for part in (plain, *plain.overflowing):
        assert part.sequence_ids == part.type_ids == ["ab".index(token) for token in part.tokens]


@given(texts, st.integers(1, 14), st.integers(0, 13), sides)
def test_stretches_cover_the_text(text: str, max_length: int, stride: int, side: str) -> None:
    assume(stride < max_length)
    kept, second = Truncation(max_length, stride=stride, side=side).apply(encode(text))
    assert second is None
    seen_from = slice(None) if side == "right" else slice(None, None, -1)
    stretches = ["".join(part.tokens)[seen_from] for part in (kept, *kept.overflowing)]
    covered = stretches[0]
    for stretch in stretches[1:]:
        assert stretch[:stride] == covered[len(covered) - stride :]
        assert len(stretch) > stride
        covered += stretch[stride:]
    assert covered == text[seen_from]
    assert all(len(stretch) == max_length for stretch in stretches[:-1])


@given(texts, texts, st.integers(1, 12))
def test_longest_first_takes_one_token_after_the_other(first: str, second: str, max_length: int) -> None:
    n_first, n_second = len(first), len(second)
    while n_first + n_second > max_length:
        if n_first > n_second or (n_first == n_second and len(first) <= len(second)):
            n_first -= 1
        else:
            n_second -= 1
    shortened = Truncation(max_length).apply(encode(first), encode(second))
    assert ["".join(part.tokens) for part in shortened if part is not None] == [first[:n_first], second[:n_second]]


def test_a_text_for_which_there_is_no_room_overflows_as_it_is() -> None:
    for strategy in ("longest_first", "only_first"):
        kept = prepare(encode("abc"), template=bert_template(), truncation=Truncation(2, strategy))
        assert ["".join(part.tokens) for part in (kept, *kept.overflowing)] == ["[CLS][SEP]", "[CLS]abc[SEP]"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"max_length": 4, "strategy": "both"}, "strategy must be one of .*, got 'both'"),
        ({"max_length": 4, "stride": 4}, "stride must be from 0 to max_length - 1 = 3, got 4"),
        ({"max_length": 4, "stride": -1}, "stride must be from 0"),
        ({"max_length": 4, "side": "top"}, "side must be one of .*, got 'top'"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Truncation(**arguments)
    with pytest.raises(TypeError):
        Truncation(4.0)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("truncation", "second", "message"),
    [
        (Truncation(2), "ab", "max_length must be at least 3, what the template adds; got 2"),
        (Truncation(1), None, "max_length must be at least 2"),
        (Truncation(6, "only_second"), None, "'only_second' must leave at least one token .* 5 tokens, its pair 0"),
        (Truncation(8, "only_second"), "a", "this text has 5 tokens, its pair 1, and there is room for 5"),
        (Truncation(8, "only_first"), "abbba", "'only_first' must leave at least one token"),
        (Truncation(4, stride=2), None, "stride must be less than the 2 tokens that stay of a text, got 2"),
    ],
)
def test_what_cannot_be_cut_is_refused(truncation: Truncation, second: str | None, message: str) -> None:
    pair = None if second is None else encode(second)
    with pytest.raises(ValueError, match=message):
        prepare(encode("abcab"), pair, template=bert_template(), truncation=truncation)


@given(st.integers(1, 99), strategies, st.integers(0, 99), sides)
def test_tokenizer_json_keeps_it(max_length: int, strategy: str, stride: int, side: str) -> None:
    assume(stride < max_length)
    tokenizer = character_tokenizer()
    tokenizer.enable_truncation(max_length, strategy=strategy, stride=stride, direction=side)
    written = json.loads(tokenizer.to_str())["truncation"]
    ours = Truncation(max_length, strategy, stride, side)
    assert ours.to_json() == written
    assert truncation_from_json(written) == ours


@pytest.mark.parametrize(
    "part",
    [
        [],
        {},
        {"max_length": 4, "strategy": "OnlyFirst"},
        Truncation(4).to_json() | {"strategy": "only_first"},
        Truncation(4).to_json() | {"direction": "Up"},
        Truncation(4).to_json() | {"max_length": 0},
        Truncation(4).to_json() | {"max_length": "4"},
    ],
)
def test_other_json_is_refused(part: Any) -> None:
    with pytest.raises(ValueError, match=r"truncation: .* is none that is known here"):
        truncation_from_json(part)
    assert truncation_from_json(None) is None
    assert truncation_from_json({"max_length": 4, "strategy": "LongestFirst", "stride": 0}) == Truncation(4)
