"""Word and character tokenizers, held against the WordLevel model and trainer of `tokenizers`."""

import json
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from minillm.tokenizers.character import CharacterTokenizer
from minillm.tokenizers.normalization import Lowercase
from minillm.tokenizers.pre_tokenization import Punctuation, WhitespaceSplit
from minillm.tokenizers.word import WordTokenizer
from minillm.tokenizers.word_level import WordLevelTokenizer

SPECIAL = ["[PAD]", "[UNK]", "<s>"]
documents = [topics[name] for name in sorted(topics)]
MIXED = "Où est l'été? 你好，世界。 Привет 👍🏽 1,000.50\t\u3000x\r\n"
fragments = st.sampled_from(
    [*SPECIAL, " ", "\n", "the", "é", "É", "中文", "👩\u200d💻", "'s", *documents[3][:200].split()]
)
texts = st.lists(st.one_of(fragments, st.text("aé中 \n.x\x00", max_size=4)), max_size=15).map("".join)
Pair = tuple[WordLevelTokenizer, Tokenizer]
KINDS = ["word", "character"]
kinds = pytest.mark.parametrize("kind", KINDS)


def peer_untrained(kind: str) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    if kind == "word":
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    return tokenizer


def train(kind: str, texts: list[str], vocab_size: int, min_frequency: int = 1) -> WordLevelTokenizer:
    cls = WordTokenizer if kind == "word" else CharacterTokenizer
    return cls.train(texts, vocab_size, special_tokens=SPECIAL, min_frequency=min_frequency)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Trained here on real text, and what `tokenizers` makes of the files."""
    folder = tmp_path_factory.mktemp("tokenizers")
    out = {}
    for kind, vocab_size in (("word", 1000), ("character", 90)):
        ours = train(kind, [*documents[:30], MIXED], vocab_size)
        ours.save(folder / kind)
        out[kind] = ours, Tokenizer.from_file(str(folder / kind))
    return out


@kinds
@given(st.lists(texts, min_size=1, max_size=4), st.integers(4, 40), st.integers(1, 3))
def test_the_vocabulary_is_that_of_tokenizers(kind: str, texts: list[str], vocab_size: int, min_frequency: int) -> None:
    peer = peer_untrained(kind)
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, special_tokens=SPECIAL, show_progress=False
    )
    peer.train_from_iterator([*texts, "x"], trainer)
    ours = train(kind, [*texts, "x"], vocab_size, min_frequency)
    assert {ours.id_to_token(i): i for i in range(ours.vocab_size)} == peer.get_vocab()


@kinds
def test_training_on_real_text_gives_the_file_of_tokenizers(kind: str, tmp_path: Path) -> None:
    peer = peer_untrained(kind)
    trainer = trainers.WordLevelTrainer(vocab_size=3000, special_tokens=SPECIAL, show_progress=False)
    peer.train_from_iterator([*documents, MIXED], trainer)
    train(kind, [*documents, MIXED], 3000).save(tmp_path / "ours.json")
    assert json.loads((tmp_path / "ours.json").read_text(encoding="utf-8")) == json.loads(peer.to_str())


@kinds
@given(text=texts)
def test_ids_tokens_and_offsets_equal_tokenizers(trained: dict[str, Pair], kind: str, text: str) -> None:
    ours, peer = trained[kind]
    theirs = peer.encode(text)
    encoding = ours.encode_with_offsets(text)
    assert ours.encode(text) == encoding.ids == theirs.ids
    assert encoding.offsets == theirs.offsets
    assert ours.decode(theirs.ids) == peer.decode(theirs.ids, skip_special_tokens=False)
    assert encoding.tokens == theirs.tokens
    assert encoding.word_ids == theirs.word_ids


@kinds
def test_their_file_loads_here(kind: str, tmp_path: Path) -> None:
    peer = peer_untrained(kind)
    trainer = trainers.WordLevelTrainer(vocab_size=60, special_tokens=["[UNK]"], show_progress=False)
    peer.train_from_iterator(documents[:5], trainer)
    peer.save(str(tmp_path / "theirs.json"))
    for cls in (WordTokenizer if kind == "word" else CharacterTokenizer, WordLevelTokenizer):
        ours = cls.load(tmp_path / "theirs.json")
        for text in [*documents[5:10], MIXED, "", "[UNK]"]:
            assert ours.encode(text) == peer.encode(text).ids
            assert ours.decode(ours.encode(text)) == peer.decode(ours.encode(text), skip_special_tokens=False)
        ours.save(tmp_path / "again.json")
        again = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
        assert again == json.loads(peer.to_str())


@given(st.lists(texts, min_size=1, max_size=4).filter(lambda some: any(text.split() for text in some)), texts)
def test_the_unknown_rate_counts_every_occurrence(some: list[str], text: str) -> None:
    tokenizer = WordTokenizer.train(some, 8, pre_tokenizer=WhitespaceSplit())
    held_out = [text, "unseen words", "x"]
    words = [word for piece in held_out for word, _ in pre_tokenizers.WhitespaceSplit().pre_tokenize_str(piece)]
    unknown = [word for word in words if tokenizer.token_to_id(word) is None]
    assert tokenizer.unknown_rate(held_out) == len(unknown) / len(words)


def test_new_text_has_unknown_words_but_hardly_unknown_characters() -> None:
    train_texts, new_texts = documents[::2], documents[1::2]
    rates = [WordTokenizer.train(train_texts, size).unknown_rate(new_texts) for size in (100, 1000, 10_000)]
    assert rates == sorted(rates, reverse=True)
    assert 0.02 < rates[-1] < 0.1
    characters = CharacterTokenizer.train(train_texts, 200)
    assert characters.unknown_rate(new_texts) < 0.001
    counts = Counter(characters.encode("\n".join(new_texts)))
    n_new = sum(map(len, new_texts))
    unknown = counts[characters.special_tokens["[UNK]"]]
    assert characters.unknown_rate(new_texts) == unknown / n_new


@given(st.lists(st.text(), min_size=1).filter(any))
def test_characters_decode_to_the_text(texts: list[str]) -> None:
    """Any text, with code points among it that no version of Unicode has yet."""
    tokenizer = CharacterTokenizer.train(texts, 10_000)
    assert tokenizer.unknown_rate(texts) == 0
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.encode_with_offsets(text).offsets == [(i, i + 1) for i in range(len(text))]


def test_what_trained_tokenizers_are() -> None:
    words = WordTokenizer.train(["the hug, the Hug", "a pug"], 6, normalizer=Lowercase(), pre_tokenizer=Punctuation())
    assert words.tokenize("the hug,x") == ["the hug", ",", "[UNK]"]
    words = WordTokenizer.train(["the hug, the pug"], 5, special_tokens=["[PAD]"])
    assert repr(words) == "WordTokenizer(vocab_size=5, special_tokens=['[UNK]', '[PAD]'])"
    assert [words.id_to_token(i) for i in range(5)] == ["[UNK]", "[PAD]", "the", ",", "hug"]
    assert words.decode(words.encode("the hug, the pug")) == "the hug , the [UNK]"
    characters = CharacterTokenizer.train(["Abba  b"], 4, normalizer=Lowercase(), unknown_token="?")
    assert [characters.id_to_token(i) for i in range(4)] == ["?", "b", " ", "a"]
    assert characters.encode("aB\n") == [3, 1, 0]
    assert CharacterTokenizer({"a": 0, "[UNK]": 1}).encode("aab") == [0, 0, 1]


@pytest.mark.parametrize("cls", [WordTokenizer, CharacterTokenizer])
def test_bad_arguments_are_refused(cls: type[WordTokenizer] | type[CharacterTokenizer]) -> None:
    with pytest.raises(ValueError, match=r"vocabulary must hold the unknown token '\[UNK\]'"):
        cls({"a": 0})
    with pytest.raises(ValueError, match=r"separator must be ' ' or '', got '-'"):
        WordTokenizer({"[UNK]": 0}, separator="-")
    for message, arguments in (
        (r"vocab_size must be from 3 \(2 special tokens and one other\) to 1114112, got 2", {"vocab_size": 2}),
        ("got 2000000", {"vocab_size": 2_000_000}),
        ("special_tokens must differ", {"special_tokens": ["a", "a"]}),
        ("min_frequency must be at least 1, got 0", {"min_frequency": 0}),
        ("texts must not be empty", {"texts": [""]}),
        ("lone surrogates", {"texts": ["\ud800"]}),
    ):
        with pytest.raises(ValueError, match=message):
            cls.train(**({"texts": ["a b"], "vocab_size": 9, "special_tokens": ["<s>"]} | arguments))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got one str"):
        cls.train("a b", 9)
    for name, value in (("vocab_size", 9.0), ("min_frequency", 1.5), ("min_frequency", True)):
        with pytest.raises(TypeError, match=f"{name} must be an integer, got {value}"):
            cls.train(["a b"], **({"vocab_size": 9} | {name: value}))  # type: ignore[arg-type]
    tokenizer = cls.train(["a b"], 9)
    with pytest.raises(ValueError, match="texts must not be empty"):
        tokenizer.unknown_rate([""])
    with pytest.raises(TypeError, match="got one str"):
        tokenizer.unknown_rate("a")


def test_bad_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    good = {"type": "WordLevel", "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "a": 1}}
    for change, message in (
        ({"model": None}, "model must be of type WordLevel, got None"),
        ({"model": good | {"type": "BPE"}}, "model must be of type WordLevel, got BPE"),
        ({"model": good | {"vocab": {"a": 0}}}, r"unknown token '\[UNK\]'"),
        ({"model": good | {"vocab": {"[UNK]": 0, "a": True}}}, "id of token 'a' must be an integer, got True"),
        ({"model": {"type": "WordLevel", "vocab": {}}}, "must have the option 'unk_token'"),
        ({"decoder": {"type": "WordPiece"}}, "decoder must be Fuse or null, got WordPiece"),
    ):
        path.write_text(json.dumps({"model": good, "decoder": None} | change), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            WordTokenizer.load(path)
    path.write_text(json.dumps({"model": good}), encoding="utf-8")
    assert WordTokenizer.load(path).encode("a") == [1]
    with pytest.raises(ValueError, match="pre_tokenizer must be Split at every character, and decoder Fuse"):
        CharacterTokenizer.load(path)
