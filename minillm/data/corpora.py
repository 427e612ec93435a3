"""Text to train on, by name or by path: `load_corpus("python-docs")`.

python-docs         the English reference that every CPython carries for `help()`: the default, needs no network
python-stdlib       the interpreter's own sources, about 10 MB, needs no network
synthetic           sentences of a small grammar whose entropy is exactly known, about 1.8 MB
tiny-shakespeare    1.1 MB of Shakespeare's plays, downloaded when first asked for
tinystories-valid   19 MB of short stories in simple English, downloaded when first asked for
a path              any text file or folder of text files, of any size
"""

from __future__ import annotations

import os
import sys
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from minillm.data.download import DownloadError, download
from minillm.data.synthetic import SyntheticGrammar
from minillm.data.text_files import list_files, read_documents

SYNTHETIC_DOCUMENTS = 400
NOT_THE_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    """Documents, in a fixed order. Iterating starts from the beginning each time and reads as it goes.

    Attributes: name; description (what it is, where it comes from); grammar (the SyntheticGrammar behind "synthetic",
    else None).
    """

    name: str
    description: str
    documents: Callable[[], Iterator[str]] = field(repr=False)
    grammar: SyntheticGrammar | None = field(default=None, repr=False)

    def __iter__(self) -> Iterator[str]:
        return self.documents()

    def text(self) -> str:
        """All documents in one string, a blank line between two. For corpora that fit into memory."""
        return "\n\n".join(self)


@dataclass(frozen=True)
class PublicSet:
    """A text file on the web, pinned by revision and checksum."""

    url: str
    sha256: str
    n_bytes: int
    file_name: str
    separator: str | None
    description: str


PUBLIC_SETS = {
    "tiny-shakespeare": PublicSet(
        url="https://raw.githubusercontent.com/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        n_bytes=1_115_394,
        file_name="tiny-shakespeare.txt",
        separator=None,
        description="40 000 lines from Shakespeare's plays (Karpathy, char-rnn, 2015); public domain",
    ),
    "tinystories-valid": PublicSet(
        url="https://huggingface.co/datasets/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64/TinyStories-valid.txt",
        sha256="94e431816c4cce81ff71e4408ff8d3bda9a42e8d2663986697c3954288cb38b4",
        n_bytes=19_447_282,
        file_name="tinystories-valid.txt",
        separator="<|endoftext|>",
        description="the validation file of TinyStories: 22 000 stories (Eldan and Li, 2023); CDLA-Sharing-1.0",
    ),
}
NAMES = ("python-docs", "python-stdlib", "synthetic", *PUBLIC_SETS)


def load_corpus(
    name_or_path: str | os.PathLike[str] = "python-docs",
    *,
    encoding: str | None = None,
    separator: str | None = None,
    pattern: str | None = None,
    seed: int = 0,
    cache_folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Corpus:
    """A corpus by name, or the text file or folder at a path.

    Args:
        name_or_path: one of the names above, or a path (write "./python-docs" for a file of that name).
        encoding: files and folders only: a Python codec's name. Default: a byte order mark decides, else UTF-8.
        separator: files and folders only: the string between two documents of a file. Default: a file is a document;
            one above 4 MiB comes in pieces cut at line ends.
        pattern: folders only: which file names to read, such as "*.txt". Hidden files are never read, empty ones hold
            nothing to read; links to folders are not followed.
        seed: "synthetic" only: of the language and of the text.
        cache_folder, progress: downloads only; see `minillm.data.download.download`.

    Raises ValueError for an unknown name, an empty or binary file, or text that its encoding does not allow (that one
    while iterating; the message gives file and byte offset), and DownloadError where a download fails.
    """
    name = os.fspath(name_or_path)
    if isinstance(name_or_path, str) and name in NAMES:
        for argument, value in (("encoding", encoding), ("separator", separator), ("pattern", pattern)):
            if value is not None:
                raise ValueError(f"{argument} is for files and folders, not for the corpus {name!r}; got {value!r}")
        if name == "python-docs":
            return _python_docs()
        if name == "python-stdlib":
            return _python_stdlib()
        if name == "synthetic":
            return _synthetic(seed)
        return _public_set(name, cache_folder, progress)
    path = Path(name)
    if path.is_dir():
        return _folder(path, pattern or "*", encoding, separator)
    if path.is_file():
        if pattern is not None:
            raise ValueError(f"pattern is for folders, and {path} is a file; got {pattern!r}")
        return _file(path, encoding, separator)
    raise ValueError(f"name_or_path must be one of {', '.join(NAMES)}, or the path of a file or folder; got {name!r}")


def _python_docs() -> Corpus:
    try:
        from pydoc_data.topics import topics  # not at the top: some distributions of Python leave it out
    except ImportError:
        raise ValueError(
            "python-docs needs the module pydoc_data, which this Python was packaged without; "
            "use load_corpus('python-stdlib') or load_corpus('synthetic')"
        ) from None
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    texts = _without_repeated(topics)
    return Corpus(
        "python-docs",
        f"the reference topics of Python {version} (what help() shows): the English text that every CPython carries",
        lambda: iter(texts),
    )


def _without_repeated(topics: dict[str, str]) -> list[str]:
    """The topics in order of their names, without those that only repeat parts of longer ones.

    A fifth of the topics are sections that also stand within a longer topic ("if" within "compound"). If they were
    kept, the same paragraph could be trained on and validated on.
    """
    kept, seen = [], set[str]()
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        lines = topics[name].splitlines()
        repeated = sum(len(line) for line in lines if line in seen)
        if 2 * repeated < sum(map(len, lines)):
            kept.append(name)
            seen.update(lines)
    return [topics[name] for name in sorted(kept)]


def _python_stdlib() -> Corpus:
    root = Path(sysconfig.get_path("stdlib"))
    files: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_THE_LIBRARY]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    files.sort(key=lambda path: path.relative_to(root).parts)
    if not files:
        raise ValueError(f"python-stdlib finds no sources: {root} holds no .py files; use load_corpus('synthetic')")

    def documents() -> Iterator[str]:
        for path in files:
            with tokenize.open(path) as file:  # heeds the encoding that the source declares (PEP 263)
                text = file.read()
            if text:
                yield text

    version = ".".join(map(str, sys.version_info[:3]))
    return Corpus("python-stdlib", f"the standard library's sources of Python {version}, without tests", documents)


def _synthetic(seed: int) -> Corpus:
    grammar = SyntheticGrammar(seed)
    return Corpus(
        "synthetic",
        f"sentences of a probabilistic grammar (seed {seed}) with {grammar.entropy_per_sentence:.4f} nats a sentence",
        lambda: grammar.documents(SYNTHETIC_DOCUMENTS, seed),
        grammar,
    )


def _public_set(name: str, cache_folder: str | os.PathLike[str] | None, progress: bool) -> Corpus:
    source = PUBLIC_SETS[name]
    try:
        path = download(
            source.url, source.sha256, file_name=source.file_name, cache_folder=cache_folder, progress=progress
        )
    except DownloadError as error:
        raise DownloadError(f"{error}. Without a network use load_corpus('python-docs'), which is embedded") from error
    return Corpus(name, source.description, lambda: read_documents(path, separator=source.separator))


def _file(path: Path, encoding: str | None, separator: str | None) -> Corpus:
    _first_document(path, encoding, separator)
    return Corpus(
        path.name, f"the text file {path}", lambda: read_documents(path, encoding=encoding, separator=separator)
    )


def _first_document(path: Path, encoding: str | None, separator: str | None) -> None:
    """Read up to the end of the first document, so that a file that is no text is refused at the door."""
    if next(read_documents(path, encoding=encoding, separator=separator), None) is None:
        raise ValueError(f"{path} is empty")


def _folder(path: Path, pattern: str, encoding: str | None, separator: str | None) -> Corpus:
    files = [file for file in list_files(path, pattern) if file.stat().st_size]

    def documents() -> Iterator[str]:
        for file in files:
            yield from read_documents(file, encoding=encoding, separator=separator)

    if next(documents(), None) is None:
        raise ValueError(f"every file in {path} that matches {pattern!r} is empty")
    return Corpus(path.name, f"{len(files)} text files in {path}", documents)
