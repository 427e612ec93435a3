"""Text files: Python's own text mode is the oracle for what they say, and what is not text is refused by offset."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.data.text_files import list_files, read_documents

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=200)


@settings(max_examples=80, deadline=None)
@given(text=TEXT, encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]), chunk=st.integers(1, 20))
def test_byte_order_marks_decide(
    tmp_path_factory: pytest.TempPathFactory, text: str, encoding: str, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "file.txt"
    path.write_bytes(text.encode(encoding))
    with open(path, encoding="utf-8-sig" if encoding == "utf-8" else encoding) as file:
        expected = file.read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minillm.data.text_files.CHUNK_BYTES", chunk)
        assert "".join(read_documents(path)) == expected
        assert "".join(read_documents(path, piece_characters=7)) == expected


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "cp1252", "latin-1", "utf-8", "shift_jis"])
def test_a_named_encoding_is_used(tmp_path: Path, encoding: str) -> None:
    text = "ハロー\n" if encoding == "shift_jis" else "naïve café\r\nline\rend\n"
    path = tmp_path / "file.txt"
    path.write_bytes(text.encode(encoding))
    with open(path, encoding=encoding) as file:
        assert list(read_documents(path, encoding=encoding)) == [file.read()]


@settings(max_examples=60, deadline=None)
@given(text=TEXT, at=st.integers(0, 250), chunk=st.integers(1, 9), data=st.data())
def test_the_error_names_the_byte(
    tmp_path_factory: pytest.TempPathFactory, text: str, at: int, chunk: int, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("bad") / "file.txt"
    good = ("x" + text).encode()
    path.write_bytes(good[: at + 1] + data.draw(st.sampled_from([b"\xff", b"\xc3(", b"\x80", b"\xe2\x82"])) + b"ab\xff")
    with pytest.raises(UnicodeDecodeError) as expected:
        path.read_bytes().decode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minillm.data.text_files.CHUNK_BYTES", chunk)
        with pytest.raises(ValueError, match=f"not utf-8 text: .* at byte {expected.value.start}. Pass encoding="):
            list(read_documents(path))


def test_binary_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes("é and then\0".encode())
    with pytest.raises(ValueError, match=r"picture\.png looks like a binary file: it has a NUL character at byte 11"):
        list(read_documents(path))
    path.write_bytes("plain".encode("utf-16-le"))
    with pytest.raises(ValueError, match="pass encoding='utf-16-le'"):
        list(read_documents(path))
    assert list(read_documents(path, encoding="utf-16-le")) == ["plain"]


@settings(max_examples=100, deadline=None)
@given(
    documents=st.lists(st.text("ab \n", max_size=30), max_size=8),
    separator=st.sampled_from(["<|endoftext|>", "--", "-"]),
    chunk=st.integers(1, 12),
)
def test_separators(tmp_path_factory: pytest.TempPathFactory, documents: list[str], separator: str, chunk: int) -> None:
    path = tmp_path_factory.mktemp("separated") / "file.txt"
    path.write_text(separator.join(documents))
    expected = [stripped for document in documents if (stripped := document.strip())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minillm.data.text_files.CHUNK_BYTES", chunk)
        assert list(read_documents(path, separator=separator)) == expected
        pieces = list(read_documents(path, separator=separator, piece_characters=5))
    squeezed = "".join(" ".join(expected).split())
    assert "".join("".join(pieces).split()) == squeezed
    assert all(separator not in piece for piece in pieces)


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n", "\r\r"])
def test_a_separator_of_any_line_ends_matches_any(tmp_path: Path, line_end: str, separator: str) -> None:
    path = tmp_path / "file.txt"
    path.write_bytes(f"one{line_end}more{line_end}{line_end}two{line_end}".encode())
    assert list(read_documents(path, separator=separator)) == ["one\nmore", "two"]


@settings(max_examples=100, deadline=None)
@given(text=st.text("ab \n", min_size=1, max_size=200), limit=st.integers(1, 30))
def test_pieces_end_with_lines(tmp_path_factory: pytest.TempPathFactory, text: str, limit: int) -> None:
    path = tmp_path_factory.mktemp("pieces") / "file.txt"
    path.write_text(text)
    pieces = list(read_documents(path, piece_characters=limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)
    for piece in pieces[:-1]:
        if not piece.endswith("\n"):
            assert "\n" not in piece
            assert piece.endswith(" ") or " " not in piece


def test_a_file_larger_than_memory_is_streamed(tmp_path: Path) -> None:
    path = tmp_path / "large.txt"
    line = "The quick brown fox jumps over the lazy dog.\n" * 1000
    with open(path, "w") as file:
        for _ in range(800):
            file.write(line)
    tracemalloc.start()
    lengths = [len(piece) for piece in read_documents(path)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(lengths) == path.stat().st_size == 800 * len(line)
    assert max(lengths) <= 2**18
    assert peak < path.stat().st_size / 5


def test_a_small_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("line\n" * 800_000)
    assert len(list(read_documents(path))) == 1


def test_folders(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a.txt", ".hidden", ".git/config", "b/.cache/x.txt", "c.md", "b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "loop").symlink_to(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in list_files(tmp_path)]
    assert names == ["a.txt", "b/1.txt", "b/2.txt", "b.txt", "c.md"]
    names = [path.relative_to(tmp_path).as_posix() for path in list_files(tmp_path, "*.md")]
    assert names == ["c.md"]
    with pytest.raises(ValueError, match=r"holds no file that matches '\*\.rst'"):
        list_files(tmp_path, "*.rst")


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    path.write_text("text")
    for arguments, message in (
        ({"encoding": "klingon"}, "encoding must name a codec of Python"),
        ({"encoding": "base64"}, "encoding must name a text encoding"),
        ({"separator": ""}, "separator must be"),
        ({"piece_characters": 0}, "piece_characters must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            list(read_documents(path, **arguments))  # type: ignore[arg-type]
