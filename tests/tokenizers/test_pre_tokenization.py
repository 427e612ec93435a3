"""Pre-tokenizers, held against those of the `tokenizers` library: the pieces, and where they are."""

import json
import unicodedata
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex as PeerRegex
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from minillm.tokenizers.aligned_text import AlignedText
from minillm.tokenizers.normalization import BertNormalizer, Strip
from minillm.tokenizers.pre_tokenization import (
    BertPreTokenizer,
    Digits,
    Metaspace,
    PreTokenizer,
    PreTokenizerSequence,
    Punctuation,
    Regex,
    Split,
    UnicodeScripts,
    Whitespace,
    WhitespaceSplit,
    pre_tokenizer_from_json,
    treats_start_apart,
)
from minillm.tokenizers.split_patterns import SPLIT_PATTERNS

# Characters that Unicode 3.2 had are in everybody's tables. Two of them are not what they were: one is punctuation no
# more, the other is no longer of all scripts, but to `tokenizers` they still are; nor are marks what they were there.
CHANGED_SINCE = "\u166d\u0589\u1734\u1885\u1886"
# Of ideographs, Hangul and private use, a sixteenth will do.
MANY = [range(0x3400, 0xA000), range(0xAC00, 0xD7A4), range(0xE000, 0xF900), range(0x20000, 0x2F000)]
KNOWN = [
    chr(i)
    for i in range(0x30000)
    if (i % 16 == 0 or not any(i in block for block in MANY))
    and unicodedata.ucd_3_2_0.category(chr(i)) not in ("Cn", "Cs")
    and chr(i) not in CHANGED_SINCE
]
tricky = st.sampled_from(
    "aZé1½Ⅷ٣²_-!.'«、。¿$+<^`|~§\u0301\u0903 \t\n\r\v\x00\x1c\x1f\x7f\x85\xa0\u2028\u3000\u200b\u200d"
)
tricky |= st.sampled_from("▁中豈ねネーｰㄱ각мשع😀\ue000\u0378")
phrases = st.sampled_from(["don't", "  ", "foo bar", "12.5%", "::", "x1\n", "▁▁", "a-b--c", "Hello World"])
texts = st.lists(tricky | st.sampled_from(KNOWN) | phrases, max_size=20).map("".join)
ascii_texts = st.text(st.characters(max_codepoint=127), max_size=30) | st.text(" a1-!'\n\x1c", max_size=15)
moderately = settings(max_examples=25)

BEHAVIORS = ["removed", "isolated", "merged_with_previous", "merged_with_next", "contiguous"]
PATTERNS = [
    r"\s+",
    "x*",
    r"\b|:+",
    "(?=[A-Z])",
    "^",
    "$",
    r"\p{L}+",
    "",
    r"[^\W\d_]+|\d",
    r"[\p{L}&&[^aeiou]]",
    "[[a-z][0-9]]+",
]
STRINGS = [" ", "-", "^", "::", "a-", ""]
SEQUENCES = [
    [("WhitespaceSplit", ()), ("Punctuation", ())],
    [("Punctuation", ("merged_with_previous",)), ("Metaspace", ("▁", "always"))],
    [("WhitespaceSplit", ()), ("Metaspace", ("▁", "first"))],
    [("Digits", (True,)), ("Metaspace", ("▁", "first"))],
    [("Metaspace", ("▁", "first", False)), ("Digits", ())],
    [],
]
HERE: dict[str, Any] = {
    cls.__name__: cls
    for cls in (BertPreTokenizer, Digits, Metaspace, Punctuation, UnicodeScripts, Whitespace, WhitespaceSplit)
}


def sequence(steps: list[tuple[str, tuple[Any, ...]]]) -> tuple[PreTokenizer, Any]:
    ours = PreTokenizerSequence(HERE[name](*arguments) for name, arguments in steps)
    return ours, pre_tokenizers.Sequence([getattr(pre_tokenizers, name)(*arguments) for name, arguments in steps])


PAIRS: list[tuple[PreTokenizer, Any]] = [
    (BertPreTokenizer(), pre_tokenizers.BertPreTokenizer()),
    (Whitespace(), pre_tokenizers.Whitespace()),
    (WhitespaceSplit(), pre_tokenizers.WhitespaceSplit()),
    (UnicodeScripts(), pre_tokenizers.UnicodeScripts()),
    (Digits(), pre_tokenizers.Digits()),
    (Digits(individual_digits=True), pre_tokenizers.Digits(individual_digits=True)),
    *((Punctuation(behavior), pre_tokenizers.Punctuation(behavior)) for behavior in BEHAVIORS),
    *(
        (Metaspace("▁", scheme, split), pre_tokenizers.Metaspace("▁", scheme, split))
        for scheme in ("always", "first", "never")
        for split in (True, False)
    ),
    (Metaspace("a"), pre_tokenizers.Metaspace("a")),
    *((p, pre_tokenizers.Split(PeerRegex(p.published), "isolated")) for p in SPLIT_PATTERNS.values()),
    *map(sequence, SEQUENCES),
]
SPLITS: list[tuple[PreTokenizer, Any]] = [
    (Split(ours, behavior, invert=invert), pre_tokenizers.Split(peer, behavior, invert))
    for ours, peer in [
        *zip(STRINGS, STRINGS, strict=True),
        *zip(map(Regex, PATTERNS), map(PeerRegex, PATTERNS), strict=True),
    ]
    for behavior in BEHAVIORS
    for invert in (False, True)
]


def label(value: object) -> str:
    return str(value) if value.__class__.__module__.startswith("tokenizers") else ""


every = pytest.mark.parametrize(("ours", "peer"), PAIRS, ids=label)


def pieces(ours: PreTokenizer, text: str, **arguments: Any) -> list[str]:
    return [piece for block in ours.split(text, **arguments) for piece in block]


def placed(ours: PreTokenizer, text: str) -> list[tuple[str, tuple[int, int]]]:
    return [(piece.text, piece.span(0, len(piece.text))) for piece in ours.align(AlignedText.of(text))]


def check(ours: PreTokenizer, peer: Any, text: str) -> None:
    expected = [piece for piece in peer.pre_tokenize_str(text) if piece[0]]
    assert pieces(ours, text) == [piece for piece, _ in expected]
    assert placed(ours, text) == expected


@every
@moderately
@given(text=texts | ascii_texts)
def test_pieces_and_offsets_are_those_of_tokenizers(ours: PreTokenizer, peer: Any, text: str) -> None:
    check(ours, peer, text)


# Eight characters that are part of words, of \w and \b, in one engine and not in the other.
UNSURE = "²³¹¼½¾\u200c\u200d"
split_texts = texts.map(lambda text: text.translate(dict.fromkeys(map(ord, UNSURE))))


@given(pair=st.sampled_from(SPLITS), text=split_texts | ascii_texts | st.text("abx:-^ \nA1", max_size=15))
@settings(max_examples=400)
def test_any_split_is_that_of_tokenizers(pair: tuple[PreTokenizer, Any], text: str) -> None:
    check(*pair, text)


@pytest.mark.parametrize("text", ["", "the-final--countdown", " a::bc\nxxB ", "--", "aa-\n\na-b"])
def test_all_ways_to_split_a_few_texts(text: str) -> None:
    for ours, peer in SPLITS:
        check(ours, peer, text)


@pytest.mark.parametrize(("ours", "peer"), PAIRS[:11], ids=label)
def test_every_character_is_split_as_in_tokenizers(ours: PreTokenizer, peer: Any) -> None:
    for start in range(0, len(KNOWN), 4096):
        # A letter, a digit, a space and the character itself each cut this line in another way.
        text = "".join(f"a{c}{c}1 " for c in KNOWN[start : start + 4096])
        assert pieces(ours, text) == [piece for piece, _ in peer.pre_tokenize_str(text)]


@every
@moderately
@given(text=ascii_texts)
def test_the_fast_way_and_the_general_one_agree(ours: PreTokenizer, peer: Any, text: str) -> None:
    """A letter that is not ASCII, behind a space, makes the whole block one for the general way."""
    extended = "".join(pieces(ours, text + " é", at_start=False)).removesuffix("é")
    assert extended.rstrip(" ▁a") == "".join(pieces(ours, text, at_start=False)).rstrip(" ▁a")
    if hasattr(ours, "split_ascii"):
        assert ours.split_ascii(text) == ours.split_unicode(text)


@pytest.mark.parametrize("ours", [pair[0] for pair in PAIRS[:17]], ids=lambda ours: str(ours.to_json()))
@moderately
@given(text=texts, block_length=st.integers(0, 12))
def test_cutting_into_blocks_changes_nothing(ours: Any, text: str, block_length: int) -> None:
    assert pieces(ours, text, block_length=block_length) == pieces(ours, text, block_length=10_000)


@every
@moderately
@given(text=texts)
def test_offsets_point_to_the_original_of_a_changed_text(ours: PreTokenizer, peer: Any, text: str) -> None:
    for first in (0, 1):
        wide = AlignedText.rebuilt((c, 2 * i + first, 2 * i + first + 2) for i, c in enumerate(text))
        aligned = ours.align(wide)
        assert [piece.text for piece in aligned] == pieces(ours, text, at_start=first == 0)
        if first == 0:
            found = [(piece.text, piece.span(0, len(piece.text))) for piece in aligned]
            assert found == [(piece, (2 * start, 2 * end)) for piece, (start, end) in placed(ours, text)]


@given(text=texts)
def test_after_normalization_offsets_are_those_of_tokenizers(text: str) -> None:
    tokenizer = Tokenizer(models.WordLevel({"?": 0}, "?"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    aligned = BertPreTokenizer().align(BertNormalizer().align(AlignedText.of(text)))
    assert [piece.span(0, len(piece.text)) for piece in aligned] == tokenizer.encode(text).offsets


@pytest.mark.parametrize("text", ["  a b", "a b", " ", "▁a"])
def test_what_is_no_longer_there_cannot_be_first(text: str) -> None:
    """A text whose first character was stripped does not begin with its second: so it is in `tokenizers`."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "▁a": 1, "▁b": 2}, "a"))
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first")
    aligned = Metaspace("▁", "first").align(Strip().align(AlignedText.of(text)))
    encoding = tokenizer.encode(text)
    assert [piece.text for piece in aligned] == encoding.tokens
    assert [piece.span(0, len(piece.text)) for piece in aligned] == encoding.offsets


def test_a_space_is_put_in_front_where_the_scheme_says() -> None:
    for scheme, first, later in [("always", "▁a", "▁a"), ("first", "▁a", "a"), ("never", "a", "a")]:
        metaspace = Metaspace(prepend_scheme=scheme)
        assert pieces(metaspace, "a b") == [first, "▁b"]
        assert pieces(metaspace, "a b", at_start=False) == [later, "▁b"]
        assert [piece.text for piece in metaspace.align(AlignedText.of("xa b").slice(1, 4))] == [later, "▁b"]


def test_whose_pieces_depend_on_where_the_text_begins() -> None:
    for ours, peer in PAIRS:
        assert treats_start_apart(ours) == ("prepend_scheme=first" in str(peer))


def test_known_pieces() -> None:
    text = "It's 12 o'clock."
    assert pieces(Whitespace(), text) == ["It", "'", "s", "12", "o", "'", "clock", "."]
    assert pieces(Digits(True), text) == ["It's ", "1", "2", " o'clock."]
    assert pieces(Metaspace(), text) == ["▁It's", "▁12", "▁o'clock."]
    assert pieces(SPLIT_PATTERNS["gpt2"], text) == ["It", "'s", " 12", " o", "'", "clock", "."]
    for behavior, expected in {
        "removed": "the final countdown",
        "isolated": "the - final - - countdown",
        "merged_with_previous": "the- final- - countdown",
        "merged_with_next": "the -final - -countdown",
        "contiguous": "the - final -- countdown",
    }.items():
        assert " ".join(pieces(Split("-", behavior), "the-final--countdown")) == expected


@pytest.mark.parametrize(("ours", "peer"), PAIRS + SPLITS, ids=label)
def test_files_are_those_of_tokenizers(ours: PreTokenizer, peer: Any) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = peer
    part = json.loads(tokenizer.to_str())["pre_tokenizer"]
    assert ours.to_json() == part
    read = pre_tokenizer_from_json(part)
    assert type(read) is type(ours)
    assert read.to_json() == part


def test_old_spellings_are_read() -> None:
    old = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": False, "str_rep": "▁"}
    read = pre_tokenizer_from_json(old)
    assert isinstance(read, Metaspace)
    assert (read.prepend_scheme, read.splits) == ("never", True)
    delimiter = pre_tokenizer_from_json({"type": "CharDelimiterSplit", "delimiter": "-"})
    assert delimiter is not None
    for text in ("a-b--c", "-"):
        assert placed(delimiter, text) == pre_tokenizers.CharDelimiterSplit("-").pre_tokenize_str(text)
    assert pre_tokenizer_from_json(None) is None


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"type": "ByteLevel"}, r"pre_tokenizer must be one of Whitespace, .*, got 'ByteLevel'"),
        ({"type": "Digits", "individual_digits": "yes"}, r"option 'individual_digits' of Digits .*: 'yes'"),
        ({"type": "Punctuation", "behavior": "isolated"}, r"behavior must be one of Removed, .*, got 'isolated'"),
        ({"type": "Split", "pattern": {"Regex": "["}, "behavior": "Isolated"}, r"'\[' is not a regular expression"),
        ({"type": "Split", "pattern": " ", "behavior": "Isolated"}, r"option 'pattern' of Split"),
        ({"type": "Metaspace", "replacement": "__"}, r"replacement must be one character .*, got '__'"),
        (
            {"type": "Metaspace", "replacement": "_", "prepend_scheme": "last"},
            r"prepend_scheme must be one of",
        ),
        (
            {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "add_prefix_space": False},
            r"prepend_scheme must be 'never' without add_prefix_space, got 'always'",
        ),
        ({"type": "CharDelimiterSplit", "delimiter": "ab"}, r"delimiter must be one character, got 'ab'"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Whitespace", "x": 1}]}, r"Whitespace has .* 'x'"),
    ],
)
def test_a_part_that_is_not_understood_is_refused(part: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pre_tokenizer_from_json(part)


def test_bad_arguments_are_refused() -> None:
    for make in (partial(Split, " "), Punctuation):
        with pytest.raises(ValueError, match=r"behavior must be one of 'removed', 'isolated', .*, got 'merged'"):
            make("merged")
    with pytest.raises(TypeError, match="pattern must be a str or a Regex, got int"):
        Split(1, "removed")
    for replacement in ("", " ", "ab"):
        with pytest.raises(ValueError, match="replacement must be one character other than a space"):
            Metaspace(replacement)
    with pytest.raises(TypeError, match="split must be True or False, got 'x'"):
        Metaspace(split="x")  # type: ignore[arg-type]
