"""Normalizers, held against those of the `tokenizers` library: the text, and where its characters come from."""

import json
import re
import unicodedata
from collections import Counter
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex as PeerRegex
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from minillm.tokenizers import unicode_forms
from minillm.tokenizers.aligned_text import AlignedText
from minillm.tokenizers.normalization import (
    NFC,
    NFD,
    NFKC,
    NFKD,
    BertNormalizer,
    Lowercase,
    Nmt,
    Normalizer,
    NormalizerSequence,
    Prepend,
    Regex,
    Replace,
    Strip,
    StripAccents,
    collapse_white_space,
    normalizer_from_json,
    remove_control_characters,
)

# Characters that Unicode 3.2 had are in everybody's tables; what became of three of them since is in Python's, and in
# those of `regex`, but not in those of `tokenizers`.
CHANGED_SINCE = "\u1734\u1885\u1886"
# Of ideographs, Hangul and private use, a sixteenth will do.
MANY = [range(0x3400, 0xA000), range(0xAC00, 0xD7A4), range(0xE000, 0xF900), range(0x20000, 0x2F000)]
KNOWN = [
    chr(i)
    for i in range(0x30000)
    if (i % 16 == 0 or not any(i in block for block in MANY))
    and unicodedata.ucd_3_2_0.category(chr(i)) not in ("Cn", "Cs")
    and chr(i) not in CHANGED_SINCE
]
MARKS = [c for c in KNOWN if unicodedata.combining(c)]
DECOMPOSED = [c for c in KNOWN if unicodedata.decomposition(c)]
# What the rules look at: case, accents before and after each other, jamo, ligatures, spaces, controls, Chinese.
tricky = st.sampled_from(
    "aEéÉßİΣσſ\u0301\u0316\u0323\u0345Ǆﬁ²①각\u1100\u1161\u11a8中豈\U00020000\u3000 \t\n\r\x00\x1c\x7f\x85\xa0"
)
tricky |= st.sampled_from("\u200b\u200d\ufeff\ufffd▁`'ｱﾞ\u0f73\u0958\ue000Å\u212b\u212a\u0344\u09c7\u09be")
characters = st.one_of(tricky, st.sampled_from(KNOWN), st.sampled_from(MARKS), st.sampled_from(DECOMPOSED))
texts = st.text(characters, max_size=25)
FORMS = [NFC, NFD, NFKC, NFKD]
moderately = settings(max_examples=30)
forms = pytest.mark.parametrize("form", FORMS)

_BERT = [
    {"clean_text": clean, "handle_chinese_chars": chinese, "strip_accents": accents, "lowercase": lower}
    for clean, chinese, accents, lower in [
        (True, True, None, True),
        (True, True, None, False),
        (False, False, True, False),
        (True, False, False, True),
        (False, True, False, False),
    ]
]
# Ours and theirs, in their order of characters only: `align` gives what theirs does.
SIMPLE: list[tuple[Normalizer, Any]] = [
    (Lowercase(), normalizers.Lowercase()),
    (StripAccents(), normalizers.StripAccents()),
    (Strip(), normalizers.Strip()),
    (Strip(left=False), normalizers.Strip(left=False)),
    (Strip(right=False), normalizers.Strip(right=False)),
    (Nmt(), normalizers.Nmt()),
    (Prepend("▁"), normalizers.Prepend("▁")),
    (Prepend("ab"), normalizers.Prepend("ab")),
    (Replace(" ", "▁"), normalizers.Replace(" ", "▁")),
    (Replace("é", "e'"), normalizers.Replace("é", "e'")),
    (Replace(Regex(r"\s"), ""), normalizers.Replace(PeerRegex(r"\s"), "")),
    (Replace(Regex(r"[\p{L}&&[^a-z]]"), "x\\1"), normalizers.Replace(PeerRegex(r"[\p{L}&&[^a-z]]"), "x\\1")),
    (
        NormalizerSequence([Prepend("▁"), Replace(" ", "▁"), Lowercase()]),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"), normalizers.Lowercase()]),
    ),
    *((BertNormalizer(**options), normalizers.BertNormalizer(**options)) for options in _BERT),
]
# Those where ours says more about the origin, or puts it right.
OTHER: list[tuple[Normalizer, Any]] = [
    *((form(), getattr(normalizers, form.__name__)()) for form in FORMS),
    (Replace("ab", "X"), normalizers.Replace("ab", "X")),
    (Replace(Regex(" {2,}"), " "), normalizers.Replace(PeerRegex(" {2,}"), " ")),
    (Replace(Regex("(?=b)"), "-"), normalizers.Replace(PeerRegex("(?=b)"), "-")),
    (Replace(Regex("a*"), "<>"), normalizers.Replace(PeerRegex("a*"), "<>")),
    (Replace("", "-"), normalizers.Replace("", "-")),
    (collapse_white_space(), normalizers.Replace(PeerRegex(r"\s+"), " ")),
    (remove_control_characters(), normalizers.Replace(PeerRegex(r"[\p{Cc}&&[^\t\n\r]]"), "")),
    (
        NormalizerSequence([NFKD(), StripAccents(), Lowercase()]),
        normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]),
    ),
]
EVERY = SIMPLE + OTHER


def label(value: object) -> str:
    return str(value) if value.__class__.__module__.startswith("tokenizers") else ""


def places(text: AlignedText) -> list[tuple[int, int]]:
    return list(zip(text.starts, text.ends, strict=True))


def peer_places(peer: Any, text: str) -> list[tuple[int, int]]:
    """The offsets of a tokenizer of theirs to which every character is a token."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, "?"))
    tokenizer.normalizer = peer
    tokenizer.pre_tokenizer = pre_tokenizers.Split(PeerRegex("(?m:.)"), "isolated")
    return tokenizer.encode(text).offsets


@pytest.mark.parametrize(("ours", "peer"), EVERY, ids=label)
@moderately
@given(text=texts | st.text("ab  \n", max_size=15))
def test_the_text_is_that_of_tokenizers(ours: Normalizer, peer: Any, text: str) -> None:
    assert ours(text) == peer.normalize_str(text)
    aligned = ours.align(AlignedText.of(text))
    assert aligned.text == ours(text)
    for rising in (aligned.starts, aligned.ends):
        assert list(rising) == sorted(rising)
    assert all(0 <= start <= end <= len(text) for start, end in places(aligned))


@pytest.mark.parametrize(("ours", "peer"), SIMPLE, ids=label)
@moderately
@given(text=texts)
def test_offsets_are_those_of_tokenizers(ours: Normalizer, peer: Any, text: str) -> None:
    # Where marks change places, theirs are those of before (see below).
    assume("strip_accents=True" not in str(peer) or "".join(map(NFD(), text)) == NFD()(text))
    assume("strip_accents=None" not in str(peer) or "".join(map(NFD(), text)) == NFD()(text))
    assert places(ours.align(AlignedText.of(text))) == peer_places(peer, text)


@pytest.mark.parametrize(
    ("ours", "peer"), [pair for pair in EVERY if not isinstance(pair[0], Replace | Prepend)], ids=label
)
def test_every_character_becomes_what_it_does_in_tokenizers(ours: Normalizer, peer: Any) -> None:
    for start in range(0, len(KNOWN), 4096):
        text = "".join(f"a{c}b " for c in KNOWN[start : start + 4096])
        assert ours(text) == peer.normalize_str(text)


@pytest.mark.parametrize(("ours", "peer"), EVERY, ids=label)
@moderately
@given(text=texts)
def test_what_was_done_before_is_kept(ours: Normalizer, peer: Any, text: str) -> None:
    """Aligning a text that has been changed already points to the original, not to the changed text."""
    wide = AlignedText.rebuilt((c, 3 * i + 1, 3 * i + 3) for i, c in enumerate(text))
    plain = ours.align(AlignedText.of(text))
    expected = [(3 * start + 1, 3 * end) if start < end else None for start, end in places(plain)]
    for want, got in zip(expected, places(ours.align(wide)), strict=True):
        assert want in (got, None)


@forms
@settings(max_examples=60)
@given(text=texts)
def test_normal_forms_where_no_mark_moves_have_the_offsets_of_tokenizers(form: type[NFC], text: str) -> None:
    assume("".join(map(NFKD(), text)) == NFKD()(text))
    ours = places(form().align(AlignedText.of(text)))
    theirs = peer_places(getattr(normalizers, form.__name__)(), text)
    if form in (NFD, NFKD):
        assert ours == theirs
    elif all(len(NFKD()(c)) == 1 for c in text):
        # A character that was put together has the place of its first part there, and of all of them here.
        assert [start for start, _ in ours] == [start for start, _ in theirs]
        assert [start for start, _ in ours[1:]] == [end for _, end in ours[:-1]]


@forms
@settings(max_examples=60)
@given(text=texts)
def test_what_a_character_is_made_of_is_where_it_comes_from(form: type[NFC], text: str) -> None:
    aligned = form().align(AlignedText.of(text))
    made_of = [Counter(NFKD()(c)) for c in aligned.text]
    for parts, (start, end) in zip(made_of, places(aligned), strict=True):
        assert parts <= Counter(NFKD()(text[start:end]))
    covered = sorted({i for start, end in places(aligned) for i in range(start, end)})
    assert covered == list(range(len(text)))


@forms
@settings(max_examples=60)
@given(text=texts)
def test_stretches_reach_no_further_than_they_must(form: type[NFC], text: str) -> None:
    """Wherever the text can be cut without changing the result, no stretch reaches across."""
    aligned = form().align(AlignedText.of(text))
    for cut in range(len(text) + 1):
        if form()(text[:cut]) + form()(text[cut:]) == aligned.text:
            left = form().align(AlignedText.of(text[:cut]))
            assert places(aligned)[: len(left.text)] == places(left)


@forms
@settings(max_examples=60)
@given(text=texts)
def test_a_normal_form_is_one_to_itself(form: type[NFC], text: str) -> None:
    once = form()(text)
    assert form()(once) == once
    again = AlignedText.of(once)
    assert form().align(again) == again


def test_known_normal_forms() -> None:
    def aligned(form: Normalizer, text: str) -> list[tuple[str, int, int]]:
        result = form.align(AlignedText.of(text))
        return list(zip(result.text, result.starts, result.ends, strict=True))

    assert aligned(NFC(), "e\u0301x") == [("é", 0, 2), ("x", 2, 3)]
    assert aligned(NFD(), "éx") == [("e", 0, 1), ("\u0301", 0, 1), ("x", 1, 2)]
    assert aligned(NFKC(), "xﬁ²") == [("x", 0, 1), ("f", 1, 2), ("i", 1, 2), ("2", 2, 3)]
    assert aligned(NFC(), "\u1100\u1161\u11a8") == [("각", 0, 3)]
    # The mark below goes in front of the accent, and the accent into the letter.
    assert aligned(NFD(), "a\u0301\u0316") == [("a", 0, 1), ("\u0316", 1, 3), ("\u0301", 1, 3)]
    assert aligned(NFC(), "a\u0316\u0301b") == [("á", 0, 3), ("\u0316", 1, 3), ("b", 3, 4)]


def test_long_runs_without_ascii_take_time_in_proportion() -> None:
    text = "a" + "\u0316\u0301" * 500 + "中" * 20_000 + "e\u0301" * 20_000
    for form in FORMS:
        assert form().align(AlignedText.of(text)).text == unicodedata.normalize(form.__name__, text)


# Marks of several classes, one of a class of its own, what is made of marks only, what such marks join.
in_runs = st.sampled_from("\u0301\u0316\u0323\u0308\u0345\u3099\u0f73\u0f75\u0f81\uff9e\uff9f\u0344\u0338")
long_runs = st.lists(
    st.tuples(
        st.sampled_from(["", "a", "é", "ḍ", "か", "가", "\u1100", "\u0f71", "ﬁ"]),
        st.lists(in_runs | st.sampled_from(MARKS), max_size=5).map("".join),
        st.lists(in_runs, min_size=1, max_size=6).map("".join),
        st.integers(0, 40),
        st.sampled_from(["", " ", "\u0301", "x", "é"]),
    ).map(lambda parts: parts[0] + parts[1] + parts[2] * parts[3] + parts[4]),
    max_size=3,
).map("".join)


@forms
@settings(max_examples=80)
@given(text=long_runs)
def test_long_runs_of_marks_are_sorted_as_python_sorts_them(form: type[NFC], text: str) -> None:
    assert form()(text) == unicodedata.normalize(form.__name__, text)
    assert form().align(AlignedText.of(text)).text == form()(text)


def test_what_is_made_of_marks_only_is_sorted_beforehand() -> None:
    is_mark = unicode_forms._FOUR_MARKS
    for character in map(chr, [*range(0xD800), *range(0xE000, 0x30000)]):
        # That of Unicode 3.2, and that of this Python: what both know, every table has.
        if unicodedata.ucd_3_2_0.category(character) != "Cn":
            marks_only = all(map(unicodedata.combining, unicodedata.normalize("NFKD", character)))
            assert bool(is_mark.match(character * 4)) == marks_only, ascii(character)


@forms
@pytest.mark.parametrize("unit", ["\u0323\u0301", "\u0f73", "\u0301\u0316\u0345", "\u0344\u0316"], ids=ascii)
def test_python_is_given_no_long_run_to_sort(monkeypatch: pytest.MonkeyPatch, form: type[NFC], unit: str) -> None:
    """It would take a time that grows with the square of the length: it moves one mark at a time."""
    given_to_python = []

    def recorded(name: str, text: str) -> str:
        given_to_python.append(text)
        return unicodedata.normalize(name, text)

    text = "a" + unit * 1000 + "b"
    monkeypatch.setattr(unicode_forms, "normalize", recorded)
    form()(text)
    form().align(AlignedText.of(text))
    for part in given_to_python:
        apart = "".join(unicodedata.normalize("NFKD", character) for character in part.strip("ab"))
        classes = list(map(unicodedata.combining, apart))
        assert len(part) < 3 or classes == sorted(classes)


@given(text=texts, pattern=st.sampled_from(["ab+", r"\s+", "[aé]", r"(\w)\1", "中|é"]), content=st.text(max_size=3))
@example("aabbb abb", "ab+", "-")
def test_a_replacement_comes_from_all_of_its_match(text: str, pattern: str, content: str) -> None:
    expected = []
    done = 0
    for match in re.finditer(
        pattern.replace(r"\s", "[\t-\r \x85\xa0\u3000\u1680\u2000-\u200a\u2028\u2029\u202f\u205f]"), text
    ):
        expected += [(text[i], i, i + 1) for i in range(done, match.start())]
        expected += [(c, match.start(), match.end()) for c in content]
        done = match.end()
    expected += [(text[i], i, i + 1) for i in range(done, len(text))]
    if pattern == r"(\w)\1":
        assume(text.isascii())  # `re` does not take marks for parts of words
    assert Replace(Regex(pattern), content).align(AlignedText.of(text)) == AlignedText.rebuilt(expected)


def test_what_an_empty_match_brings_in_comes_from_nowhere() -> None:
    aligned = Replace(Regex("^|b"), "▁").align(AlignedText.of("ab\na"))
    assert (aligned.text, places(aligned)) == ("▁a▁\n▁a", [(0, 0), (0, 1), (1, 2), (2, 3), (3, 3), (3, 4)])


def test_plain_language() -> None:
    clean = NormalizerSequence([remove_control_characters(), collapse_white_space(), Strip()])
    assert clean(" a\x00\t\n b\u3000c\x9f d\n") == "a b c d"
    assert normalizer_from_json(clean.to_json())(" a\x00\t b ") == "a b"


@given(text=texts)
def test_cleaning_twice_is_cleaning_once(text: str) -> None:
    for normalizer in (collapse_white_space(), remove_control_characters(), Strip(), StripAccents(), Nmt()):
        assert normalizer(normalizer(text)) == normalizer(text)


@pytest.mark.parametrize("options", _BERT, ids=str)
def test_berts_long_texts_are_done_in_blocks(options: dict[str, Any]) -> None:
    text = "Ünïcode and ASCII\x00, 中文!\t" * 1500 + "plain ASCII only " * 1000 + "Ｅ\u0301nd"
    assert BertNormalizer(**options)(text) == normalizers.BertNormalizer(**options).normalize_str(text)


@pytest.mark.parametrize(("ours", "peer"), EVERY, ids=label)
def test_files_say_what_those_of_tokenizers_say(ours: Normalizer, peer: Any) -> None:
    again = normalizer_from_json(ours.to_json())
    assert again is not None
    assert again.to_json() == ours.to_json()
    assert type(again) is type(ours)
    text = "Ｅé\u0301 ab  \n\x00中ab"
    assert again(text) == ours(text)
    tokenizer = Tokenizer(models.BPE())
    content = tokenizer.to_str().replace('"normalizer":null', '"normalizer":' + json.dumps(ours.to_json()))
    assert Tokenizer.from_str(content).normalizer.normalize_str(text) == ours(text)


@pytest.mark.parametrize(("ours", "peer"), EVERY, ids=label)
def test_files_of_tokenizers_are_read(ours: Normalizer, peer: Any) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = peer
    part = json.loads(tokenizer.to_str())["normalizer"]
    read = normalizer_from_json(part)
    assert read is not None
    assert read.to_json() == part
    text = "Ｅé\u0301 ab  \n\x00中ab"
    assert read(text) == ours(text)


def test_no_normalizer_is_none() -> None:
    assert normalizer_from_json(None) is None


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "ByteLevel"}, r"normalizer must be one of NFC, .*, got 'ByteLevel'"),
        ("NFC", r"got 'NFC'"),
        ({"type": "NFC", "fast": True}, r"NFC has options that are not supported: 'fast'"),
        ({"type": "Strip", "strip_left": True}, r"Strip must have the option 'strip_right'"),
        ({"type": "Strip", "strip_left": 1, "strip_right": True}, r"option 'strip_left' of Strip .* not supported: 1"),
        ({"type": "Replace", "pattern": {"Glob": "*"}, "content": ""}, r"a pattern must be .*Glob"),
        ({"type": "Replace", "pattern": {"Regex": "("}, "content": ""}, r"'\(' is not a regular expression"),
        ({"type": "Sequence", "normalizers": [{"type": "NFX"}]}, r"got 'NFX'"),
        ({"type": "Sequence", "normalizers": None}, r"option 'normalizers' of Sequence"),
        ({"type": "BertNormalizer", "lowercase": None}, r"option 'lowercase'"),
    ],
)
def test_a_part_that_is_not_understood_is_refused(part: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normalizer_from_json(part)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'a\(' is not a regular expression"):
        Regex("a(")
    for pattern in ("(?m:.)", "(?i)a(?s).", r"\h+", r"a\Z"):
        with pytest.raises(ValueError, match="engines read it differently"):
            Regex(pattern)
    assert Regex(r"\\h (?i:a)(?<s>b)").pattern
    for make in (lambda: Replace(1, ""), lambda: Replace("a", None), lambda: Prepend(1), lambda: Regex(b"a")):
        with pytest.raises(TypeError, match="must be a str"):
            make()
