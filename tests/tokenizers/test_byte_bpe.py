"""The byte-level BPE tokenizer, held against the `tokenizers` library: training, coding, each other's files."""

import copy
import json
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from minillm.tokenizers import ByteBPETokenizer
from minillm.tokenizers.merges import apply_merges_plain
from minillm.tokenizers.split_patterns import SPLIT_PATTERNS

SPECIAL = ["<|endoftext|>", "<|end|>", "<|endoftext|><|end|>", "<été !>"]
PATTERNS = list(SPLIT_PATTERNS)
patterns = pytest.mark.parametrize("pattern", PATTERNS)
documents = [topics[name] for name in sorted(topics)]


@cache
def known(character: str) -> bool:
    """Whether the tables of both engines have it: to a newer Unicode, what was no character may be a letter."""
    peer = pre_tokenizers.Split(Regex(r"\p{Cn}"), "removed")
    return not regex.match(r"\p{Cn}", character) and bool(peer.pre_tokenize_str(character))


# Which characters Python knows matters for speed only: few of them are then filtered out.
characters = st.characters(exclude_categories=["Cs", "Cn"]).filter(known)
fragments = st.sampled_from(
    [*SPECIAL, "<|end", "|>", " ", "\n", "  \n", "'s", "é", "中文", "👩\u200d💻", *documents[3][:300].split()]
)
texts = st.one_of(
    st.text(characters), st.lists(st.one_of(fragments, st.text(characters, max_size=5)), max_size=20).map("".join)
)


def peer_untrained(pattern: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERNS[pattern].published), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if pattern == "gpt2"
        else pre_tokenizers.Sequence([split, byte_level])
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def peer_trained(texts: list[str], vocab_size: int, pattern: str, special_tokens: list[str]) -> Tokenizer:
    tokenizer = peer_untrained(pattern)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special_tokens,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ByteBPETokenizer, Tokenizer]]:
    """By pattern: a tokenizer trained here on real text, and the one `tokenizers` makes of its file."""
    folder = tmp_path_factory.mktemp("tokenizers")
    out = {}
    for pattern in PATTERNS:
        ours = ByteBPETokenizer.train(documents, 1200, pattern=pattern, special_tokens=SPECIAL)
        ours.save(folder / pattern)
        out[pattern] = ours, Tokenizer.from_file(str(folder / pattern))
    return out


@patterns
def test_training_on_real_text_gives_the_same_file_content(pattern: str, tmp_path: Path) -> None:
    ours = ByteBPETokenizer.train(documents, 3000, pattern=pattern, special_tokens=SPECIAL)
    peer = peer_trained(documents, 3000, pattern, SPECIAL)
    assert ours.vocab_size == peer.get_vocab_size() == 3000
    ours.save(tmp_path / "ours.json")
    ours_content = json.loads((tmp_path / "ours.json").read_text(encoding="utf-8"))
    assert ours_content["model"] == json.loads(peer.to_str())["model"]
    assert ours_content["added_tokens"] == json.loads(peer.to_str())["added_tokens"]


@given(
    st.lists(st.one_of(st.text(characters, max_size=40), st.text("ab '\n", max_size=40)), max_size=5),
    st.integers(0, 40),
    st.sampled_from(PATTERNS),
    st.lists(st.sampled_from(["ab", "aa", "<é>", "bbb", "' "]), unique=True, max_size=3),
)
def test_training_on_any_text_gives_the_merges_of_tokenizers(
    texts: list[str], n_merges: int, pattern: str, special_tokens: list[str]
) -> None:
    vocab_size = 256 + len(special_tokens) + n_merges
    ours = ByteBPETokenizer.train(texts, vocab_size, pattern=pattern, special_tokens=special_tokens)
    peer = peer_trained(texts, vocab_size, pattern, special_tokens)
    model = json.loads(peer.to_str())["model"]
    byte_level = decoders.ByteLevel()
    spelled = [(byte_level.decode([left]), byte_level.decode([right])) for left, right in model["merges"]]
    assert [tuple(part.decode(errors="replace") for part in pair) for pair in ours.merges] == spelled
    assert ours.vocab_size == peer.get_vocab_size()


@patterns
@given(text=texts)
def test_encoding_equals_tokenizers_with_our_file(
    pairs: dict[str, tuple[ByteBPETokenizer, Tokenizer]], pattern: str, text: str
) -> None:
    ours, peer = pairs[pattern]
    assert ours.encode(text) == peer.encode(text).ids


@patterns
@given(text=st.one_of(texts, st.text()))
def test_what_is_encoded_decodes_to_the_text(
    pairs: dict[str, tuple[ByteBPETokenizer, Tokenizer]], pattern: str, text: str
) -> None:
    """Any text, with code points among it that no version of Unicode has yet."""
    ours, _ = pairs[pattern]
    assert ours.decode(ours.encode(text)) == text
    assert ours.decode(ours.encode(text, allow_special=False)) == text


@patterns
def test_encoding_equals_tokenizers_with_their_file(pattern: str, tmp_path: Path) -> None:
    peer = peer_trained(documents[:40], 700, pattern, SPECIAL[:2])
    peer.add_special_tokens([AddedToken("<|pad|>", special=True)])
    peer.save(str(tmp_path / "tokenizer.json"))
    ours = ByteBPETokenizer.load(tmp_path / "tokenizer.json")
    assert ours.special_tokens == {"<|endoftext|>": 0, "<|end|>": 1, "<|pad|>": 700}
    for text in [*documents[40:60], "<|pad|>a<|endoftext|>", "", "naïve 中文 \u3000 👍🏽\r\n"]:
        assert ours.encode(text) == peer.encode(text).ids
    ours.save(tmp_path / "again.json")
    assert Tokenizer.from_file(str(tmp_path / "again.json")).encode(documents[50]).ids == peer.encode(documents[50]).ids


@given(ids=st.lists(st.integers(0, 1199)))
def test_any_ids_decode_as_in_tokenizers(pairs: dict[str, tuple[ByteBPETokenizer, Tokenizer]], ids: list[int]) -> None:
    ours, peer = pairs["gpt2"]
    plain = [i for i in ids if i >= len(SPECIAL)]
    assert ours.decode(plain) == peer.decode(plain)
    assert ours.decode(ids).encode().decode() == ours.decode(ids)


def test_the_fast_encoder_equals_the_plain_one(pairs: dict[str, tuple[ByteBPETokenizer, Tokenizer]]) -> None:
    ours, _ = pairs["gpt4"]
    ids = {ours.token_bytes(i): i for i in range(len(SPECIAL), ours.vocab_size)}
    merges = {(ids[left], ids[right]): ids[left + right] for left, right in ours.merges}
    text = documents[7]
    plain: list[int] = []
    for piece in SPLIT_PATTERNS["gpt4"].split_unicode(text):
        plain += apply_merges_plain([ids[bytes([byte])] for byte in piece.encode()], merges)
    assert ours.encode(text) == plain


def test_special_tokens_are_found_longest_first_and_only_when_allowed(
    pairs: dict[str, tuple[ByteBPETokenizer, Tokenizer]],
) -> None:
    ours, peer = pairs["gpt2"]
    assert ours.special_tokens == {text: i for i, text in enumerate(SPECIAL)}
    text = "<|endoftext|><|end|><|end|>x"
    assert ours.encode(text)[:2] == [2, 1]
    assert ours.encode(text) == peer.encode(text).ids
    peer.encode_special_tokens = True
    assert ours.encode(text, allow_special=False) == peer.encode(text).ids
    peer.encode_special_tokens = False
    assert min(ours.encode(text, allow_special=False)) >= len(SPECIAL)
    assert ours.token_bytes(3) == "<été !>".encode()
    assert ours.decode([3, 1]) == "<été !><|end|>"


def test_batches_and_long_texts(pairs: dict[str, tuple[ByteBPETokenizer, Tokenizer]]) -> None:
    ours, peer = pairs["gpt2"]
    batch = [documents[0], "", "x<|end|>", " " * 3000 + "y", "中" * 3000]
    assert ours.encode_batch(batch) == [encoding.ids for encoding in peer.encode_batch(batch)]
    assert ours.encode_batch(["<|end|>"], allow_special=False) == [ours.encode("<|end|>", allow_special=False)]


def test_a_full_cache_changes_nothing(
    pairs: dict[str, tuple[ByteBPETokenizer, Tokenizer]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, peer = pairs["gpt2"]
    monkeypatch.setattr("minillm.tokenizers.pieces.CACHE_PIECES", 5)
    small = copy.deepcopy(ours)
    small._cache.clear()
    assert small.encode(documents[11]) == peer.encode(documents[11]).ids
    assert len(small._cache) <= 5


def test_what_a_trained_tokenizer_says_of_itself() -> None:
    tokenizer = ByteBPETokenizer.train(["abab"], 259, special_tokens=["<|endoftext|>"])
    assert tokenizer.merges == [(b"a", b"b"), (b"ab", b"ab")]
    assert tokenizer.vocab_size == 259
    assert [tokenizer.token_bytes(i) for i in (0, 1, 257, 258)] == [b"<|endoftext|>", b"!", b"ab", b"abab"]
    assert repr(tokenizer) == "ByteBPETokenizer(vocab_size=259, pattern='gpt2', special_tokens=['<|endoftext|>'])"
    assert ByteBPETokenizer.train([], 300).vocab_size == 256
    assert ByteBPETokenizer.train(["ab ab"], 300, min_frequency=2).merges == [(b"a", b"b")]


def test_ids_may_be_integers_of_any_kind(pairs: dict[str, tuple[ByteBPETokenizer, Tokenizer]]) -> None:
    ours, _ = pairs["gpt2"]
    ids = ours.encode("seven seas")
    assert ours.decode(np.array(ids, dtype=np.uint16)) == "seven seas"
    with pytest.raises(TypeError, match="float"):
        ours.decode([1.0])  # type: ignore[list-item]


@pytest.mark.parametrize("token_id", [-1, 1200, 10**12])
def test_ids_outside_the_vocabulary_are_refused(
    pairs: dict[str, tuple[ByteBPETokenizer, Tokenizer]], token_id: int
) -> None:
    ours, _ = pairs["gpt2"]
    with pytest.raises(ValueError, match=rf"token id must be one of the 1200 of the vocabulary, got {token_id}"):
        ours.decode([5, token_id])


@patterns
@given(text=texts)
def test_offsets_and_tokens_equal_tokenizers(
    pairs: dict[str, tuple[ByteBPETokenizer, Tokenizer]], pattern: str, text: str
) -> None:
    ours, peer = pairs[pattern]
    theirs, encoding = peer.encode(text), ours.encode_with_offsets(text)
    assert encoding.ids == theirs.ids == ours.encode(text)
    assert encoding.tokens == theirs.tokens
    assert encoding.offsets == theirs.offsets
    assert encoding.word_ids == theirs.word_ids


def test_text_that_cannot_be_encoded_is_refused() -> None:
    tokenizer = ByteBPETokenizer.train([], 256)
    with pytest.raises(ValueError, match=r"lone surrogates, got '\\ud800' at index 2"):
        tokenizer.encode("ab\ud800")
    with pytest.raises(ValueError, match="lone surrogates"):
        ByteBPETokenizer.train(["\udfff"], 256)
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        tokenizer.encode(b"ab")  # type: ignore[arg-type]


def test_bad_arguments_of_train_are_refused() -> None:
    with pytest.raises(TypeError, match=r"texts must be an iterable of documents, got one str"):
        ByteBPETokenizer.train("one text", 300)
    with pytest.raises(ValueError, match=r"vocab_size must be from 257 \(256 bytes and 1 special tokens\) .*, got 256"):
        ByteBPETokenizer.train([], 256, special_tokens=["<|endoftext|>"])
    with pytest.raises(ValueError, match="to 1114112, got 2000000"):
        ByteBPETokenizer.train([], 2_000_000)
    with pytest.raises(TypeError, match="float"):
        ByteBPETokenizer.train([], 300.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pattern must be one of 'gpt2', 'gpt4', got 'bert'"):
        ByteBPETokenizer.train([], 300, pattern="bert")
    with pytest.raises(ValueError, match="min_frequency must be at least 1, got 0"):
        ByteBPETokenizer.train([], 300, min_frequency=0)
    for special, message in ((["a>", "a>"], "differ"), ([""], "not be empty"), (["é"], r"spells the token b'\\xe9'")):
        with pytest.raises(ValueError, match=message):
            ByteBPETokenizer.train([], 300, special_tokens=special)


def test_a_vocabulary_that_does_not_fit_together_is_refused() -> None:
    vocabulary = {bytes([byte]): byte for byte in range(256)}
    for changed, merges, special, message in (
        ({b"a": 98}, [], {}, "token 'b' has id 98, which belongs to 'a'"),
        ({b"ab": -1}, [], {}, "token 'ab' has id -1, which is not in 0 .. 1114111"),
        ({b"ab": 10**12}, [], {}, "has id 1000000000000, which is not in 0"),
        ({}, [], {"<s>": 0x110000}, "has id 1114112, which is not in 0"),
        ({}, [(b"a", b"b")], {}, r"merge \(b'a', b'b'\): b'ab' is not in the vocabulary"),
        ({}, [], {"<s>": 7}, "'<s>' has id 7"),
        ({}, [], {"Ā": 256}, "special token 'Ā' has id 256, but 0 as a token"),
        ({}, [], {"Ā": 0}, r"special token 'Ā' is how a tokenizer.json spells the token b'\\x00'"),
    ):
        with pytest.raises(ValueError, match=message):
            ByteBPETokenizer(vocabulary | changed, merges, special_tokens=special)
    with pytest.raises(ValueError, match="all 256 single bytes; missing: 0xff"):
        ByteBPETokenizer({bytes([byte]): byte for byte in range(255)}, [])
