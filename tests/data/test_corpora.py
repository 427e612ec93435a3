"""Corpora by name and by path."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import http.server
import itertools
import re
import sys
import threading
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from minillm.data import DownloadError, SyntheticGrammar, TokenDataset, corpora, load_corpus
from minillm.data.corpora import NAMES, PUBLIC_SETS


def test_python_docs() -> None:
    corpus = load_corpus("python-docs")
    documents = list(corpus)
    assert documents == list(corpus)
    assert set(documents) <= set(topics.values())
    assert topics["specialnames"] in documents
    assert 300_000 < len(corpus.text()) < 5_000_000
    assert load_corpus().name == "python-docs"
    assert corpus.grammar is None


def test_python_docs_repeat_nothing() -> None:
    """The topic "if" is also a section of "compound": a model must not be tested on what it was trained on."""
    documents = list(load_corpus("python-docs"))
    assert topics["compound"] in documents
    assert topics["if"] not in documents
    paragraphs = [paragraph for text in documents for paragraph in set(text.split("\n\n")) if len(paragraph) > 80]
    assert len(paragraphs) - len(set(paragraphs)) < 0.01 * len(paragraphs)


def test_a_python_without_its_docs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(ValueError, match=r"without; use load_corpus\('python-stdlib'\)"):
        load_corpus("python-docs")


def test_python_stdlib() -> None:
    corpus = load_corpus("python-stdlib")
    beginning = list(itertools.islice(corpus, 60))
    assert beginning == list(itertools.islice(corpus, 60))
    assert sum(map(len, beginning)) > 500_000
    assert sum('"""' in text for text in beginning) > 40
    with open(argparse.__file__, encoding="utf-8") as file:
        assert file.read() in beginning


def test_python_stdlib_heeds_declared_encodings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "test").mkdir()
    for name in ("site-packages/a.py", "test/b.py"):
        (tmp_path / name).write_text("no")
    (tmp_path / "c.py").write_bytes("# -*- coding: latin-1 -*-\nname = 'é'\n".encode("latin-1"))
    (tmp_path / "d.py").write_bytes(b"\xef\xbb\xbfx = 1\r\n")
    (tmp_path / "e.py").write_text("")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert list(load_corpus("python-stdlib")) == ["# -*- coding: latin-1 -*-\nname = 'é'\n", "x = 1\n"]
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="python-stdlib finds no sources"):
        load_corpus("python-stdlib")


def test_synthetic() -> None:
    corpus = load_corpus("synthetic", seed=3)
    assert isinstance(corpus.grammar, SyntheticGrammar)
    assert corpus.grammar.seed == 3
    documents = list(corpus)
    assert documents[:5] == list(corpus.grammar.documents(5, seed=3))
    assert 1_000_000 < sum(map(len, documents)) < 2_500_000
    assert f"{corpus.grammar.entropy_per_sentence:.4f} nats" in corpus.description


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\n\ntwo\n")
    corpus = load_corpus(path)
    assert (corpus.name, list(corpus), corpus.text()) == ("book.txt", ["one\n\ntwo\n"], "one\n\ntwo\n")
    assert list(load_corpus(str(path), separator="\n\n")) == ["one", "two"]
    path.write_bytes("café".encode("cp1252"))
    assert list(load_corpus(path, encoding="cp1252")) == ["café"]
    with pytest.raises(ValueError, match=r"book\.txt is not utf-8 text: .* at byte 3\. Pass encoding="):
        load_corpus(path)
    path.write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    with pytest.raises(ValueError, match=r"book\.txt"):
        load_corpus(path)
    for empty in (b"", b"\xef\xbb\xbf", b"\xff\xfe"):
        path.write_bytes(empty)
        with pytest.raises(ValueError, match=r"book\.txt is empty"):
            load_corpus(path)


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("B")
    (tmp_path / "sub" / "a.txt").write_text("A")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / ".hidden").write_bytes(b"\0")
    corpus = load_corpus(tmp_path)
    assert list(corpus) == ["B", "A"]
    assert corpus.text() == "B\n\nA"
    (tmp_path / "c.bin").write_bytes(b"x\0")
    with pytest.raises(ValueError, match=r"c\.bin looks like a binary file: .*byte 1\..* pattern="):
        list(load_corpus(tmp_path))
    assert list(load_corpus(tmp_path, pattern="*.txt")) == ["B", "A"]
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "sub" / "a.txt").write_text("")
    for nothing in (b"", b"\xef\xbb\xbf", b"\xff\xfe"):
        (tmp_path / "b.txt").write_bytes(nothing)
        with pytest.raises(ValueError, match=r"every file in .* is empty"):
            load_corpus(tmp_path, pattern="*.txt")
    for pattern in ("/etc/*", "a**b"):
        with pytest.raises(ValueError, match=r"pattern must match names|holds no file that matches"):
            load_corpus(tmp_path, pattern=pattern)


def test_a_name_is_a_name_and_a_path_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "python-docs").write_text("mine")
    assert len(list(load_corpus("python-docs"))) > 20
    assert list(load_corpus("./python-docs")) == list(load_corpus(Path("python-docs"))) == ["mine"]
    names = re.escape(", ".join(NAMES))
    with pytest.raises(ValueError, match=f"name_or_path must be one of {names}, or the path .* got 'python-doc'"):
        load_corpus("python-doc")
    for argument in ({"encoding": "utf-8"}, {"separator": "x"}, {"pattern": "*"}):
        with pytest.raises(ValueError, match="is for files and folders, not for the corpus 'synthetic'"):
            load_corpus("synthetic", **argument)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pattern is for folders"):
        load_corpus("./python-docs", pattern="*")


def test_public_sets_are_pinned() -> None:
    for source in PUBLIC_SETS.values():
        assert source.url.startswith("https://")
        assert re.search("/[0-9a-f]{40}/", source.url), "a revision, not a branch"
        assert re.fullmatch("[0-9a-f]{64}", source.sha256)


def test_a_public_set_and_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The set is served from this machine; then the server is gone, and the error names the way out."""
    content = b"one\n<|endoftext|>\ntwo\n<|endoftext|>\n"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        local = dataclasses.replace(
            PUBLIC_SETS["tinystories-valid"],
            url=f"http://127.0.0.1:{server.server_address[1]}/x",
            sha256=hashlib.sha256(content).hexdigest(),
        )
        monkeypatch.setitem(corpora.PUBLIC_SETS, "tinystories-valid", local)
        corpus = load_corpus("tinystories-valid", cache_folder=tmp_path / "cache", progress=False)
        assert list(corpus) == list(corpus) == ["one", "two"]
        server.shutdown()
        thread.join()
    assert list(load_corpus("tinystories-valid", cache_folder=tmp_path / "cache")) == ["one", "two"]
    with pytest.raises(DownloadError, match=r"cannot be reached .*use load_corpus\('python-docs'\), which is embedded"):
        load_corpus("tinystories-valid", cache_folder=tmp_path / "other", progress=False)


def test_from_a_file_to_batches(tmp_path: Path, byte_tokenizer: Any) -> None:
    path = tmp_path / "book.txt"
    lines = [f"This is line {number} of a book in one file.\n" for number in range(400)]
    path.write_text("".join(lines))
    folder = TokenDataset.write(tmp_path / "data", load_corpus(path), byte_tokenizer)
    validation = TokenDataset(folder, "validation", context_length=32, batch_size=4)
    train = TokenDataset(folder, "train", context_length=32, batch_size=4)
    assert train.n_bytes + validation.n_bytes == path.stat().st_size
    text = bytes(torch_row for inputs, _ in validation.evaluation_batches() for torch_row in inputs.flatten().tolist())
    assert path.read_bytes()[train.n_bytes :].startswith(text)
    assert 0.09 < validation.n_bytes / path.stat().st_size < 0.11
