"""SentencePiece's model files, held against the `sentencepiece` library: each reads what the other has written."""

import io
import random
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import sentencepiece

from minillm.tokenizers.sentencepiece_model import BYTE_PIECES, Piece, PieceType, SentencePieceModel

SMALL = (
    Piece("<unk>", 0.0, PieceType.UNKNOWN),
    Piece("<s>", 0.0, PieceType.CONTROL),
    Piece("</s>", 0.0, PieceType.CONTROL),
    Piece("▁", -1.0),
    Piece("a", -2.0),
    Piece("b", -2.5),
)


def trained(**options: Any) -> bytes:
    """A model file that the library has made."""
    lines = [line for name in sorted(topics)[:20] for line in topics[name].split("\n") if line]
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=file, num_threads=1, minloglevel=2, **{"vocab_size": 600} | options
    )
    return file.getvalue()


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf"},
        {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "pad_id": 3},
        {"model_type": "bpe", "add_dummy_prefix": False, "remove_extra_whitespaces": False, "unk_surface": "?"},
        {"treat_whitespace_as_suffix": True, "control_symbols": ["<c>"], "user_defined_symbols": ["<u>"], "bos_id": -1},
    ],
)
def test_what_the_library_has_written_is_read_and_written_again(options: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "theirs.model").write_bytes(trained(**options))
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "theirs.model"))
    model = SentencePieceModel.load(tmp_path / "theirs.model")
    ids = range(len(model.pieces))
    assert [piece.text for piece in model.pieces] == theirs.id_to_piece(list(ids))
    assert [piece.score for piece in model.pieces] == theirs.get_score(list(ids))
    assert model.ids_of(PieceType.CONTROL) == [i for i in ids if theirs.is_control(i)]
    assert model.ids_of(PieceType.BYTE) == [i for i in ids if theirs.is_byte(i)]
    special = [-1 if i is None else i for i in (model.unk_id, model.bos_id, model.eos_id, model.pad_id)]
    assert special == [theirs.unk_id(), theirs.bos_id(), theirs.eos_id(), theirs.pad_id()]
    assert model.algorithm == options.get("model_type", "unigram")
    assert model.normalizer_name == options.get("normalization_rule_name", "nmt_nfkc")
    assert bool(model.character_map) == (model.normalizer_name != "identity")
    assert model.byte_fallback == options.get("byte_fallback", False)
    assert model.add_dummy_prefix == options.get("add_dummy_prefix", True)
    assert model.remove_extra_whitespaces == options.get("remove_extra_whitespaces", True)
    assert model.treat_whitespace_as_suffix == options.get("treat_whitespace_as_suffix", False)
    assert model.unk_surface == options.get("unk_surface", " \u2047 ")

    model.save(tmp_path / "ours.model")
    assert SentencePieceModel.load(tmp_path / "ours.model") == model
    ours = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "ours.model"))
    for text in ("The ﬁrst  line, <u> and  é\u0301 中文", " a b ", "<s>x</s>"):
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))


def test_a_denormalizer_is_kept(tmp_path: Path) -> None:
    model = SentencePieceModel(SMALL, denormalizer=b"map", character_map=b"other", pad_piece="<p>")
    model.save(tmp_path / "m.model")
    assert SentencePieceModel.load(tmp_path / "m.model") == model


def test_files_that_are_no_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.model"
    SentencePieceModel(SMALL).save(path)
    whole = path.read_bytes()
    for content, message in (
        (b"", "it holds no pieces"),
        (b"\xff" * 20, "not a SentencePiece model"),
        (whole[:-1], "not a SentencePiece model"),
        (trained(model_type="char"), r"model_type must be one of .* \(unigram, bpe\), got 4"),
        (whole.replace("▁".encode(), b"\xe2\x96a"), "utf-8"),
        (whole.replace(b"\x0a\x01a", b"\x0a\x01b"), "pieces 4 and 5 are both spelled 'b'"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"m\.model: .*{message}"):
            SentencePieceModel.load(path)
    with pytest.raises(FileNotFoundError):
        SentencePieceModel.load(tmp_path / "none")


def test_damaged_files_never_do_more_than_raise_a_value_error(tmp_path: Path) -> None:
    random_bytes = random.Random(0)
    model = SentencePieceModel(
        (*SMALL, *(Piece(text, 0.0, PieceType.BYTE) for text in BYTE_PIECES)),
        byte_fallback=True,
        character_map=b"x" * 9,
    )
    path = tmp_path / "m.model"
    model.save(path)
    whole = path.read_bytes()
    messages = []
    for n in range(200):
        content = bytearray(whole[: random_bytes.randrange(len(whole))] if n % 3 == 0 else whole)
        for _ in range(random_bytes.randrange(1, 4)):
            if content:
                content[random_bytes.randrange(len(content))] = random_bytes.randrange(256)
        path.write_bytes(content)
        try:
            SentencePieceModel.load(path)
        except ValueError as error:
            messages.append(str(error))
    assert len(messages) > 60
    assert all(message.startswith(f"{path}: not a SentencePiece model: ") for message in messages)


def test_pieces_that_do_not_fit_together_are_refused() -> None:
    model = SentencePieceModel(SMALL)
    for changes, message in (
        ({"algorithm": "word"}, "algorithm must be 'unigram' or 'bpe', got 'word'"),
        ({"pieces": SMALL[1:]}, "exactly one piece must be of type UNKNOWN, got 0"),
        ({"pieces": (*SMALL, Piece("", 0.0))}, "piece 6 must have 1 to 4096 bytes"),
        ({"pieces": (*SMALL, Piece("a\0", 0.0))}, "none of them zero"),
        ({"pieces": (*SMALL, Piece("é" * 2049, 0.0))}, "piece 6 must have"),
        ({"pieces": (*SMALL, Piece("c", float("nan")))}, "must have a finite score, got nan"),
        ({"byte_fallback": True}, "pieces of type BYTE must be <0x00> to <0xFF> with byte_fallback, got 0"),
        ({"pieces": (*SMALL, Piece("<0x00>", 0.0, PieceType.BYTE))}, "none without byte_fallback, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(model, **changes)  # type: ignore[arg-type]


def test_nothing_is_left_behind_when_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "m.model").mkdir()
    with pytest.raises(OSError):
        SentencePieceModel(SMALL).save(tmp_path / "m.model")
    assert [path.name for path in tmp_path.iterdir()] == ["m.model"]
