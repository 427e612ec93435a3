"""Compiled normalizations, held against `sentencepiece` and, grapheme by grapheme, against `tokenizers`."""

import random
import struct
import tempfile
from functools import cache

import pytest
import regex
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken as PeerToken
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from minillm.tokenizers.aligned_text import AlignedText
from minillm.tokenizers.character_map import _GRAPHEMES, CharacterMap
from minillm.tokenizers.metaspace import Metaspace
from minillm.tokenizers.sentencepiece_model import SentencePieceModel
from minillm.tokenizers.unigram import UnigramTokenizer

NAMES = ["nmt_nfkc", "nfkc_cf"]
names = pytest.mark.parametrize("name", NAMES)
# Reading a map takes longer than a deadline allows the first example.
slow_start = settings(deadline=None, max_examples=60)


@cache
def compiled(name: str) -> bytes:
    """A map of the library: a model that it trains holds one."""
    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["a b c"]),
            model_prefix=f"{folder}/m",
            normalization_rule_name=name,
            model_type="bpe",
            vocab_size=7,
            minloglevel=2,
        )
        return SentencePieceModel.load(f"{folder}/m.model").character_map


@cache
def maps(name: str) -> tuple[CharacterMap, CharacterMap]:
    return CharacterMap(compiled(name)), CharacterMap(compiled(name), by_grapheme=True)


@cache
def peer(name: str) -> sentencepiece.SentencePieceNormalizer:
    return sentencepiece.SentencePieceNormalizer(
        rule_name=name, add_dummy_prefix=False, escape_whitespaces=False, remove_extra_whitespaces=False
    )


@cache
def known(character: str) -> bool:
    """Whether the tables of both engines have it: what joins into a grapheme changes with Unicode."""
    found = pre_tokenizers.Split(Regex(r"\p{Cn}"), "removed").pre_tokenize_str(character)
    return not regex.match(r"\p{Cn}", character) and bool(found)


characters = st.characters(exclude_categories=["Cs", "Cn"]).filter(known)
marks = st.sampled_from("\u0300\u0301\u0308\u0327\u3099\u200d\ufe0f\u0345\u1161\u11a8")
fragments = st.sampled_from(
    ["\r\n", "\n", " ", "ﬁ", "ﬁ\u0301", "e\u0301", "각", "ｶﾞ", "㈱", "İ", "ẛ\u0323", "👩\u200d💻", "½", "\x01"]
)
texts = st.one_of(
    st.text(characters),
    st.lists(st.one_of(fragments, marks, st.text(characters, max_size=3)), max_size=12).map("".join),
)


@names
@slow_start
@given(text=st.one_of(texts, st.text()))
def test_the_longest_rule_is_applied_as_in_sentencepiece(name: str, text: str) -> None:
    assert maps(name)[0](text) == peer(name).normalize(text)


@names
@slow_start
@given(text=texts)
def test_graphemes_are_replaced_as_in_tokenizers(name: str, text: str) -> None:
    assert maps(name)[1](text) == normalizers.Precompiled(compiled(name)).normalize_str(text)


joined = st.sampled_from("🇩🇪🇫a\u0301\u200d\ufe0f👍🏽\u0600\u0903\u0e33\r\n가ᄀ\u094dक")


@given(st.lists(joined | st.characters(exclude_categories=["Cs"]), max_size=12).map("".join))
@example("🇩🇪🇫")
@example("🇩\u0301🇪🇫\u0301🇩")
@example("\u0600🇩🇪🇫🇩a🇩")
@example("🇩🇪🇩🇪\u094dक")
@example("👍🏽\u200d🇩🇪\u200d👍🇩")
def test_flags_two_letters_at_a_time_are_graphemes(text: str) -> None:
    assert _GRAPHEMES.findall(text) == regex.findall(r"\X", text)


LONG_RUNS = ["a" + "\u0301" * 3000, "ᄀ" * 3000, "\u0323\u0301ﬁ" * 900, "e" + "\u3099" * 2000 + "か\u3099"]


@names
@pytest.mark.parametrize("text", [*LONG_RUNS, "🇩" * 2001, "ﬁ🇩\u0301🇪" * 500], ids=ascii)
def test_long_runs_are_replaced_as_in_both(name: str, text: str) -> None:
    by_rule, by_grapheme = maps(name)
    assert by_rule(text) == peer(name).normalize(text)
    assert by_grapheme(text) == normalizers.Precompiled(compiled(name)).normalize_str(text)
    for character_map in (by_rule, by_grapheme):
        assert character_map.align(AlignedText.of(text)).text == character_map(text)


@names
def test_every_character_and_its_neighbours(name: str) -> None:
    """Each character that begins a rule, alone and beside others, in long texts that take the fast ways."""
    by_rule, by_grapheme = maps(name)
    theirs = normalizers.Precompiled(compiled(name))
    assert by_rule._trie is not None
    firsts = sorted(by_rule._trie.single | by_rule._trie.first)
    for text in ("".join(firsts), "a".join(firsts), "\u0301".join(firsts), "中".join(firsts), " x\r\n".join(firsts)):
        assert by_rule(text) == peer(name).normalize(text)
        assert by_grapheme(text) == theirs.normalize_str(text)


@slow_start
@given(st.one_of(texts, st.text()), st.booleans())
def test_what_is_aligned_is_the_same_text_from_growing_places(text: str, by_grapheme: bool) -> None:
    character_map = maps("nmt_nfkc_cf")[by_grapheme]
    aligned = character_map.align(AlignedText.of(text))
    assert aligned.text == character_map(text)
    assert list(aligned.starts) == sorted(aligned.starts)
    for character, start, end in zip(aligned.text, aligned.starts, aligned.ends, strict=True):
        assert 0 <= start < end <= len(text)
        assert character in character_map(text[start:end]) or by_grapheme
    assert not by_grapheme or not aligned.text or aligned.starts[0] == 0


def test_where_replacements_come_from() -> None:
    by_rule, by_grapheme = maps("nmt_nfkc")
    for character_map, spans in (
        (by_rule, [(0, 1), (0, 1), (1, 2), (2, 4), (5, 6)]),
        (by_grapheme, [(0, 1), (0, 1), (1, 2), (2, 3), (5, 6)]),
    ):
        aligned = character_map.align(AlignedText.of("ﬁxe\u0301\x01!"))
        assert aligned.text == "fixé!"
        assert list(zip(aligned.starts, aligned.ends, strict=True)) == spans
    # A text that has been changed before keeps its first origin.
    assert by_rule.align(AlignedText("ﬁ", [3], [9])) == AlignedText("fi", [3, 3], [9, 9])


removed_in_front = st.sampled_from(["\x01", "\x02\x01", "<x>", "a", "ﬁ", "\u0301", " ", "\x01e\u0301"])


@slow_start
@given(st.lists(removed_in_front, max_size=6).map("".join))
@example("\x01ab")
@example("<x>\x01ab")
def test_a_text_begins_where_it_did_though_its_first_character_is_removed(text: str) -> None:
    """So that it gets the symbol of the first word, as in `tokenizers`; what follows a special token does not."""
    pieces = [(piece, -1.0) for piece in ("<unk>", "<x>", "▁", "a", "b", "▁a", "f", "i", "▁f")]
    ours = UnigramTokenizer(
        pieces,
        normalizer=maps("nmt_nfkc")[1],
        pre_tokenizer=Metaspace(prepend_scheme="first"),
        special_tokens={"<x>": 1},
    )
    theirs = Tokenizer(models.Unigram(pieces, 0, False))
    theirs.normalizer = normalizers.Precompiled(compiled("nmt_nfkc"))
    theirs.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    theirs.add_special_tokens([PeerToken("<x>", normalized=False)])
    assert ours.encode(text) == theirs.encode(text).ids


def test_protected_texts_stay() -> None:
    character_map = CharacterMap(compiled("nmt_nfkc_cf"), protected=["ABC", "AB", "e\u0301x", "É", "\n"])
    assert character_map("ABCD ABAB XA\ne\u0301x e\u0301É") == "ABCd ABAB xa\ne\u0301x éÉ"
    assert [step for step in character_map.steps("ABCﬁAx") if step[1]] == [(0, "ABC"), (3, "fi"), (4, "a"), (5, "x")]
    assert CharacterMap(b"", protected=["ABC"])("ABCD") == "ABCD"


def test_an_empty_map_changes_nothing() -> None:
    character_map = CharacterMap(b"")
    assert character_map("ﬁ\n") == "ﬁ\n"
    assert character_map.align(AlignedText.of("ﬁ")).text == "ﬁ"
    assert list(character_map.steps("ab")) == [(0, "a"), (1, "b")]


def test_files_hold_it_as_base64() -> None:
    by_grapheme = maps("nfkc_cf")[1]
    assert normalizers.Precompiled(compiled("nfkc_cf")).__getstate__().decode() == _compact(by_grapheme.to_json())
    assert CharacterMap.from_json(by_grapheme.to_json())("ﬁ\u0301") == by_grapheme("ﬁ\u0301") == "fi"
    for value in (None, 5, "not base64!", "AAAA"):
        with pytest.raises(ValueError, match=r"precompiled_charsmap|character map"):
            CharacterMap.from_json({"type": "Precompiled", "precompiled_charsmap": value})


def _compact(part: dict[str, str]) -> str:
    return f'{{"type":"Precompiled","precompiled_charsmap":"{part["precompiled_charsmap"]}"}}'


def test_damaged_maps_are_refused_or_still_end() -> None:
    for damaged, message in (
        (b"\x01", "its trie must have 4 to"),
        (struct.pack("<I", 6) + b"x" * 20, "multiple of 4 bytes, got 6"),
        (struct.pack("<I", 1 << 31) + b"x" * 20, "got 2147483648"),
        (compiled("nfkc_cf")[:-1] + b"\xff", "utf-8"),
        (
            compiled("nfkc_cf")[: 4 + struct.unpack("<I", compiled("nfkc_cf")[:4])[0]] + b"a\0",
            "there is no replacement at",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            CharacterMap(damaged)
    messages = []
    random_bytes = random.Random(0)
    whole = compiled("nfkc_cf")
    size = struct.unpack("<I", whole[:4])[0]
    for _ in range(5):
        content = bytearray(whole)
        for _ in range(40):
            content[4 + random_bytes.randrange(size)] = random_bytes.randrange(256)
        try:
            CharacterMap(bytes(content))("ﬁe\u0301 中 각 \u0300" * 20)
        except ValueError as error:
            messages.append(str(error))
    assert all(message.startswith("character map: ") for message in messages)


def test_a_trie_with_endless_ways_is_read_once() -> None:
    """From its one state, "a" leads back to it, for ever; no text is one of its rules."""
    a = ord("a")
    units = [0] * 256
    units[0] = 1 << 10  # "a" leads to 0 ^ 1 ^ "a"
    units[1 ^ a] = (a << 10) | a  # and from there to itself: its base is 1 again
    trie = struct.pack("<256I", *units)
    looping = struct.pack("<I", len(trie)) + trie + b"\0"
    assert CharacterMap(looping)("aaaa") == CharacterMap(looping, by_grapheme=True)("aaaa") == "aaaa"
