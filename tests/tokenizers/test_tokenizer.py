"""What every kind of tokenizer promises, each kind trained on the same text and held against `tokenizers`."""

import json
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Peer

from minillm.data import TokenDataset, tokenizer_fingerprint
from minillm.tokenizers import (
    AddedToken,
    ByteBPETokenizer,
    CharacterTokenizer,
    Padding,
    SentencePieceTokenizer,
    Tokenizer,
    Truncation,
    UnigramTokenizer,
    WordPieceTokenizer,
    WordTokenizer,
    load_tokenizer,
)
from minillm.tokenizers.aligned_text import AlignedText
from minillm.tokenizers.loading import KINDS, train_tokenizer
from minillm.tokenizers.pieces import count_pieces

DOCUMENTS = [topics[name] for name in sorted(topics)][:12]
CLASSES = {
    "byte-bpe": ByteBPETokenizer,
    "wordpiece": WordPieceTokenizer,
    "unigram": UnigramTokenizer,
    "sentencepiece-bpe": SentencePieceTokenizer,
    "sentencepiece-unigram": SentencePieceTokenizer,
    "word": WordTokenizer,
    "character": CharacterTokenizer,
}
Loaded = dict[str, tuple[Tokenizer, Path]]
kinds = pytest.mark.parametrize("kind", list(CLASSES))
# Characters that have been in Unicode for long: no table differs on them.
texts = st.text(st.sampled_from("abc xyzE .,'\n\t12é日本語🙂े́ß—_()=▁") | st.characters(max_codepoint=0x24F), max_size=40)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """By kind: a tokenizer that was trained here."""
    return {kind: train_tokenizer(kind, DOCUMENTS, 600) for kind in CLASSES}


@pytest.fixture(scope="module")
def loaded(trained: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """By kind: the same, read from its tokenizer.json, and that file."""
    folder = tmp_path_factory.mktemp("kinds")
    out = {}
    for kind in CLASSES:
        trained[kind].save(folder / f"{kind}.json")
        out[kind] = load_tokenizer(folder / f"{kind}.json"), folder / f"{kind}.json"
    return out


def test_every_kind_is_here() -> None:
    assert list(KINDS) == list(CLASSES)
    with pytest.raises(ValueError, match=r"kind must be one of .*, got 'syllables'"):
        train_tokenizer("syllables", DOCUMENTS, 600)


@kinds
def test_a_file_is_read_by_the_class_that_can(kind: str, trained: dict[str, Tokenizer], loaded: Loaded) -> None:
    before, (after, _) = trained[kind], loaded[kind]
    assert after.special_tokens == before.special_tokens
    assert after.vocab_size == before.vocab_size
    if kind == "sentencepiece-unigram":
        # In a tokenizer.json a Unigram model is one and the same, whoever learned it. It is read in double precision, a
        # .model in single precision: of two segmentations that are equally likely, either may be the one.
        assert type(after) is UnigramTokenizer
        for document in DOCUMENTS:
            ids, others = before.encode(document), after.encode(document)
            assert after.decode(ids) == after.decode(others)
            assert abs(len(ids) - len(others)) <= 1
    else:
        assert type(after) is CLASSES[kind]
        assert after.encode_batch(DOCUMENTS) == before.encode_batch(DOCUMENTS)


@kinds
def test_documents_are_encoded_and_decoded_as_by_tokenizers(kind: str, loaded: Loaded) -> None:
    tokenizer, file = loaded[kind]
    peer = Peer.from_file(str(file))
    for document in DOCUMENTS:
        ids = tokenizer.encode(document)
        assert ids == peer.encode(document, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == peer.decode(ids, skip_special_tokens=False)


@kinds
@given(text=texts)
def test_offsets_are_of_the_same_tokens_and_of_the_text(loaded: Loaded, kind: str, text: str) -> None:
    tokenizer, _ = loaded[kind]
    encoding = tokenizer.encode_with_offsets(text)
    assert encoding.ids == tokenizer.encode(text)
    assert len(encoding.offsets) == len(encoding.tokens) == len(encoding)
    assert tokenizer.tokenize(text) == [tokenizer.id_to_token(i) for i in encoding.ids]
    end_before = 0
    for start, end in encoding.offsets:
        assert 0 <= start <= end <= len(text)
        assert end_before <= end
        end_before = end


@kinds
@given(text=texts, pair=st.none() | texts)
def test_what_a_model_is_fed_equals_tokenizers(loaded: Loaded, kind: str, text: str, pair: str | None) -> None:
    tokenizer, file = loaded[kind]
    mine, theirs = tokenizer.prepare(text, pair), Peer.from_file(str(file)).encode(text, pair)
    for column in ("ids", "type_ids", "special_tokens_mask", "attention_mask", "sequence_ids"):
        assert getattr(mine, column) == getattr(theirs, column), column
    # Of a Unigram's unknown token `tokenizers` shows what is unknown, of all others how the token is spelled.
    unknown = tokenizer.token_to_id("<unk>") if kind == "unigram" else None
    for i, token, other in zip(mine.ids, mine.tokens, theirs.tokens, strict=True):
        assert token == other or i == unknown


@kinds
def test_special_tokens_are_found_or_not_as_asked(kind: str, loaded: Loaded) -> None:
    tokenizer, _ = loaded[kind]
    text, i = next(iter(tokenizer.special_tokens.items()), (None, None))
    if text is None:
        assert kind in ("byte-bpe",)
        return
    assert tokenizer.token_to_id(text) == i
    assert i in tokenizer.encode(f"a{text}b")
    assert tokenizer.encode_with_offsets(f"a{text}b").offsets[tokenizer.encode(f"a{text}b").index(i)] == (
        1,
        1 + len(text),
    )
    ids = tokenizer.encode(f"a{text}b", allow_special=False)
    unknown = getattr(tokenizer, "unknown_token", None)
    assert i not in ids or text == unknown
    assert text not in tokenizer.decode([i], skip_special_tokens=True)


@kinds
def test_bad_input_is_refused_in_words(kind: str, loaded: Loaded, tmp_path: Path) -> None:
    tokenizer, _ = loaded[kind]
    with pytest.raises(ValueError, match=r"lone surrogates, got '\\ud800' at index 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match="lone surrogates"):
        tokenizer.encode_with_offsets("a\ud800")
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        tokenizer.encode(b"a")  # type: ignore[arg-type]
    for call in (tokenizer.encode_batch, tokenizer.prepare_batch):
        with pytest.raises(TypeError, match=r"texts must be an iterable of texts.*, got one str"):
            call("one text")
    for bad in (-1, tokenizer.vocab_size, 10**12):
        with pytest.raises(ValueError, match=f"token id must be one of the .* of the vocabulary, got {bad}"):
            tokenizer.decode([0, bad])
    with pytest.raises(TypeError):
        tokenizer.decode([1.5])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"texts must be an iterable of documents, got one str"):
        train_tokenizer(kind, "one text", 600)
    with pytest.raises(ValueError, match="lone surrogates"):
        train_tokenizer(kind, ["\udfff"], 600)
    too_small = 0 if kind in ("word", "character") else 3  # these two may leave words or characters out
    with pytest.raises(ValueError, match=rf"vocab_size .*, got {too_small}"):
        train_tokenizer(kind, DOCUMENTS, too_small)
    with pytest.raises(FileNotFoundError):
        type(tokenizer).load(tmp_path / "absent.json")


@kinds
@pytest.mark.parametrize("corpus", [[], [""], ["", " \n"]], ids=["nothing", "an empty text", "white space"])
def test_an_empty_corpus_is_refused_unless_bytes_are_enough(kind: str, corpus: list[str]) -> None:
    if kind == "byte-bpe":  # 256 bytes write every text
        assert train_tokenizer(kind, corpus, 600).encode("a") == [64]
    elif kind in ("wordpiece", "word") or not any(corpus):  # white space is what stands between their words
        with pytest.raises(ValueError, match="texts"):
            train_tokenizer(kind, corpus, 600)


@kinds
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    kind: str, loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, _ = loaded[kind]
    (tmp_path / "tokenizer.json").write_text("precious")

    def disk_full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="no space left"):
        tokenizer.save(tmp_path / "tokenizer.json")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["precious"]


@kinds
def test_ids_may_be_integers_of_any_kind(kind: str, loaded: Loaded) -> None:
    tokenizer, _ = loaded[kind]
    ids = tokenizer.encode("seven seas")
    assert tokenizer.decode(np.array(ids, dtype=np.uint16)) == tokenizer.decode(ids)


@kinds
def test_a_batch_is_cut_and_padded(kind: str, loaded: Loaded) -> None:
    _, file = loaded[kind]
    tokenizer = load_tokenizer(file)
    tokenizer.truncation = Truncation(9, stride=2)
    tokenizer.padding = Padding(pad_id=0, pad_token=tokenizer.id_to_token(0), multiple_of=4)
    peer = Peer.from_file(str(file))
    peer.enable_truncation(9, stride=2)
    peer.enable_padding(pad_id=0, pad_token=tokenizer.id_to_token(0), pad_to_multiple_of=4)
    batch = ["one", "", DOCUMENTS[0][:200], (DOCUMENTS[1][:60], DOCUMENTS[2][:80])]
    for mine, theirs in zip(tokenizer.prepare_batch(batch), peer.encode_batch(batch), strict=True):
        assert len(mine) == 12
        assert (mine.ids, mine.attention_mask) == (theirs.ids, theirs.attention_mask)
        assert [cut.ids for cut in mine.overflowing] == [cut.ids for cut in theirs.overflowing]
    assert len(tokenizer.prepare("one")) % 4 == 0
    tokenizer.save(file.with_suffix(".padded"))
    assert json.loads(file.with_suffix(".padded").read_text())["truncation"]["max_length"] == 9


def test_conflicting_tokens_are_refused() -> None:
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2}
    for special, message in (
        ({"[CLS]": 1}, r"token '\[CLS\]' has id 1, which belongs to 'a'"),
        ({"a": 2}, "token 'a' has id 2, which belongs to 'b'"),
        ({"a": 7}, "special token 'a' has id 7, but 1 as a token"),
        ([AddedToken("x", 5), AddedToken("y", 5)], "'x' and 'y' must not share the id 5"),
        ([AddedToken("x", 5), AddedToken("x", 6)], "'x' must be there once, got ids 5 and 6"),
        ({"x": 1114112}, "has id 1114112, which is not in 0 .. 1114111"),
    ):
        with pytest.raises(ValueError, match=message):
            WordPieceTokenizer(vocabulary, special_tokens=special)


def test_a_file_of_no_known_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content, message in (
        ({"model": {"type": "Syllables"}}, "model must be of type BPE, WordPiece, Unigram or WordLevel, got Syllables"),
        ({"model": None}, "got None"),
        ({}, "got None"),
        ({"model": {"type": ["BPE"]}}, "got None"),
    ):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message) as caught:
            load_tokenizer(path)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["sentencepiece-bpe", "sentencepiece-unigram"])
def test_a_model_file_is_read_too(kind: str, trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = trained[kind]
    assert isinstance(tokenizer, SentencePieceTokenizer)
    tokenizer.save_model_file(tmp_path / "its.model")
    assert load_tokenizer(tmp_path / "its.model").encode_batch(DOCUMENTS) == tokenizer.encode_batch(DOCUMENTS)
    (tmp_path / "its.model").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"its\.model"):
        load_tokenizer(tmp_path / "its.model")


def test_counting_reads_texts_one_by_one() -> None:
    class Text(str):
        alive = 0

        def __init__(self, _: str) -> None:
            Text.alive += 1
            assert Text.alive <= 3  # the one that was counted, its piece, and the next one

        def __del__(self) -> None:
            Text.alive -= 1

    counts = count_pieces((Text("a text") for _ in range(100)), None, None)
    assert counts == {"a text": 100}


def test_aligned_texts_must_fit_together() -> None:
    with pytest.raises(ValueError, match=r"equally long, got \(2, 1, 2\)"):
        AlignedText("ab", [0], [1, 2])
    with pytest.raises(ValueError, match="span must hold characters of a text of 2, got 1:1"):
        AlignedText.of("ab").span(1, 1)


@kinds
def test_shards_are_opened_with_the_tokenizer_that_was_read_back(kind: str, loaded: Loaded, tmp_path: Path) -> None:
    tokenizer, file = loaded[kind]
    TokenDataset.write(tmp_path / "data", DOCUMENTS, tokenizer, validation_fraction=0)
    again = load_tokenizer(file)
    data = TokenDataset(tmp_path / "data", context_length=8, batch_size=2, tokenizer=again)
    assert data.n_tokens == sum(map(len, tokenizer.encode_batch(DOCUMENTS)))


def test_fingerprints_tell_tokens_apart_that_decode_alike(trained: dict[str, Tokenizer], loaded: Loaded) -> None:
    one = UnigramTokenizer([("<unk>", 0.0), ("▁a", -1.0), ("a", -2.0), ("▁", -3.0)])
    other = UnigramTokenizer([("<unk>", 0.0), ("a", -2.0), ("▁a", -1.0), ("▁", -3.0)])
    assert tokenizer_fingerprint(one) != tokenizer_fingerprint(other)
    with_a_gap = WordPieceTokenizer({"[UNK]": 0, "a": 1}, special_tokens={"[END]": 9})
    assert tokenizer_fingerprint(with_a_gap) != tokenizer_fingerprint(WordPieceTokenizer({"[UNK]": 0, "a": 1}))
    for kind, (after, _) in loaded.items():
        assert tokenizer_fingerprint(trained[kind]) == tokenizer_fingerprint(after), kind


@kinds
def test_ids_of_added_tokens_are_the_same_in_both_libraries(kind: str, loaded: Loaded, tmp_path: Path) -> None:
    """Behind the vocabulary in any order and with gaps, special or not, a mixture as in ModernBERT's file."""
    _, file = loaded[kind]
    content = json.loads(file.read_text())
    n = loaded[kind][0].vocab_size
    for ids in ((n, n + 1, n + 2), (n + 1, n + 2, n), (n + 10, n + 3, n + 300)):
        for text, i, special in zip(("<one>", "<two>", "<three>"), ids, (False, True, False), strict=True):
            flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
            content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["content"] != text]
            content["added_tokens"].append({"id": i, "content": text} | flags)
        (tmp_path / "changed.json").write_text(json.dumps(content))
        (tmp_path / "saved.json").unlink(missing_ok=True)
        changed = load_tokenizer(tmp_path / "changed.json")
        ids_here = [changed.token_to_id(text) for text in ("<one>", "<two>", "<three>")]
        assert ids_here == list(ids)
        text = "<one> a <three><two>"
        found = [i for i in changed.encode(text) if i in ids]
        assert found == [ids[0], ids[2], ids[1]]
        if "unigram" in kind and max(ids) > n + 2:  # a Unigram's vocabulary is a list: no id can be left out
            with pytest.raises(ValueError, match=r"special tokens that are no pieces must have the ids from"):
                changed.save(tmp_path / "saved.json")
            assert not (tmp_path / "saved.json").exists()
        else:
            changed.save(tmp_path / "saved.json")
            peer = Peer.from_file(str(tmp_path / "saved.json"))
            assert peer.encode(text, add_special_tokens=False).ids == changed.encode(text)


@kinds
def test_ids_in_a_tensor_are_ids(kind: str, loaded: Loaded) -> None:
    tokenizer, _ = loaded[kind]
    special = list(tokenizer.special_tokens.values())[:1]
    ids = [*special, *tokenizer.encode("the seas")]
    for array in (np.array(ids), torch.tensor(ids)):
        assert tokenizer.decode(array, skip_special_tokens=True) == tokenizer.decode(ids, skip_special_tokens=True)
    with pytest.raises(TypeError):
        tokenizer.decode(np.array([[1.5]]))


def test_what_is_not_of_the_right_type_is_refused() -> None:
    vocabulary = {"[UNK]": 0, "a": 1}
    for arguments, message in (
        ({"pre_tokenizer": "x"}, r"pre_tokenizer must be None or a PreTokenizer such as Whitespace\(\), got 'x'"),
        ({"normalizer": "NFC"}, r"normalizer must be None or a Normalizer such as NFC\(\), got 'NFC'"),
        ({"special_tokens": ["<s>"]}, "special_tokens must be a mapping of texts to ids, or AddedTokens"),
        ({"special_tokens": "<s>"}, "special_tokens must be a mapping of texts to ids, or AddedTokens"),
    ):
        with pytest.raises(TypeError, match=message):
            WordTokenizer(vocabulary, **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pre_tokenizer must be None or a PreTokenizer"):
        WordTokenizer.train(DOCUMENTS, 100, pre_tokenizer="x")  # type: ignore[arg-type]
    for bad in ({"[UNK]": 0, 5: 1}, {"[UNK]": 0, "a": True}, {"[UNK]": 0, "a": 1.0}):
        with pytest.raises(TypeError):
            WordTokenizer(bad)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a token must not contain lone surrogates"):
        WordTokenizer({"[UNK]": 0, "\ud800": 1})
    with pytest.raises(TypeError, match="a token must be bytes, got 'a'"):
        ByteBPETokenizer({"a": 0}, [])  # type: ignore[dict-item]
    assert WordTokenizer({"[UNK]": np.int64(0)}).token_to_id("[UNK]") == 0


@kinds
def test_special_tokens_to_train_with_are_several(kind: str) -> None:
    with pytest.raises(TypeError, match="special_tokens must be a sequence of texts, got one str"):
        train_tokenizer(kind, DOCUMENTS, 600, special_tokens="abc")
