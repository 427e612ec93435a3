"""Reading and writing tokenizer.json and GPT-2's files, with `tokenizers` and `transformers` as the judges."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from tokenizers import Encoding as PeerEncoding
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from minillm.tokenizers import ByteBPETokenizer
from minillm.tokenizers.byte_alphabet import BYTE_ALPHABET, spell, spells_itself, unspell
from minillm.tokenizers.encoding import Encoding
from minillm.tokenizers.split_patterns import SPLIT_PATTERNS

TEXT = "The quick brown fox, it's said, jumps over 12345 lazy dogs.\n\n  naïve 中文 👍🏽 <|endoftext|>"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    tokenizer = ByteBPETokenizer.train([TEXT] * 3, 300, pattern="gpt4", special_tokens=["<|endoftext|>"])
    tokenizer.save(tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


def test_the_byte_alphabet_is_gpt2s() -> None:
    alphabet = bytes_to_unicode()
    assert {byte: spell(bytes([byte])) for byte in range(256)} == alphabet
    assert (
        [spell(byte) for byte in BYTE_ALPHABET]
        == sorted(alphabet.values())
        == sorted(pre_tokenizers.ByteLevel.alphabet())
    )


@given(st.binary())
def test_spelling_can_be_undone(token: bytes) -> None:
    assert unspell(spell(token)) == token


def test_what_spells_a_token() -> None:
    assert unspell("a b") is None
    assert spells_itself("<|endoftext|>")
    assert not spells_itself("a b")
    assert not spells_itself("é")


@pytest.mark.parametrize("pattern", list(SPLIT_PATTERNS))
def test_saved_and_loaded_is_the_same(pattern: str, tmp_path: Path) -> None:
    tokenizer = ByteBPETokenizer.train([TEXT], 300, pattern=pattern, special_tokens=["<|endoftext|>", "<é>"])
    tokenizer.save(tmp_path / "one.json")
    loaded = ByteBPETokenizer.load(tmp_path / "one.json")
    loaded.save(str(tmp_path / "two.json"))
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    assert (loaded.pattern, loaded.merges, loaded.special_tokens) == (
        pattern,
        tokenizer.merges,
        tokenizer.special_tokens,
    )
    assert loaded.encode(TEXT) == tokenizer.encode(TEXT)


def test_transformers_reads_the_file(file: Path) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_file=str(file), clean_up_tokenization_spaces=False)
    ours = ByteBPETokenizer.load(file)
    assert fast(TEXT)["input_ids"] == ours.encode(TEXT)
    assert fast.decode(ours.encode(TEXT)) == TEXT


def test_a_failed_save_leaves_the_old_file_and_nothing_else(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()
    tokenizer = ByteBPETokenizer.train([TEXT], 280)

    def disk_full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="no space left"):
        tokenizer.save(file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


Change = Callable[[dict[str, Any]], object]


def test_equivalent_files_of_other_writers_are_read(file: Path) -> None:
    expected = ByteBPETokenizer.load(file).encode(TEXT)
    content = json.loads(file.read_text(encoding="utf-8"))
    changes: list[Change] = [
        lambda c: c["model"].update(merges=[" ".join(merge) for merge in c["model"]["merges"]]),
        lambda c: c["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed", invert=True),
        lambda c: [c["model"].pop(name) for name in ("type", "dropout", "byte_fallback", "ignore_merges")],
        lambda c: c.update(post_processor=c["decoder"] | {"trim_offsets": False}, decoder=None),
    ]
    for change in changes:
        changed = json.loads(json.dumps(content))
        change(changed)
        file.write_text(json.dumps(changed), encoding="utf-8")
        assert ByteBPETokenizer.load(file).encode(TEXT) == expected == Tokenizer.from_file(str(file)).encode(TEXT).ids


def step(n: int, **values: object) -> Change:
    return lambda c: c["pre_tokenizer"]["pretokenizers"][n].update(values)


def model(**values: object) -> Change:
    return lambda c: c["model"].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (model(type="WordPiece"), "model must be of type BPE, got WordPiece"),
        (lambda c: c.pop("model"), "model must be of type BPE, got None"),
        (model(vocab=[["a", -1.0]]), "model must have an object 'vocab'"),
        (model(merges=None), "and a list 'merges'"),
        (model(dropout=0.1), "model.dropout must be null, false or empty, got 0.1"),
        (model(byte_fallback=True), "model.byte_fallback"),
        (model(ignore_merges=[None]), r"model.ignore_merges must be true, false or null, got \[None\]"),
        (model(ignore_merges=0), "model.ignore_merges must be true, false or null, got 0"),
        (model(end_of_word_suffix="</w>"), "model.end_of_word_suffix"),
        (model(merges=[["a", "b", "c"]]), r"a merge must be two tokens, got \['a', 'b', 'c'\]"),
        (model(merges=["ab"]), "a merge must be two tokens, got 'ab'"),
        (model(merges=[["▁a", "b"]]), "token '▁a' has a character that is not in the byte-level alphabet"),
        (model(merges=[["z", "q"]]), r"merge \(b'z', b'q'\): b'zq' is not in the vocabulary"),
        (lambda c: c["model"]["vocab"].update({"▁the": 999}), "token '▁the' has a character"),
        (lambda c: c["model"]["vocab"].update({"zq": "999"}), "the id of token 'zq' must be an integer, got '999'"),
        (lambda c: c["model"]["vocab"].update({"zq": 5}), "has id 5, which belongs to"),
        (lambda c: c["model"]["vocab"].update({"<|endoftext|>": 999}), "'<|endoftext|>' has id 0, but 999 in the voc"),
        (lambda c: c["model"]["vocab"].pop("Ġ"), "all 256 single bytes; missing: 0x20"),
        (lambda c: c.update(normalizer={"type": "NFX"}), "NFX"),
        (lambda c: c.update(truncation={"max_length": 5}), "truncation: "),
        (lambda c: c.update(post_processor={"type": "TemplateProcessing"}), "TemplateProcessing"),
        (lambda c: c.update(decoder={"type": "Metaspace"}), "decoder must be null or ByteLevel, got Metaspace"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), r"pre_tokenizer must be .*, got \['Whitespace'\]"),
        (lambda c: c.update(pre_tokenizer=None), r"pre_tokenizer must be ByteLevel, .*, got \[None\]"),
        (lambda c: c["pre_tokenizer"].update(pretokenizers=None), r"pre_tokenizer must be .*, got \[\]"),
        (step(0, pattern={"Regex": r"\w+"}), r"one of the patterns .*, got '\\\\w\+'"),
        (step(0, pattern={"String": " "}), "one of the patterns .*, got None"),
        (step(0, pattern="abc"), "one of the patterns .*, got None"),
        (step(0, pattern={"Regex": ["abc"]}), r"one of the patterns .*, got \['abc'\]"),
        (step(0, behavior="MergedWithNext"), "must be Isolated and not inverted"),
        (step(1, use_regex=True), "use_regex true if it is alone, and false after Split"),
        (step(1, add_prefix_space=True), "add_prefix_space false"),
        (lambda c: c["added_tokens"][0].update(lstrip=1), "added token '<|endoftext|>': lstrip must be true or false"),
        (lambda c: c["added_tokens"][0].pop("id"), "an added token must be an object with 'content' and 'id'"),
        (lambda c: c["added_tokens"].append(c["added_tokens"][0] | {"id": 7}), "must be there once, got ids 0 and 7"),
        (lambda c: c["model"]["vocab"].update({"zq": 10**12}), "has id 1000000000000, which is not in 0 .. 1114111"),
        (lambda c: c.update(added_tokens=True), "added_tokens must be a list or null, got True"),
        (lambda c: c.update(added_tokens={}), "added_tokens must be a list or null, got {}"),
        (lambda c: c["pre_tokenizer"].update(pretokenizers=3), r"pre_tokenizer must be .*, got \[\]"),
        (lambda c: c.update(added_tokens=["<s>"]), "an added token must be .*, got '<s>'"),
    ],
)
def test_a_file_that_is_not_byte_level_bpe_is_refused_with_the_reason(file: Path, change: Change, message: str) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match=message.replace("|", r"\|")) as caught:
        ByteBPETokenizer.load(file)
    assert str(file) in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 300) | st.just(10**12) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["type", "id", "Regex"]), inner),
    max_leaves=4,
)


def read_or_refused(path: Path, content: object) -> ByteBPETokenizer | str:
    """The tokenizer, or the words of the ValueError; any other error is the test's."""
    path.write_text(json.dumps(content), encoding="utf-8")
    try:
        return ByteBPETokenizer.load(path)
    except ValueError as error:
        return str(error)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A place for a file, and the text of a valid one."""
    path = tmp_path_factory.mktemp("saved") / "tokenizer.json"
    ByteBPETokenizer.train([TEXT], 270, pattern="gpt4", special_tokens=["<|endoftext|>", "<|end|>"]).save(path)
    return path, path.read_text(encoding="utf-8")


@settings(max_examples=200)
@given(data=st.data())
def test_a_file_with_anything_anywhere_is_read_or_refused(saved: tuple[Path, str], data: st.DataObject) -> None:
    path, text = saved
    place = content = json.loads(text)
    key = data.draw(st.sampled_from(list(content)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.integers(0, 4)):
        place = place[key]
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(json_values)
    loaded = read_or_refused(path, content)
    if isinstance(loaded, str):
        assert loaded.startswith(str(path))
    else:  # a flag of an added token, or a template, may have changed what it does; it does it nevertheless
        assert loaded.decode(loaded.encode("the fox", allow_special=False)) == "the fox"
        assert loaded.prepare(TEXT).ids is not None


@given(
    added=st.dictionaries(st.text("abc", min_size=1, max_size=4), st.booleans(), min_size=1, max_size=3),
    text=st.text("abc ", max_size=12),
)
@example(added={"cab": True, "bac": False}, text="cabac")
@example(added={"ab": True, "cc": False}, text="ccabcc")
def test_added_tokens_normalized_or_not_are_found_as_in_tokenizers(
    saved: tuple[Path, str], added: dict[str, bool], text: str
) -> None:
    peer = Tokenizer.from_str(saved[1])
    peer.add_tokens([AddedToken(token, normalized=flag) for token, flag in added.items()])
    ours = read_or_refused(saved[0], json.loads(peer.to_str()))
    assert isinstance(ours, ByteBPETokenizer)
    assert ours.encode(text) == peer.encode(text).ids


def test_a_file_of_llama_3s_form_is_read_as_tokenizers_reads_it(file: Path) -> None:
    """GPT-4's pattern, a token that no merges lead to, a template, NFC, truncation, padding and every flag."""
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["Ġunmergeable"] = len(vocabulary)
    peer = Tokenizer.from_str(json.dumps(content | {"model": content["model"] | {"ignore_merges": True}}))
    peer.normalizer = normalizers.NFC()
    peer.add_special_tokens(["<|begin_of_text|>"])
    peer.add_tokens([AddedToken("<mask>", lstrip=True, special=True), AddedToken("Word", single_word=True)])
    begin = peer.token_to_id("<|begin_of_text|>")
    template = processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
        special_tokens=[("<|begin_of_text|>", begin)],
    )
    peer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    peer.enable_truncation(12, stride=2)
    peer.enable_padding(pad_id=begin, pad_token="<|begin_of_text|>", pad_to_multiple_of=4)
    peer.save(str(file))
    ours = ByteBPETokenizer.load(file)
    for saved_again in (False, True):
        if saved_again:
            ours.save(file)
            ours = ByteBPETokenizer.load(file)
        batch = [TEXT, "an unmergeable  <mask> é Word Words", "", ("the fox", "lazy dogs, 12345"), (TEXT, TEXT)]
        for mine, theirs in zip(ours.prepare_batch(batch), peer.encode_batch(batch), strict=True):
            assert_equal(mine, theirs)
        assert peer.token_to_id("Ġunmergeable") in ours.encode("an unmergeable")
        assert "Ġunmergeable" not in ByteBPETokenizer.train([TEXT], 300).tokenize("an unmergeable")


def assert_equal(mine: Encoding, theirs: PeerEncoding) -> None:
    columns = "ids tokens offsets type_ids special_tokens_mask attention_mask word_ids sequence_ids"
    # (`tokenizers` also hangs stretches below stretches; here all of them are in one list.)
    for one, other in [(mine, theirs), *zip(mine.overflowing, theirs.overflowing, strict=True)]:
        for column in columns.split():
            assert getattr(one, column) == getattr(other, column), column


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a JSON file"),
        (b"\xff\xfe", "not a JSON file"),
        (b"[" * 100_000, "not a JSON file"),
        (b"[]", "got list"),
    ],
)
def test_a_file_that_is_not_json_is_refused(file: Path, content: bytes, message: str) -> None:
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        ByteBPETokenizer.load(file)
    with pytest.raises(FileNotFoundError):
        ByteBPETokenizer.load(file.with_name("absent.json"))


def write_gpt2_files(folder: Path) -> tuple[Path, Path]:
    """Written by `tokenizers` itself, as GPT-2's were: the special token is not among the merges."""
    alphabet = [spell(byte) for byte in BYTE_ALPHABET]
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("#", "#"), ("##", "Ġ")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges), "<|endoftext|>"])}
    models.BPE(vocabulary, merges).save(str(folder))
    return folder / "vocab.json", folder / "merges.txt"


def test_gpt2_files_are_read_as_tokenizers_reads_them(tmp_path: Path) -> None:
    vocab, merges = write_gpt2_files(tmp_path)
    ours = ByteBPETokenizer.from_gpt2_files(vocab, merges)
    peer = Tokenizer(models.BPE.from_file(str(vocab), str(merges)))
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    peer.add_special_tokens(["<|endoftext|>"])
    text = "the other thing ## ### <|endoftext|>héhé"
    assert ours.encode(text) == peer.encode(text).ids
    assert ours.special_tokens == {"<|endoftext|>": 261}
    assert ours.pattern == "gpt2"
    more = ByteBPETokenizer.from_gpt2_files(vocab, merges, special_tokens=["<|endoftext|>", "<|pad|>", "<|é|>"])
    assert more.special_tokens == {"<|endoftext|>": 261, "<|pad|>": 262, "<|é|>": 263}


def test_broken_gpt2_files_are_refused(tmp_path: Path) -> None:
    vocab, merges = write_gpt2_files(tmp_path)
    good = merges.read_text(encoding="utf-8")
    merges.write_text(good + "a b c\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"merges.txt, line 7: a merge must be two tokens, got 'a b c'"):
        ByteBPETokenizer.from_gpt2_files(vocab, merges)
    merges.write_text(good + "q z\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"b'qz' is not in the vocabulary"):
        ByteBPETokenizer.from_gpt2_files(vocab, merges)
    vocab.write_text('{"▁a": 0}', encoding="utf-8")
    with pytest.raises(ValueError, match=r"vocab.json: token '▁a' has a character"):
        ByteBPETokenizer.from_gpt2_files(vocab, merges)
