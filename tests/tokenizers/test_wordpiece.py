"""The WordPiece tokenizer, held against `tokenizers` and BERT's tokenizer in `transformers`: ids, offsets, files."""

import json
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import transformers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import (
    BertWordPieceTokenizer,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from minillm.tokenizers.normalization import Lowercase
from minillm.tokenizers.pre_tokenization import WhitespaceSplit
from minillm.tokenizers.wordpiece import BERT_SPECIAL_TOKENS, WordPieceTokenizer, longest_match_first
from minillm.tokenizers.wordpiece_decoder import WordPieceDecoder

SPECIAL = list(BERT_SPECIAL_TOKENS)
documents = [topics[name] for name in sorted(topics)]
MULTILINGUAL = [
    "Der Häuptling aß Äpfel; l'été dernier, où étiez-vous? Ελληνικά και Σίσυφος. Привет, мир! İstanbul",
    "你好，世界。日本語のテキスト 한국어 텍스트 ภาษาไทย हिन्दी العربية עברית",
    "👍🏽 👩\u200d💻 🇩🇪 ½ ① ﬁ Å e\u0301 \u00adx 1,000.50 don't can't we've",
]
PARTS = ["a", "b", "aa", "ab", "ba", "aba", "bbb", "#", "##", "#a"]
JOINED = [
    "##a",
    "#",
    "it",
    " ",
    ".",
    "'",
    "n't",
    "'s",
    " ' ",
    "do not",
    " .",
    "?",
    ",",
    "'ve",
    "'m",
    "'re",
    "@a",
    "# b",
]
Pair = tuple[WordPieceTokenizer, Tokenizer]


# What Unicode 3.2 had is in everybody's tables, but for what became of three characters since.
CHANGED_SINCE = "\u1734\u1885\u1886"
KNOWN = [
    c
    for c in map(chr, range(0x30000))
    if unicodedata.ucd_3_2_0.category(c) not in ("Cn", "Cs") and c not in CHANGED_SINCE
]
characters = st.one_of(st.sampled_from(KNOWN), st.characters(max_codepoint=0x17F))
ODD = ["[CLS", "[mask]", " ", "\n", "\t", "\x00", "\u200b", "\ufffd", "\u3000", "##", "'s", "é", "É", "e\u0301", "中文"]
ODD += ["👩\u200d💻", "한국어", "\u1112\u1161\u11ab", "x" * 101, "ab" * 50, "ﬁ", "İ", "Σ"]
fragments = st.sampled_from([*SPECIAL, *ODD, *documents[3][:300].split(), *" ".join(MULTILINGUAL).split()])
texts = st.one_of(
    st.text(characters), st.lists(st.one_of(fragments, st.text(characters, max_size=5)), max_size=20).map("".join)
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    """Trained here on real text, uncased and cased, and what `tokenizers` makes of the files."""
    folder = tmp_path_factory.mktemp("tokenizers")
    out = {}
    for name, lowercase in (("uncased", True), ("cased", False)):
        ours = WordPieceTokenizer.train([*documents[:30], *MULTILINGUAL], 1500, lowercase=lowercase)
        ours.save(folder / name)
        out[name] = ours, Tokenizer.from_file(str(folder / name))
    return out


cases = pytest.mark.parametrize("case", ["uncased", "cased"])


@cases
@given(text=texts)
@example(text=" ".join(MULTILINGUAL))
def test_ids_tokens_and_offsets_equal_tokenizers_with_our_file(trained: dict[str, Pair], case: str, text: str) -> None:
    ours, peer = trained[case]
    theirs = peer.encode(text, add_special_tokens=False)
    encoding = ours.encode_with_offsets(text)
    assert ours.encode(text) == encoding.ids == theirs.ids
    assert ours.tokenize(text) == encoding.tokens == theirs.tokens
    assert encoding.offsets == theirs.offsets
    assert encoding.word_ids == theirs.word_ids
    assert ours.decode(theirs.ids) == peer.decode(theirs.ids, skip_special_tokens=False)
    assert ours.decode(theirs.ids, skip_special_tokens=True) == peer.decode(theirs.ids)


@cases
@given(text=texts, pair=texts)
def test_prepared_texts_and_pairs_equal_tokenizers(trained: dict[str, Pair], case: str, text: str, pair: str) -> None:
    ours, peer = trained[case]
    for given_texts in ((text,), (text, pair)):
        encoding, theirs = ours.prepare(*given_texts), peer.encode(*given_texts)
        assert encoding.ids == theirs.ids
        assert encoding.type_ids == theirs.type_ids
        assert encoding.offsets == theirs.offsets
        assert encoding.special_tokens_mask == theirs.special_tokens_mask


@pytest.fixture(scope="module")
def vocab_files(trained: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vocab")
    for case, (ours, _) in trained.items():
        tokens = [ours.id_to_token(i) for i in range(ours.vocab_size)]
        (folder / case).write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return {case: folder / case for case in trained}


@pytest.fixture(scope="module")
def bert(vocab_files: dict[str, Path]) -> dict[str, tuple[WordPieceTokenizer, transformers.BertTokenizer]]:
    """From the same vocab.txt: the tokenizer here, and that of `transformers`."""
    return {
        case: (
            WordPieceTokenizer.from_vocab_file(path, lowercase=case == "uncased"),
            transformers.BertTokenizer(str(path), do_lower_case=case == "uncased"),
        )
        for case, path in vocab_files.items()
    }


@cases
@given(text=texts, pair=texts)
def test_a_vocab_file_gives_the_ids_of_transformers(
    bert: dict[str, tuple[WordPieceTokenizer, transformers.BertTokenizer]], case: str, text: str, pair: str
) -> None:
    ours, peer = bert[case]
    second = pair or None  # to `transformers`, an empty second text is none
    encoding, theirs = ours.prepare(text, second), peer(text, second)
    assert encoding.ids == theirs["input_ids"]
    assert encoding.type_ids == theirs["token_type_ids"]
    assert encoding.attention_mask == theirs["attention_mask"]
    assert ours.decode(ours.encode(text)) == peer.decode(ours.encode(text))


@cases
def test_real_text_gives_the_ids_of_the_original_python_code(vocab_files: dict[str, Path], case: str) -> None:
    """The tokenizer of Google's release, which `transformers` keeps: written in Python, not with `tokenizers`."""
    ours = WordPieceTokenizer.from_vocab_file(vocab_files[case], lowercase=case == "uncased")
    peer = BertTokenizerLegacy(str(vocab_files[case]), do_lower_case=case == "uncased")
    composed = [
        unicodedata.normalize("NFC", text) for text in MULTILINGUAL
    ]  # which that code does before it lowers case
    for text in [*documents[30:38], *composed, "a [MASK] b[SEP]", "x" * 100 + " " + "x" * 101]:
        assert ours.prepare(text).ids == peer(text)["input_ids"]


@given(
    words=st.lists(st.text("ab#", min_size=1, max_size=9), min_size=1, max_size=6),
    vocabulary=st.sets(st.sampled_from([mark + token for mark in ("", "##") for token in PARTS]), max_size=20),
    max_word_length=st.integers(0, 9),
)
def test_longest_match_first_equals_tokenizers(words: list[str], vocabulary: set[str], max_word_length: int) -> None:
    ids = {token: i for i, token in enumerate(["[UNK]", *sorted(vocabulary)])}
    ours = WordPieceTokenizer(ids, max_word_length=max_word_length, pre_tokenizer=WhitespaceSplit())
    model = models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=max_word_length)
    peer = Tokenizer(model)
    peer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    theirs = peer.encode(" ".join(words))
    assert ours.encode(" ".join(words)) == theirs.ids
    assert ours.encode_with_offsets(" ".join(words)).offsets == theirs.offsets
    for word in words:
        tokens = longest_match_first(word, ids, longest=100)
        assert tokens == [token.value for token in model.tokenize(word)] or len(word) > max_word_length or not tokens
        assert "".join(tokens[:1] + [token[2:] for token in tokens[1:]]) in (word, "")


@given(
    st.lists(st.one_of(st.sampled_from(JOINED), st.text("ab #.'!", max_size=4)), max_size=12),
    st.booleans(),
    st.sampled_from(["##", "@", "# "]),
)
def test_tokens_are_joined_as_in_tokenizers(tokens: list[str], cleanup: bool, prefix: str) -> None:
    theirs = decoders.WordPiece(prefix=prefix, cleanup=cleanup)
    assert WordPieceDecoder(prefix, cleanup)(tokens) == theirs.decode(tokens)


@given(ids=st.lists(st.integers(0, 1499), max_size=30), skip=st.booleans())
def test_any_ids_decode_as_in_tokenizers(trained: dict[str, Pair], ids: list[int], skip: bool) -> None:
    ours, peer = trained["uncased"]
    assert ours.decode(ids, skip_special_tokens=skip) == peer.decode(ids, skip_special_tokens=skip)


def test_their_file_loads_here(tmp_path: Path) -> None:
    """One that is not BERT's in anything: prefix, unknown token, normalizer, pre-tokenizer, decoder."""
    peer = Tokenizer(models.WordPiece(unk_token="<unk>", max_input_chars_per_word=20))
    peer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    peer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>"], continuing_subword_prefix="@@", show_progress=False
    )
    peer.train_from_iterator(documents[:20], trainer)
    peer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    for decoder in (None, decoders.WordPiece(prefix="@@", cleanup=False)):
        if decoder:
            peer.decoder = decoder
        peer.save(str(tmp_path / "theirs.json"))
        ours = WordPieceTokenizer.load(tmp_path / "theirs.json")
        assert ours.continuing_prefix == "@@"
        assert ours.unknown_token == "<unk>"
        for text in [*documents[20:23], "", "<s>x<unk>", "naïve 中文 \u3000 👍🏽\r\n" + "y" * 21]:
            assert ours.prepare(text).ids == peer.encode(text).ids
            assert ours.prepare(text).offsets == peer.encode(text).offsets
            assert ours.decode(ours.encode(text)) == peer.decode(ours.encode(text), skip_special_tokens=False)
        ours.save(tmp_path / "again.json")
        again = json.loads((tmp_path / "again.json").read_text(encoding="utf-8"))
        assert again == json.loads(peer.to_str())


def test_training_by_frequency_gives_the_vocabulary_of_tokenizers() -> None:
    ours = WordPieceTokenizer.train(documents[:30], 1000, score="frequency")
    peer = BertWordPieceTokenizer(strip_accents=None)
    peer.train_from_iterator(documents[:30], 1000, min_frequency=1, special_tokens=SPECIAL, show_progress=False)
    theirs = peer.get_vocab()
    assert ours.vocab_size == len(theirs) == 1000
    assert ours.special_tokens == {token: i for i, token in enumerate(SPECIAL)}
    n_special_and_characters = sum(len(token) == 1 for token in theirs) + len(SPECIAL)
    for i in range(n_special_and_characters):
        assert theirs[ours.id_to_token(i)] == i
    assert sum(ours.token_to_id(token) is not None for token in theirs) > 950  # ties differ, at random


def test_what_a_trained_tokenizer_is() -> None:
    tokenizer = WordPieceTokenizer.train(["hug hugs pug", "puns! Hug 你"], 100)
    assert repr(tokenizer) == f"WordPieceTokenizer(vocab_size=25, special_tokens={SPECIAL})"
    assert tokenizer.tokenize("hugs, pug!") == ["hugs", "[UNK]", "pug", "!"]
    assert tokenizer.prepare("hug", "你").tokens == ["[CLS]", "hug", "[SEP]", "你", "[SEP]"]
    assert tokenizer.decode(tokenizer.encode("Hugs! 你")) == "hugs! 你"
    plain = WordPieceTokenizer.train(
        ["Hug hug"], 9, special_tokens=["<unk>"], unknown_token="<unk>", lowercase=False, continuing_prefix=""
    )
    assert plain.template is None
    assert plain.tokenize("Hug gu x") == ["Hug", "g", "u", "<unk>"]
    assert plain.decode(plain.encode("Hug gu")) == "Huggu"
    other = WordPieceTokenizer.train(["A-b a-B"], 20, normalizer=Lowercase(), pre_tokenizer=WhitespaceSplit())
    assert other.tokenize("A-B") == ["a-b"]


def test_long_words_are_unknown_and_cost_little() -> None:
    ids = {"[UNK]": 0, "a": 1, "##a": 2}
    tokenizer = WordPieceTokenizer(ids, pre_tokenizer=WhitespaceSplit())
    assert tokenizer.encode("a" * 100) == [1] + [2] * 99
    assert tokenizer.encode("a" * 101) == [0]
    assert tokenizer.encode_with_offsets("a " + "a" * 1_000_000).offsets == [(0, 1), (2, 1_000_002)]


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match=r"vocabulary must hold the unknown token '\[UNK\]'"):
        WordPieceTokenizer({"a": 0})
    with pytest.raises(ValueError, match="max_word_length must be at least 0, got -1"):
        WordPieceTokenizer({"[UNK]": 0}, max_word_length=-1)
    for message, arguments in (
        (r"special_tokens must hold the unknown token '\[UNK\]', got \['a'\]", {"special_tokens": ["a"]}),
        ("special_tokens must differ", {"special_tokens": ["[UNK]", "a", "a"]}),
        ("lowercase=False is for BERT's normalizer", {"lowercase": False, "normalizer": Lowercase()}),
        ("at least one word to learn from, got none", {"texts": [" ", ""]}),
        (r"vocab_size must be from 8 \(5 special tokens and an alphabet of 3\) to 1114112, got 7", {"vocab_size": 7}),
        ("lone surrogates", {"texts": ["\ud800"]}),
    ):
        with pytest.raises(ValueError, match=message):
            WordPieceTokenizer.train(**({"texts": ["ab"], "vocab_size": 20} | arguments))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got one str"):
        WordPieceTokenizer.train("ab", 20)


def test_bad_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    for content, message in (("[UNK]\na\na\n", "token 'a' must be there once, is in lines 2 and 3"), ("a\n", "UNK")):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message) as error:
            WordPieceTokenizer.from_vocab_file(path)
        assert str(path) in str(error.value)
    good = {"type": "WordPiece", "unk_token": "[UNK]", "vocab": {"[UNK]": 0, "a": 1}}
    for change, message in (
        ({"model": None}, "model must be of type WordPiece, got None"),
        ({"model": good | {"type": "BPE"}}, "model must be of type WordPiece, got BPE"),
        ({"model": good | {"vocab": []}}, "'vocab' of WordPiece has a value that is not supported"),
        ({"model": good | {"vocab": {"a": 0}}}, r"unknown token '\[UNK\]'"),
        ({"model": good | {"vocab": {"[UNK]": 0, "a": "b"}}}, "id of token 'a' must be an integer, got 'b'"),
        ({"model": good | {"vocab": {"[UNK]": 0, "a": 0}}}, "'a' has id 0, which belongs to"),
        ({"model": good | {"max_input_chars_per_word": "many"}}, "max_input_chars_per_word"),
        ({"decoder": {"type": "ByteLevel"}}, "decoder must be WordPiece or null, got ByteLevel"),
        ({"decoder": {"type": "WordPiece", "cleanup": 3}}, "'cleanup'"),
    ):
        path.write_text(json.dumps({"model": good, "decoder": None} | change), encoding="utf-8")
        with pytest.raises(ValueError, match=message) as error:
            WordPieceTokenizer.load(path)
        assert str(path) in str(error.value)
