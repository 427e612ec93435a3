"""Padding, and all that comes before it: what `tokenizers` and `transformers` feed to a model."""

import json
from dataclasses import fields
from functools import cache
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import Encoding as PeerEncoding
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, RobertaTokenizer, T5Tokenizer

from minillm.tokenizers.encoding import Encoding
from minillm.tokenizers.padding import Padding, padding_from_json
from minillm.tokenizers.prepare import prepare
from minillm.tokenizers.template import Template, bert_template, llama_template, roberta_template, t5_template
from minillm.tokenizers.truncation import SIDES, Truncation

FIELDS = [field.name for field in fields(Encoding) if field.name != "overflowing"]
texts = st.text("abc .", max_size=9)
inputs = texts | st.tuples(texts, texts)
sides = st.sampled_from(list(SIDES))
paddings = st.builds(
    Padding,
    pad_id=st.integers(0, 9),
    pad_token=st.sampled_from(["[PAD]", "<pad>"]),
    pad_type_id=st.integers(0, 2),
    length=st.none() | st.integers(0, 20),
    multiple_of=st.none() | st.integers(1, 8),
    side=sides,
)


def character_tokenizer() -> Tokenizer:
    """Each character is a token, each run of letters a word."""
    tokenizer = Tokenizer(models.BPE({character: i for i, character in enumerate("abc .")}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    return tokenizer


def encoding_of(peer: PeerEncoding) -> Encoding:
    return Encoding.of_text(peer.ids, peer.tokens, peer.offsets, peer.word_ids)


def as_lists(encoding: Encoding | PeerEncoding) -> list[dict[str, list[Any]]]:
    """The encoding, then what has overflowed."""
    return [{name: getattr(part, name) for name in FIELDS} for part in (encoding, *encoding.overflowing)]


def enable(tokenizer: Tokenizer, padding: Padding) -> None:
    tokenizer.enable_padding(
        direction=padding.side,
        pad_id=padding.pad_id,
        pad_type_id=padding.pad_type_id,
        pad_token=padding.pad_token,
        length=padding.length,
        pad_to_multiple_of=padding.multiple_of,
    )


@given(st.lists(inputs, max_size=4), paddings, st.none() | st.integers(4, 8))
def test_as_tokenizers_pads(batch: list[str | tuple[str, str]], padding: Padding, max_length: int | None) -> None:
    truncation = Truncation(max_length) if max_length else None
    plain, tokenizer = character_tokenizer(), character_tokenizer()
    content = json.loads(tokenizer.to_str()) | {"post_processor": bert_template().to_json()}
    tokenizer = Tokenizer.from_str(json.dumps(content))
    if max_length:
        tokenizer.enable_truncation(max_length)
    enable(tokenizer, padding)
    expected = tokenizer.encode_batch(batch)
    encodings = []
    for given_texts in batch:
        parts = [
            encoding_of(plain.encode(text)) for text in ([given_texts] if isinstance(given_texts, str) else given_texts)
        ]
        encodings.append(prepare(*parts, template=bert_template(), truncation=truncation))
    assert list(map(as_lists, padding.apply(encodings))) == list(map(as_lists, expected))
    for given_texts, encoding in zip(batch, encodings, strict=True):  # the peer also pads a text alone
        alone = tokenizer.encode(*([given_texts] if isinstance(given_texts, str) else given_texts))
        assert as_lists(padding.apply([encoding])[0]) == as_lists(alone)


def test_small_batches() -> None:
    nothing = Encoding.of_text([], [], [], [])
    assert Padding().apply([]) == Padding(length=4).apply([]) == []
    assert Padding().apply([nothing, nothing]) == [nothing, nothing]
    padded = Padding(pad_id=3, multiple_of=2, length=1).apply([nothing])
    assert padded[0].ids == [3, 3]
    assert padded[0].attention_mask == [0, 0]
    assert padded[0].tokens == ["[PAD]", "[PAD]"]


LETTERS = ["<s>", "<pad>", "</s>", "<unk>", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "▁", "Ġ", *"abc."]
VOCABULARY = {token: i for i, token in enumerate(LETTERS)}
PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("a", -1.0), ("b", -1.5), ("ab", -2.0)]
WORDS = VOCABULARY | {"##a": 20, "##b": 21, "##c": 22}


@cache
def model_parts(name: str) -> tuple[PreTrainedTokenizerBase, Template, Padding]:
    """A tokenizer of `transformers`, and the template and padding that are to do the same."""
    if name == "bert":
        return BertTokenizer(vocab=WORDS), bert_template(("[CLS]", 6), ("[SEP]", 7)), Padding(4, "[PAD]")
    if name == "roberta":
        return RobertaTokenizer(vocab=VOCABULARY, merges=[]), roberta_template(), Padding(1, "<pad>")
    if name == "t5":
        return T5Tokenizer(vocab=PIECES), t5_template(), Padding(0, "<pad>")
    llama = LlamaTokenizer(vocab=VOCABULARY, merges=[], add_bos_token=True, pad_token="<pad>", padding_side="left")
    return llama, llama_template(("<s>", 0)), Padding(1, "<pad>", side="left")


@given(
    st.sampled_from(["bert", "roberta", "t5", "llama"]),
    st.lists(texts, min_size=1, max_size=3),
    st.none() | st.lists(texts, min_size=3, max_size=3),
    st.integers(6, 10),
    st.integers(0, 1),
)
def test_as_transformers_prepares(
    name: str, firsts: list[str], seconds: list[str] | None, max_length: int, stride: int
) -> None:
    theirs, template, padding = model_parts(name)
    strategy = "longest_first" if seconds is None else "only_second"
    truncation = Truncation(max_length, strategy, stride, theirs.truncation_side)
    plain = Tokenizer.from_str(theirs.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    batch = []
    for i, first in enumerate(firsts):
        given_texts = [first] if seconds is None else [first, seconds[i]]
        encodings = [encoding_of(plain.encode(text, add_special_tokens=False)) for text in given_texts]
        room = max_length - template.n_added(seconds is not None)
        assume(seconds is None or len(encodings[0]) + stride < room)
        batch.append(prepare(*encodings, template=template, truncation=truncation))
    ours = [part for encoding in padding.apply(batch) for part in (encoding, *encoding.overflowing)]
    expected = theirs(
        firsts,
        None if seconds is None else seconds[: len(firsts)],
        truncation=strategy,
        max_length=max_length,
        stride=stride,
        padding=True,
        return_overflowing_tokens=True,
        return_token_type_ids=True,
        return_special_tokens_mask=True,
    )
    assert [part.ids for part in ours] == expected["input_ids"]
    assert [part.attention_mask for part in ours] == expected["attention_mask"]
    assert [part.special_tokens_mask for part in ours] == expected["special_tokens_mask"]
    if name != "t5":  # of what overflows the peer forgets that both texts have type 0
        assert [part.type_ids for part in ours] == expected["token_type_ids"]
    assert [part.sequence_ids for part in ours] == [expected.sequence_ids(i) for i in range(len(ours))]
    assert [part.word_ids for part in ours] == [expected.word_ids(i) for i in range(len(ours))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pad_id": -1}, "pad_id must be at least 0, got -1"),
        ({"pad_type_id": -1}, "pad_type_id must be at least 0"),
        ({"length": -1}, "length must be at least 0"),
        ({"multiple_of": 0}, "multiple_of must be at least 1, got 0"),
        ({"pad_token": ""}, "pad_token must be a str that is not empty"),
        ({"side": "both"}, r"side must be one of .*, got 'both'"),
    ],
)
def test_impossible_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Padding(**arguments)


@pytest.mark.parametrize("arguments", [{"length": 8.0}, {"pad_id": None}, {"pad_type_id": "0"}])
def test_numbers_are_integers(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        Padding(**arguments)


@given(paddings)
def test_tokenizer_json_keeps_it(padding: Padding) -> None:
    tokenizer = character_tokenizer()
    enable(tokenizer, padding)
    written = json.loads(tokenizer.to_str())["padding"]
    assert padding.to_json() == written
    assert padding_from_json(written) == padding


@pytest.mark.parametrize(
    "part",
    [
        [],
        {},
        Padding().to_json() | {"strategy": "Longest"},
        Padding().to_json() | {"strategy": {"Fixed": -1}},
        Padding().to_json() | {"strategy": {}},
        Padding().to_json() | {"direction": "left"},
        Padding().to_json() | {"pad_id": None},
        Padding().to_json() | {"pad_token": 3},
    ],
)
def test_other_json_is_refused(part: Any) -> None:
    with pytest.raises(ValueError, match=r"padding: .* is none that is known here"):
        padding_from_json(part)
    assert padding_from_json(None) is None
    assert padding_from_json(Padding().to_json() | {"pad_to_multiple_of": 0}) == Padding()
