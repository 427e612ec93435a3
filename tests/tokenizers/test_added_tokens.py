"""Added tokens: found where `tokenizers` finds them, whatever their flags say; conflicts refused."""

import json
import re
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers import AddedToken as PeerToken
from tokenizers import Tokenizer, models, normalizers

from minillm.tokenizers.added_tokens import FLAGS, WHITE_SPACE, AddedToken, AddedTokens, FoundToken, longest_of
from minillm.tokenizers.aligned_text import AlignedText

# Parts of words (among them marks, joiners and `_`), white space (U+0085) and what is none (U+001C), characters that
# become two when lower-cased (İ) or none (-, see Shrink).
ALPHABET = "aAbBéÉßİ1_²\u0301\u200d <>[]|-.\t\n\x85\u2028\x1c\u3000中👩"
LOWERED = ALPHABET + ALPHABET.lower()
texts = st.text(st.sampled_from(ALPHABET), max_size=12)
fragments = st.one_of(st.text(st.sampled_from("aAbB <-"), min_size=1, max_size=3), texts.filter(bool))


class Shrink:
    """Lower case, and no hyphens: Sequence([Lowercase, Replace("-", "")])."""

    peer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace("-", "")])

    def __call__(self, text: str) -> str:
        return text.lower().replace("-", "")

    def align(self, text: AlignedText) -> AlignedText:
        spans = zip(text.text, text.starts, text.ends, strict=True)
        return AlignedText.rebuilt((self(character), start, end) for character, start, end in spans)


@st.composite
def added_tokens(draw: st.DrawFn) -> dict[str, dict[str, bool]]:
    names = draw(st.lists(fragments, min_size=1, max_size=5, unique=True))
    return {name: draw(st.fixed_dictionaries({flag: st.booleans() for flag in FLAGS})) for name in names}


def peer_with(tokens: dict[str, dict[str, bool]], normalizer: Any) -> Tokenizer:
    """Every character is a token; those of one stretch have the same word id."""
    vocabulary = {character: i for i, character in enumerate(dict.fromkeys(LOWERED))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    if normalizer is not None:
        tokenizer.normalizer = normalizer.peer
    tokenizer.add_tokens([PeerToken(name, **flags) for name, flags in tokens.items()])
    return tokenizer


def peer_encode(tokenizer: Tokenizer, text: str) -> Any:
    try:
        return tokenizer.encode(text)
    except BaseException as error:  # it panics where a token lies in the white space that the one before it took
        if type(error).__name__ != "PanicException":
            raise
        return None


@given(added_tokens(), st.lists(st.one_of(texts, fragments), max_size=6), st.booleans(), st.booleans(), st.data())
def test_tokens_are_found_where_tokenizers_finds_them(
    tokens: dict[str, dict[str, bool]],
    stretches: list[str],
    with_normalizer: bool,
    allow_special: bool,
    data: st.DataObject,
) -> None:
    normalizer = Shrink() if with_normalizer else None
    forms = [normalizer(name) if normalizer else name for name in tokens if tokens[name]["normalized"]]
    assume(len(set(forms)) == len(forms) and "" not in forms)  # there the peer is random, or cuts everywhere
    text = "".join(part for stretch in stretches for part in (stretch, data.draw(st.sampled_from([*tokens, ""]))))
    peer = peer_with(tokens, normalizer)
    peer.encode_special_tokens = not allow_special
    expected = peer_encode(peer, text)
    assume(expected is not None)

    ours = AddedTokens(AddedToken(name, peer.token_to_id(name), **flags) for name, flags in tokens.items())
    parts = ours.cut_aligned(AlignedText.of(text), normalizer, allow_special=allow_special)
    found = []
    for number, part in enumerate(parts):
        if isinstance(part, FoundToken):
            found.append((part.id, part.text, (part.start, part.end), number))
        else:
            spans = zip(part.text, part.starts, part.ends, strict=True)
            found += [(peer.model.token_to_id(c), c, (start, end), number) for c, start, end in spans]
    assert found == list(zip(expected.ids, expected.tokens, expected.offsets, expected.word_ids, strict=True))
    plain = [part.id if isinstance(part, FoundToken) else part.text for part in parts]
    assert ours.cut(text, normalizer, allow_special=allow_special) == plain


def test_the_mask_takes_the_space_before_it_along() -> None:
    tokens = AddedTokens([AddedToken("[MASK]", 4, lstrip=True)])
    assert tokens.cut("Paris is  [MASK] .") == ["Paris is", 4, " ."]
    assert tokens.cut_aligned(AlignedText.of("is  [MASK]")) == [
        AlignedText("is", range(0, 2), range(1, 3)),
        FoundToken(4, "  [MASK]", 2, 10),
    ]


def test_a_token_in_white_space_that_is_taken_is_gone() -> None:
    """`tokenizers` fails here."""
    tokens = [AddedToken("<a>", 0, rstrip=True), AddedToken(" ", 1, lstrip=True)]
    assert AddedTokens(tokens).cut("<a>   b") == [0, "b"]


def test_of_tokens_that_become_equal_the_first_is_found() -> None:
    """In `tokenizers` it is one of them at random."""
    for first, second in (("Day", "DAY"), ("DAY", "Day")):
        tokens = AddedTokens([AddedToken(first, 7, normalized=True), AddedToken(second, 8, normalized=True)])
        assert tokens.cut("day DAY", str.lower) == [7, " ", 7]


def test_a_token_of_which_nothing_is_left_is_not_found() -> None:
    tokens = AddedTokens([AddedToken("--", 7, normalized=True), AddedToken("-a-", 8, normalized=True)])
    assert tokens.cut("x--y A", Shrink()) == ["xy ", 8]


def test_another_normalizer_is_heeded() -> None:
    tokens = AddedTokens([AddedToken("Day", 7, normalized=True)])
    assert tokens.cut("Day day", str.lower) == [7, " ", 7]
    assert tokens.cut("Day day") == [7, " day"]
    assert tokens.cut("Day day", str.lower) == [7, " ", 7]


def test_nothing_is_cut_where_there_is_nothing() -> None:
    assert AddedTokens().cut("") == []
    assert AddedTokens().cut("A b", str.lower) == ["a b"]
    assert AddedTokens().cut_aligned(AlignedText.of("")) == []
    assert AddedTokens([AddedToken("<a>", 0)]).cut("") == []
    assert AddedTokens([AddedToken("<a>", 0)]).cut("<a><a>") == [0, 0]


def test_lookup() -> None:
    tokens = AddedTokens([AddedToken("<b>", 5), AddedToken("word", 3, special=False)])
    assert tokens.special == {"<b>": 5}
    assert tokens.with_text("word") == AddedToken("word", 3, special=False)
    assert tokens.with_text("b") is None
    assert len(tokens) == 2
    assert [token.text for token in tokens] == ["<b>", "word"]
    assert AddedTokens(tokens) == tokens != AddedTokens()
    assert eval(repr(tokens)) == tokens


@given(added_tokens())
def test_tokenizer_json_keeps_them(tokens: dict[str, dict[str, bool]]) -> None:
    peer = peer_with(tokens, None)
    entries = json.loads(peer.to_str())["added_tokens"]
    ours = AddedTokens.from_json(entries)
    assert ours.to_json() == entries
    assert {token.text: token.id for token in ours} == {name: peer.token_to_id(name) for name in tokens}


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([AddedToken("<a>", 0), AddedToken("<a>", 1)], "'<a>' must be there once, got ids 0 and 1"),
        ([AddedToken("<a>", 0), AddedToken("<a>", 0, special=False)], "'<a>' must be there once"),
        ([AddedToken("<a>", 0), AddedToken("<b>", 0)], "'<a>' and '<b>' must not share the id 0"),
    ],
)
def test_conflicts_are_refused(tokens: list[AddedToken], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AddedTokens(tokens)


@pytest.mark.parametrize(
    ("text", "token_id", "message"),
    [
        ("", 0, "not empty"),
        (7, 0, "must be a str"),
        ("a\ud800", 0, "lone surrogates"),
        ("a", -1, "at least 0, got -1"),
        ("a", True, "at least 0, got True"),
        ("a", "1", "at least 0, got '1'"),
    ],
)
def test_impossible_tokens_are_refused(text: Any, token_id: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AddedToken(text, token_id)
    with pytest.raises(ValueError, match=message):
        AddedTokens.from_json([{"content": text, "id": token_id}])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "must be a list or null"),
        (["<a>"], "object with 'content' and 'id'"),
        ([{"content": "<a>"}], "object with 'content' and 'id'"),
        ([{"content": "<a>", "id": 1, "lstrip": 1}], "lstrip must be true or false, got 1"),
    ],
)
def test_other_json_is_refused(entries: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AddedTokens.from_json(entries)
    assert len(AddedTokens.from_json(None)) == 0


@given(st.sets(st.text("ab.<", min_size=1, max_size=6), min_size=1), st.text("ab.<"), st.sampled_from([0, 1, 2, 32]))
def test_the_longest_text_is_matched(words: set[str], text: str, depth: int) -> None:
    match = re.compile(longest_of(words, depth)).match(text)
    assert (match.group() if match else None) == max((w for w in words if text.startswith(w)), key=len, default=None)


def test_many_tokens() -> None:
    runs = [AddedToken("a" * (n + 1), n) for n in range(200)]  # each the beginning of the next
    assert AddedTokens(runs).cut("a" * 230) == [199, 29]
    unused = [AddedToken(f"<unused{n}>", n) for n in range(6000)]
    assert AddedTokens(unused).cut("<unused5999><unused6000><unused600>") == [5999, "<unused6000>", 600]


def test_white_space_is_that_of_unicode() -> None:
    peer = Tokenizer(models.BPE({"x": 0}, []))
    peer.add_tokens([PeerToken("<a>", rstrip=True)])
    candidates = [chr(i) for i in range(0x10000) if chr(i).isspace()]
    taken = [c for c in candidates if peer.encode("<a>" + c).offsets == [(0, 4)]]
    assert "".join(taken) == WHITE_SPACE
