"""Templates: the same tokens, types, masks and offsets as the post-processors of `tokenizers` give."""

import json
from dataclasses import fields
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Encoding as PeerEncoding
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertTokenizer, GPT2Tokenizer, LlamaTokenizer, RobertaTokenizer, T5Tokenizer

from minillm.tokenizers.encoding import Encoding
from minillm.tokenizers.template import (
    Template,
    bert_template,
    gpt_template,
    llama_template,
    roberta_template,
    t5_template,
    template_from_json,
)
from minillm.tokenizers.template_slots import TextSlot, TokenSlot, slots_from_string

FIELDS = [field.name for field in fields(Encoding) if field.name != "overflowing"]
texts = st.text("ab cé中\t\u3000.", max_size=12)
CLS, SEP, END = ("[CLS]", 101), ("[SEP]", 102), ("<|endoftext|>", 50256)
ODD = {"id": "odd", "ids": [7, 8, 9], "tokens": ["three", "to", "ken"]}


@cache
def byte_level(add_prefix_space: bool) -> Tokenizer:
    """Tokens that begin with white space, end with it, or are nothing else."""
    merges = [("Ġ", "a"), ("a", "b"), ("Ġ", "Ġ"), ("b", "Ġ"), ("ĠĠ", "a"), ("Ġa", "b")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=False)
    return tokenizer


def encoding_of(peer: PeerEncoding) -> Encoding:
    return Encoding.of_text(peer.ids, peer.tokens, peer.offsets, peer.word_ids)


def as_lists(encoding: Encoding | PeerEncoding) -> dict[str, list[Any]]:
    return {field: getattr(encoding, field) for field in FIELDS}


def post_processor(peer: Any) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.post_processor = peer
    return json.loads(tokenizer.to_str())["post_processor"]


def check(ours: Template | None, peer: Any, first: str, second: str | None, *, add_prefix_space: bool = False) -> None:
    tokenizer = byte_level(add_prefix_space)
    tokenizer.post_processor = None
    given = [encoding_of(tokenizer.encode(text)) for text in (first, second) if text is not None]
    tokenizer.post_processor = peer
    expected = tokenizer.encode(first, second)
    encoding = (ours or Template()).apply(*given)
    assert as_lists(encoding) == as_lists(expected)
    assert encoding.overflowing == ()
    assert (ours or Template()).n_added(second is not None) == peer.num_special_tokens_to_add(second is not None)


@st.composite
def templates(draw: st.DrawFn) -> tuple[str, str]:
    """Strings for one text and for a pair, in which special tokens stand anywhere."""

    def with_tokens(slots: list[str]) -> str:
        tokens = draw(st.lists(st.sampled_from(["[CLS]", "[SEP]:1", "odd", "odd:3"]), max_size=4))
        return " ".join(draw(st.permutations(slots + tokens)))

    single = draw(st.sampled_from(["$", "$A", "$a:0", "$2", "$:4"]))
    pair = [draw(st.sampled_from(["$0", "$A", "$A:3"])), draw(st.sampled_from(["$B", "$b:1", "$B:3"]))]
    return with_tokens([single]), with_tokens(pair)


@given(templates(), texts, st.none() | texts, st.sampled_from([None, False, True]))
def test_any_template(strings: tuple[str, str], first: str, second: str | None, byte_level_step: bool | None) -> None:
    peer: Any = processors.TemplateProcessing(*strings, special_tokens=[CLS, SEP, ODD])
    trimming = {}
    if byte_level_step is not None:
        peer = processors.Sequence([processors.ByteLevel(byte_level_step, trim_offsets=True), peer])
        trimming = {"trim_offsets": True, "add_prefix_space": byte_level_step}
    odd = list(zip(ODD["tokens"], ODD["ids"], strict=True))
    ours = Template(*strings, dict([CLS, SEP]) | {"odd": odd}, **trimming)
    check(ours, peer, first, second, add_prefix_space=bool(byte_level_step))
    written = post_processor(peer)
    assert template_from_json(written) == ours
    assert ours.to_json() == written


@given(texts, st.none() | texts, st.booleans(), st.booleans())
def test_bert_roberta_and_byte_level(first: str, second: str | None, trims: bool, add_prefix_space: bool) -> None:
    flags = {"trim_offsets": trims, "add_prefix_space": add_prefix_space}
    trimming = processors.ByteLevel(**flags)
    peers: list[tuple[Template | None, Any]] = [
        (bert_template(CLS, SEP), processors.BertProcessing(SEP, CLS)),
        (roberta_template(CLS, SEP, **flags), processors.RobertaProcessing(SEP, CLS, **flags)),
        (Template(**flags) if trims else None, trimming),
        (
            Template(bert_template().single, bert_template().pair, dict([CLS, SEP]), **flags),
            processors.Sequence([trimming, processors.BertProcessing(SEP, CLS)]),
        ),
    ]
    for ours, peer in peers:
        check(ours, peer, first, second, add_prefix_space=add_prefix_space)
        assert template_from_json(post_processor(peer)) == ours
        if ours is not None:
            tokenizer = byte_level(add_prefix_space)
            content = json.loads(tokenizer.to_str()) | {"post_processor": ours.to_json()}
            check(ours, Tokenizer.from_str(json.dumps(content)).post_processor, first, second)


def test_the_templates_of_models_are_those_of_transformers() -> None:
    words = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "a": 5}
    letters = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<|endoftext|>": 4, "a": 5}
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("a", -1.0)]
    end, bos, eos = ("<|endoftext|>", 4), ("<s>", 0), ("</s>", 2)
    theirs_and_ours = [
        (BertTokenizer(vocab=words), bert_template(("[CLS]", 2), ("[SEP]", 3))),
        (RobertaTokenizer(vocab=letters, merges=[]), roberta_template()),
        (T5Tokenizer(vocab=pieces), t5_template()),
        (LlamaTokenizer(vocab=letters, merges=[], add_bos_token=True), llama_template(bos)),
        (LlamaTokenizer(vocab=letters, merges=[], add_bos_token=True, add_eos_token=True), llama_template(bos, eos)),
        (GPT2Tokenizer(vocab=letters, merges=[]), gpt_template(end)),
        (GPT2Tokenizer(vocab=letters, merges=[], add_bos_token=True), gpt_template(end, before=True)),
    ]
    for theirs, ours in theirs_and_ours:
        written = json.loads(theirs.backend_tokenizer.to_str())["post_processor"]
        assert template_from_json(written) == ours, type(theirs).__name__
    assert gpt_template(END, after=True) == Template("$A <|endoftext|>", f"$A {END[0]} $B:1 {END[0]}:1", dict([END]))


def test_llama_3() -> None:
    bos = ("<|begin_of_text|>", 128000)
    template = llama_template(bos)
    peer = processors.Sequence(
        [
            processors.ByteLevel(add_prefix_space=True, trim_offsets=False),
            processors.TemplateProcessing(f"{bos[0]} $A", f"{bos[0]} $A {bos[0]}:1 $B:1", [bos]),
        ]
    )
    assert template_from_json(post_processor(peer)) == template
    check(template, peer, "a b", " ab")


def test_equality_and_repr() -> None:
    assert bert_template() == Template("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", {"[CLS]": 101, "[SEP]": 102})
    assert bert_template() != Template()
    assert bert_template() != "bert"
    assert eval(repr(roberta_template())) == roberta_template()
    assert eval(repr(bert_template())) == bert_template()
    assert repr(Template()) == "Template(single='$A', pair='$A $B:1', special_tokens={})"


def test_nothing_to_be_done() -> None:
    assert template_from_json(None) is None
    assert Template().n_added() == Template().n_added(pair=True) == 0
    empty = Encoding.of_text([], [], [], [])
    assert Template().apply(empty) == empty
    assert t5_template().apply(empty, empty).tokens == ["</s>", "</s>"]


def test_slots_of_a_string() -> None:
    assert slots_from_string("[CLS] $ $A:2 $B $7 $3:4 x:5") == (
        TokenSlot("[CLS]"),
        TextSlot(0),
        TextSlot(0, 2),
        TextSlot(1),
        TextSlot(0, 7),
        TextSlot(0, 4),
        TokenSlot("x", 5),
    )


@pytest.mark.parametrize("string", ["", "$A  $B", "$C", "$A:", "$A:x", "$A:-1", "a:b:1", ":1", "$A:1:2", "$-1"])
def test_strings_that_are_no_template(string: str) -> None:
    with pytest.raises(ValueError, match="each with or without :type_id"):
        Template(string)
    with pytest.raises(ValueError):
        processors.TemplateProcessing(string, special_tokens=[])


@pytest.mark.parametrize(
    ("single", "pair", "special_tokens", "message"),
    [
        ("[CLS]", "$A $B", {"[CLS]": 1}, r"template single must have the first text \(\$A\) once"),
        ("$A $A", "$A $B", {}, "template single must have the first text"),
        ("$A $B", "$A $B", {}, "template single must have the first text"),
        ("$A", "$A", {}, r"template pair must have each text \(\$A, \$B\) once, got '\$A'"),
        ("$A", "$A $B $B:1", {}, r"got '\$A \$B \$B:1'"),
        ("$A", "$A [SEP] $B", {"[CLS]": 1}, r"special_tokens must have '\[SEP\]', which template pair uses"),
        ("[CLS] $A", "$A $B", None, r"special_tokens must have '\[CLS\]', which template single uses"),
        ("[CLS] $A", "$A $B", {"[CLS]": -1}, "special token '\\[CLS\\]' must be from 0 to 4294967295, got -1"),
        ("$A:4294967296", "$A $B", None, "type id of a text must be from 0 to 4294967295, got 4294967296"),
        ([TextSlot(2)], "$A $B", None, "sequence of a text slot must be from 0 to 1, got 2"),
    ],
)
def test_templates_that_cannot_be(single: Any, pair: str, special_tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Template(single, pair, special_tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"single": [0]}, "a slot of a template must be a TextSlot or a TokenSlot, got 0"),
        ({"single": [TextSlot(0, True)]}, "the type id of a text must be an integer, got True"),
        ({"single": [TextSlot(True)]}, "the sequence of a text slot must be an integer, got True"),
        ({"single": [TextSlot(0), TokenSlot(1)]}, "TokenSlot, got TokenSlot"),  # type: ignore[arg-type]
        ({"special_tokens": ["x"]}, r"special_tokens must be a mapping of names to ids, got \['x'\]"),
        ({"special_tokens": {"x": True}}, "the id of special token 'x' must be an integer, got True"),
        ({"special_tokens": {"x": 1.0}}, r"the id of special token 'x' must be an integer, got 1\.0"),
        ({"special_tokens": {"x": [(1, 1)]}}, r"a string and an id, got \(1, 1\)"),
        ({"special_tokens": {"x": [("x",)]}}, r"a string and an id, got \('x',\)"),
        ({"special_tokens": {1: 1}}, r"a string and an id, got \(1, 1\)"),
        ({"trim_offsets": "yes"}, "trim_offsets must be True or False, got 'yes'"),
        ({"add_prefix_space": 0}, "add_prefix_space must be True or False, got 0"),
    ],
)
def test_arguments_of_other_types_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Template(**arguments)


def test_ids_may_be_of_other_integer_types() -> None:
    template = Template("$A x", special_tokens={"x": np.int64(3)})  # type: ignore[dict-item]
    assert template == Template("$A x", special_tokens={"x": 3})
    json.dumps(template.to_json())


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "Other"}, r"got \['Other'\]"),
        ([], r"got \[None\]"),
        ({"type": "Sequence"}, "got {'type': 'Sequence'}"),
        ({"type": "Sequence", "processors": []}, "got {'type'"),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}] * 2}, r"got \['ByteLevel', 'ByteLevel'\]"),
        ({"type": "BertProcessing"}, "BertProcessing is incomplete or wrong: KeyError"),
        ({"type": "BertProcessing", "cls": ["a"], "sep": ["b", 1]}, "BertProcessing is incomplete or wrong"),
        ({"type": "BertProcessing", "cls": [1, 1], "sep": ["b", 1]}, "BertProcessing is incomplete or wrong"),
        ({"type": "RobertaProcessing", "cls": ["a", "1"], "sep": ["b", 1]}, "RobertaProcessing is incomplete or wrong"),
        ({"type": "TemplateProcessing", "single": [], "pair": []}, "TemplateProcessing is incomplete or wrong"),
        ({"type": "TemplateProcessing", "single": ["$A"], "pair": [], "special_tokens": {}}, r"got '\$A'"),
        (
            bert_template().to_json() | {"single": [{"Sequence": {"id": "C", "type_id": 0}}]},
            "a template has Sequence A, Sequence B and SpecialToken",
        ),
        (
            bert_template().to_json() | {"special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [1], "tokens": []}}},
            "zip",
        ),
        (
            bert_template().to_json() | {"single": [{"Sequence": {"id": "A", "type_id": True}}]},
            "must be an integer, got True",
        ),
        (
            bert_template().to_json() | {"single": [{"Sequence": {"id": "A", "type_id": 1 << 64}}]},
            "must be from 0 to 4294967295",
        ),
        ({"type": "BertProcessing", "cls": ["a", True], "sep": ["b", 1]}, "must be an integer, got True"),
        ({"type": "ByteLevel", "trim_offsets": [None]}, r"ByteLevel: trim_offsets must be true or false, got \[None\]"),
        ({"type": "ByteLevel", "add_prefix_space": "x"}, "add_prefix_space must be true or false, got 'x'"),
    ],
)
def test_other_json_is_refused(part: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        template_from_json(part)
