"""The Unigram tokenizer, held against the `tokenizers` library: ids, offsets, decoding, each other's files."""

import json
import math
import random
from collections import Counter
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import regex
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from minillm.data import load_corpus
from minillm.tokenizers.metaspace import Metaspace
from minillm.tokenizers.normalization import NFKC, Lowercase, NormalizerSequence
from minillm.tokenizers.pre_tokenization import Whitespace
from minillm.tokenizers.unigram import BYTE_PIECES, UnigramTokenizer

SPECIAL = ["<unk>", "<pad>", "</s>"]


@cache
def known(character: str) -> bool:
    """Whether the tables of both engines have it."""
    peer = pre_tokenizers.Split(Regex(r"\p{Cn}"), "removed")
    return not regex.match(r"\p{Cn}", character) and bool(peer.pre_tokenize_str(character))


characters = st.characters(exclude_categories=["Cs", "Cn"]).filter(known)
fragments = st.sampled_from(
    [
        *SPECIAL,
        *BYTE_PIECES[:3],
        "<unk",
        "▁",
        " ",
        "  ",
        "\n",
        "the ",
        " function",
        "é",
        "中文",
        "👩\u200d💻",
        "ing",
        "Ｆｕll",
    ]
)
texts = st.one_of(
    st.text(characters), st.lists(st.one_of(fragments, st.text(characters, max_size=5)), max_size=20).map("".join)
)


@cache
def documents() -> list[str]:
    text = "".join(load_corpus("python-docs"))
    return [text[start : start + 5_000] for start in range(0, 24_000, 3_000)]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bytes": {"byte_fallback": True},
    "normalized": {
        "normalizer": NormalizerSequence([NFKC(), Lowercase()]),
        "pre_tokenizer": Metaspace(prepend_scheme="first"),
    },
    "whole": {"pre_tokenizer": Metaspace("_", "never", split=False), "byte_fallback": True},
    "words": {"pre_tokenizer": Whitespace()},
    "raw": {"pre_tokenizer": None},
}
kinds = pytest.mark.parametrize("name", KINDS)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[UnigramTokenizer, Tokenizer]]:
    """By kind: a tokenizer trained here, and the one `tokenizers` makes of its file."""
    folder = tmp_path_factory.mktemp("unigram")
    out = {}
    for name, options in KINDS.items():
        ours = UnigramTokenizer.train(documents()[:4], 600, special_tokens=SPECIAL, **options)
        ours.save(folder / name)
        out[name] = ours, Tokenizer.from_file(str(folder / name))
    return out


Pairs = dict[str, tuple[UnigramTokenizer, Tokenizer]]


@kinds
@settings(max_examples=40)
@given(text=texts)
def test_ids_tokens_and_offsets_equal_tokenizers(pairs: Pairs, name: str, text: str) -> None:
    ours, peer = pairs[name]
    expected = peer.encode(text)
    assert ours.encode(text) == expected.ids
    found = ours.encode_with_offsets(text)
    assert found.ids == expected.ids
    assert found.offsets == expected.offsets
    # Of an unknown token, `tokenizers` shows the text; here it has the name that it has in the vocabulary.
    assert found.tokens == [
        token if i != ours.token_to_id("<unk>") else "<unk>"
        for token, i in zip(expected.tokens, expected.ids, strict=True)
    ]


@kinds
@settings(max_examples=40)
@given(text=texts)
def test_decoding_equals_tokenizers(pairs: Pairs, name: str, text: str) -> None:
    ours, peer = pairs[name]
    ids = peer.encode(text).ids
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == peer.decode(ids, skip_special_tokens=skip)


@kinds
@settings(max_examples=25)
@given(ids=st.lists(st.integers(0, 599), max_size=12))
def test_any_ids_are_decoded_as_tokenizers_does(pairs: Pairs, name: str, ids: list[int]) -> None:
    ours, peer = pairs[name]
    ids = [i for i in ids if i < ours.vocab_size]
    assert ours.decode(ids) == peer.decode(ids, skip_special_tokens=False)


@given(texts)
def test_with_bytes_every_text_comes_back(pairs: Pairs, text: str) -> None:
    assume("<0x" not in text)  # the spelling of a byte piece is that piece, here as in `tokenizers`
    ours = pairs["bytes"][0]
    ids = ours.encode(text, allow_special=False)
    # Metaspace takes one space, or symbol, at the start away, and makes symbols spaces.
    assert ours.decode(ids) == text.replace("▁", " ").removeprefix(" ")
    assert ours.token_to_id("<unk>") not in ids or "<unk>" in text


@kinds
def test_files_go_both_ways(pairs: Pairs, name: str, tmp_path: Path) -> None:
    ours, peer = pairs[name]
    peer.save(str(tmp_path / "peer.json"))
    loaded = UnigramTokenizer.load(tmp_path / "peer.json")
    assert loaded.scores == ours.scores
    text = documents()[5] + "é <pad> 中文"
    assert loaded.encode_with_offsets(text) == ours.encode_with_offsets(text)
    assert loaded.decode(loaded.encode(text)) == ours.decode(ours.encode(text))
    loaded.save(tmp_path / "ours.json")
    ours.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "ours.json").read_text()) == json.loads((tmp_path / "again.json").read_text())


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_a_file_of_tokenizers_is_read(tmp_path: Path, byte_fallback: bool) -> None:
    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.NFKC()
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<pad>", *(BYTE_PIECES if byte_fallback else ())]
    trainer = trainers.UnigramTrainer(vocab_size=700, special_tokens=special, unk_token="<unk>", show_progress=False)
    trained.train_from_iterator(documents()[:2], trainer)
    content = json.loads(trained.to_str())["model"]
    peer = Tokenizer(models.Unigram([tuple(entry) for entry in content["vocab"]], content["unk_id"], byte_fallback))
    peer.normalizer, peer.pre_tokenizer = trained.normalizer, trained.pre_tokenizer
    peer.decoder = decoders.Metaspace()
    peer.save(str(tmp_path / "peer.json"))
    ours = UnigramTokenizer.load(tmp_path / "peer.json")
    assert ours.byte_fallback == byte_fallback
    for text in [*documents()[2:6], "Ünknown 中文 中 <pad> <unk>中 x\n y  ", "", " ", "a"]:
        expected = peer.encode(text)
        found = ours.encode_with_offsets(text)
        assert (found.ids, found.offsets) == (expected.ids, expected.offsets)
        assert ours.decode(found.ids) == peer.decode(found.ids, skip_special_tokens=False)


# Pieces that spell the unknown token, bytes and each other: what is fused and what falls back shows.
small = st.dictionaries(
    st.sampled_from(["a", "b", "ab", "ba", "aab", "<", "u", "unk", ">", "xy", "x", "中", "▁", "▁a", "0", "<0", "A0>"]),
    st.integers(-9, 0).map(float),
)


@given(small, st.booleans(), st.lists(st.sampled_from([*"abxy<中é ", "<unk>", "<0xC3>", "xy"]), max_size=12))
def test_any_vocabulary_encodes_as_in_tokenizers(
    vocabulary: dict[str, float], byte_fallback: bool, parts: list[str]
) -> None:
    pieces = [("<unk>", 0.0), *((piece, -3.0) for piece in BYTE_PIECES), *vocabulary.items()]
    ours = UnigramTokenizer(pieces, byte_fallback=byte_fallback)
    peer = Tokenizer(models.Unigram(pieces, 0, byte_fallback))
    peer.pre_tokenizer = pre_tokenizers.Metaspace()
    text = "".join(parts)
    expected = peer.encode(text)
    found = ours.encode_with_offsets(text)
    assert ours.encode(text) == found.ids == expected.ids
    assert found.offsets == expected.offsets


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_a_long_unknown_stretch_is_looked_up_once(monkeypatch: pytest.MonkeyPatch, byte_fallback: bool) -> None:
    pieces = [("<unk>", 0.0), *((piece, -3.0) for piece in BYTE_PIECES), ("▁", -1.0), ("a", -1.0)]
    ours = UnigramTokenizer(pieces, byte_fallback=byte_fallback)
    peer = Tokenizer(models.Unigram(pieces, 0, byte_fallback))
    peer.pre_tokenizer = pre_tokenizers.Metaspace()
    looked_up = 0
    ids_of = ours._ids_of

    def counted(token: str) -> list[int]:
        nonlocal looked_up
        looked_up += len(token)
        return ids_of(token)

    monkeypatch.setattr(ours, "_ids_of", counted)
    for text in ("\0" * 5_000, "é\0中" * 2_000 + "a", ("x" * 700 + "a") * 5):
        looked_up = 0
        ids = ours.encode(text)
        assert looked_up == len("▁" + text)
        found = ours.encode_with_offsets(text)
        expected = peer.encode(text)
        assert ids == found.ids == expected.ids
        assert found.offsets == expected.offsets


@given(st.lists(st.sampled_from([*"abc d", "<pad>"]), max_size=7).map("".join), st.integers(1, 60))
def test_n_best_are_the_n_best_of_all(text: str, n: int) -> None:
    pieces = [("<unk>", 0.0), ("<pad>", 0.0), ("▁", -1.0), ("a", -1.5), ("b", -2.5), ("ab", -3.2), ("▁a", -2.1)]
    pieces += [("ba", -3.3), ("aba", -4.0), ("c", -4.1), ("▁ab", -5.0)]
    tokenizer = UnigramTokenizer(pieces, special_tokens={"<pad>": 1})
    scores = dict(pieces)
    unknown = min(scores.values()) - 10
    everything = [([], 0.0)]
    cut = [part for part in regex.split("(<pad>)", text) if part]
    words = [word for part in cut for word in (["<pad>"] if part == "<pad>" else next(Metaspace().split(part)))]
    for word in words:
        ways = []
        for cuts in product([False, True], repeat=len(word) - 1):
            spelled = "".join(c + "\0" * cut for c, cut in zip(word, [*cuts, False], strict=True)).split("\0")
            score = (
                0.0 if word == "<pad>" else sum(scores.get(p, unknown if len(p) == 1 else -math.inf) for p in spelled)
            )
            if (word == "<pad>") == (spelled == ["<pad>"]) and score > -math.inf:
                ways.append((spelled, score))
        everything = [(spelled + way, a + b) for spelled, a in everything for way, b in ways]
    found = tokenizer.n_best_encode(text, n)
    expected = sorted((score for _, score in everything), reverse=True)[:n]
    assert [score for _, score in found] == pytest.approx(expected)
    assert found[0][0] == tokenizer.encode(text)
    id_of = {piece: i for i, (piece, _) in enumerate(pieces)}
    known = {tuple(id_of.get(piece, 0) for piece in spelled): score for spelled, score in everything}
    if "d" not in text:
        assert {tuple(ids): score for ids, score in found} == pytest.approx(
            {tuple(ids): known[tuple(ids)] for ids, _ in found}
        )
        assert len({tuple(ids) for ids, _ in found}) == len(found)


def test_samples_are_segmentations_as_often_as_they_are_likely(pairs: Pairs) -> None:
    ours = pairs["plain"][0]
    text = "the functions <pad> is"
    paths = ours.n_best_encode(text, 100_000)
    for alpha in (0.3, 1.0):
        rng = np.random.default_rng(1)
        drawn = Counter(tuple(ours.sample_encode(text, rng, alpha=alpha)) for _ in range(2000))
        weights = {tuple(ids): math.exp(alpha * (score - paths[0][1])) for ids, score in paths}
        total = sum(weights.values())
        for ids, _ in paths[:5]:
            expected = weights[tuple(ids)] / total
            assert drawn[tuple(ids)] / 2000 == pytest.approx(expected, abs=5 * (expected / 2000) ** 0.5 + 1e-3)
        assert all(ours.decode(ids) == ours.decode(ours.encode(text)) for ids in drawn)
    assert ours.sample_encode(text, random.Random(0), alpha=1e9) == ours.encode(text)
    assert ours.sample_encode("", random.Random(0), alpha=1.0) == []
    assert ours.n_best_encode("", 3) == [([], 0.0)]


def test_special_tokens_are_text_if_not_allowed(pairs: Pairs) -> None:
    ours = pairs["plain"][0]
    pad = ours.special_tokens["<pad>"]
    assert pad in ours.encode("a<pad>")
    ids = ours.encode("a<pad>", allow_special=False)
    assert [ids] == [ids for ids, _ in ours.n_best_encode("a<pad>", 1, allow_special=False)]
    assert ours.sample_encode("a<pad>", random.Random(0), alpha=1e9, allow_special=False) == ids


def test_training_gives_the_vocabulary_that_was_asked_for() -> None:
    tokenizer = UnigramTokenizer.train(documents()[:3], 900, special_tokens=SPECIAL, byte_fallback=True)
    assert tokenizer.vocab_size == 900
    assert [tokenizer.id_to_token(i) for i in (0, 1, 2, 3, 258)] == [*SPECIAL, "<0x00>", "<0xFF>"]
    assert set("".join(documents()[:3])) - {" "} <= set(tokenizer.scores)
    assert tokenizer.special_tokens == {"<unk>": 0, "<pad>": 1, "</s>": 2}
    # A special token in the texts is not learned from.
    tokenizer = UnigramTokenizer.train(["ab<unk>ab<unk>ab <unk>", "<unk>cd"], 50)
    assert set(tokenizer.scores) == {"<unk>", "▁", "a", "b", "c", "d", "ab"} | (set(tokenizer.scores) & {"▁ab"})
    # Without `split_by_script`, a piece may mix letters and digits.
    mixed = UnigramTokenizer.train(["abc123"] * 5, 30, split_by_script=False)
    assert "▁abc123" in mixed.scores
    assert "▁abc123" not in UnigramTokenizer.train(["abc123"] * 5, 30).scores


def test_texts_are_read_one_by_one_and_the_same_each_time() -> None:
    text = documents()[0]
    assert UnigramTokenizer.train(iter([text]), 300).scores == UnigramTokenizer.train([text], 300).scores


@pytest.mark.parametrize(
    ("pieces", "options", "message"),
    [
        ([], {}, "unknown token '<unk>'"),
        ([], {"unknown_token": None}, "at least one piece"),
        (
            [("<unk>", 0.0), ("a", -1.0), ("a", -2.0)],
            {},
            "pieces must differ, got 'a' twice, the second time with id 2",
        ),
        ([("<unk>", 0.0), ("a", 0.5)], {}, "'a' has 0.5"),
        ([("<unk>", 0.0), ("a", -math.inf)], {}, "finite and <= 0: 'a' has -inf"),
        ([("<unk>", 0.0), ("a", math.nan)], {}, "'a' has nan"),
        ([("<unk>", 0.0), ("", -1.0)], {}, "piece must not be empty"),
        ([("a", -1.0)], {}, "pieces must hold the unknown token '<unk>'"),
        ([("<unk>", 0.0), ("<0x00>", 0.0)], {"byte_fallback": True}, "missing: <0x01>, "),
        ([("<unk>", 0.0)], {"special_tokens": {"<unk>": 3}}, "'<unk>' has id 3"),
    ],
)
def test_unusable_vocabularies_are_refused(
    pieces: list[tuple[str, float]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=regex.escape(message)):
        UnigramTokenizer(pieces, **options)


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        ("abc", {}, TypeError, "one str"),
        (["a", 3], {}, TypeError, "must be a str, got int"),
        ([], {}, ValueError, "empty corpus"),
        (["", ""], {}, ValueError, "empty corpus"),
        (["a\ud800"], {}, ValueError, "lone surrogates"),
        (["abcdef"], {"vocab_size": 7}, ValueError, "from 8 (7 different characters, 1 special tokens and bytes) to"),
        (
            ["abc"],
            {"byte_fallback": True},
            ValueError,
            "from 261 (4 different characters, 257 special tokens and bytes)",
        ),
        (["abc"], {"vocab_size": 1 << 21}, ValueError, "got 2097152"),
        (["abc"], {"special_tokens": ["<pad>"]}, ValueError, "must hold the unknown token '<unk>'"),
        (["abc"], {"special_tokens": ["<unk>", "<unk>"]}, ValueError, "must differ"),
        (["abc"], {"shrinking_factor": 0.0}, ValueError, "shrinking_factor"),
    ],
)
def test_unusable_training_arguments_are_refused(
    texts: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=regex.escape(message)):
        UnigramTokenizer.train(texts, **{"vocab_size": 100, **options})


def test_unusable_arguments_are_refused(pairs: Pairs) -> None:
    ours = pairs["plain"][0]
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        ours.n_best_encode("a", 0)
    for alpha in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="alpha must be a finite number"):
            ours.sample_encode("", random.Random(0), alpha=alpha)
    with pytest.raises(ValueError, match="lone surrogates"):
        ours.n_best_encode("\ud800", 1)
    with pytest.raises(ValueError, match="token id"):
        ours.decode([600])


def test_without_an_unknown_token_unknown_characters_are_refused() -> None:
    pieces = [*((piece, -3.0) for piece in BYTE_PIECES), ("▁", -1.0), ("a", -1.0)]
    for byte_fallback in (False, True):
        ours = UnigramTokenizer(pieces, unknown_token=None, byte_fallback=byte_fallback)
        peer = Tokenizer(models.Unigram(pieces, None, byte_fallback))
        peer.pre_tokenizer = pre_tokenizers.Metaspace()
        assert ours.encode("aa a") == peer.encode("aa a").ids
        with pytest.raises(Exception, match="unk_id"):
            peer.encode("ab")
        with pytest.raises(ValueError, match="no unknown token, got 'b'"):
            ours.encode("ab")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "BPE"}}, "model must be of type Unigram, got BPE"),
        ({"model": None}, "model must be of type Unigram, got None"),
        ({"model": {"type": "Unigram", "vocab": [["a"]]}}, "a piece and its score"),
        ({"model": {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 1}}, "from 0 to 0, got 1"),
        ({"model": {"type": "Unigram", "vocab": [["a", -1.0]], "fuse": 1}}, "'fuse'"),
        ({"model": {"type": "Unigram", "vocab": [["a", 1.0]]}}, "'a' has 1.0"),
        ({"decoder": {"type": "CTC"}}, "CTC"),
    ],
)
def test_files_that_are_something_else_are_refused(
    pairs: Pairs, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    pairs["plain"][0].save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=regex.escape(message)):
        UnigramTokenizer.load(tmp_path / "tokenizer.json")
