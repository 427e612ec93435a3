"""Downloads against a real HTTP server on this machine that misbehaves in every way asked of it."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minillm.data.download import DownloadError, default_cache_folder, download

CONTENT = bytes(range(256)) * 3000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` at any path; what it does wrong is set by the attributes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.etag: str | None = '"one"'
        self.status: int | None = None
        self.ranges = True
        self.stop_after: list[int] = []  # for each request: bytes after which the connection breaks
        self.chunked = False
        self.wrong_range = False
        self.requests: list[dict[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/folder/set.txt"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(dict(self.headers))
        self.close_connection = True
        if self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", server.url)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if server.status is not None:
            self.send_error(server.status)
            return
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(asked[1]) if asked and server.ranges else 0
        if self.headers.get("If-Range", server.etag) != server.etag:
            first = 0
        if first >= len(server.content):
            self.send_error(416)
            return
        body = server.content[first:]
        self.send_response(206 if first else 200)
        if first:
            shown = first - 1 if server.wrong_range else first
            self.send_header("Content-Range", f"bytes {shown}-{len(server.content) - 1}/{len(server.content)}")
        if server.etag:
            self.send_header("ETag", server.etag)
        stop = server.stop_after.pop(0) if server.stop_after else None
        if server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            part = body[:stop]
            self.wfile.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            if stop is None:
                self.wfile.write(b"0\r\n\r\n")
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body[:stop])

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def fetch(server: Server, folder: Path, **kwargs: Any) -> Path:
    return download(server.url, SHA256, cache_folder=folder, **{"progress": False} | kwargs)


def test_once_and_then_from_the_cache(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = fetch(server, tmp_path / "new" / "cache", progress=True)
    assert path == tmp_path / "new" / "cache" / "set.txt"
    assert path.read_bytes() == CONTENT
    shown = capsys.readouterr().err
    assert "set.txt: 100%" in shown
    server.status = 500
    assert fetch(server, tmp_path / "new" / "cache") == path
    assert len(server.requests) == 1
    assert capsys.readouterr().err == ""
    assert not list(path.parent.glob("*.part*"))


def test_a_damaged_cached_file_is_fetched_again(server: Server, tmp_path: Path) -> None:
    path = fetch(server, tmp_path)
    path.write_bytes(CONTENT[:-1] + b"?")
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_a_broken_connection_is_resumed_within_the_call(server: Server, tmp_path: Path) -> None:
    server.stop_after = [1000, 200_000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [None, "bytes=1000-", "bytes=201000-"]
    assert [request.get("If-Range") for request in server.requests] == [None, '"one"', '"one"']


def test_a_truncated_download_is_kept_and_resumed_by_the_next_call(server: Server, tmp_path: Path) -> None:
    server.stop_after = [1000, 0, 0]
    with pytest.raises(DownloadError, match=f"ended after 1000 of {len(CONTENT)} bytes, 3 times"):
        fetch(server, tmp_path)
    assert not (tmp_path / "set.txt").exists()
    assert (tmp_path / "set.txt.part").stat().st_size == 1000
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests[-1]["Range"] == "bytes=1000-"


def test_a_server_that_will_not_resume_sends_all_of_it(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.stop_after = [1000]
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests[1]["Range"] == "bytes=1000-"


@pytest.mark.parametrize("etag", ['"two"', None, 'W/"weak"'])
def test_a_file_that_changed_in_between_is_not_mixed(server: Server, tmp_path: Path, etag: str | None) -> None:
    """With a strong ETag the server notices; without one, the checksum does, and the whole is fetched again."""
    server.etag = '"one"' if etag == '"two"' else etag
    server.content = b"other" * 500
    server.stop_after = [1000]
    with pytest.raises(DownloadError, match="ended after"):
        fetch(server, tmp_path, attempts=1)
    server.content, server.etag = CONTENT, etag
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert "If-Range" not in server.requests[1] or etag == '"two"'


def test_a_part_longer_than_the_file_is_dropped(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.txt.part").write_bytes(CONTENT + b"more")
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert len(server.requests) == 2  # the first was answered 416


def test_a_part_that_is_complete_needs_no_request(server: Server, tmp_path: Path) -> None:
    (tmp_path / "set.txt.part").write_bytes(CONTENT)
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    assert server.requests == []


def test_the_wrong_bytes_are_deleted_and_both_sums_named(server: Server, tmp_path: Path) -> None:
    server.content = b"something else"
    actual = hashlib.sha256(server.content).hexdigest()
    with pytest.raises(DownloadError, match=f"sent 14 bytes with SHA-256 {actual}, expected {SHA256}"):
        fetch(server, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"set.txt.lock", "set.txt.part.validator"}
    assert len(server.requests) == 1


def test_a_server_that_sends_another_range_is_refused(server: Server, tmp_path: Path) -> None:
    server.wrong_range = True
    server.stop_after = [1000]
    with pytest.raises(DownloadError, match="asked for the bytes from 1000 on, the server sent those from 999 on"):
        fetch(server, tmp_path)
    assert fetch(server, tmp_path).read_bytes() == CONTENT


def test_without_a_length_the_checksum_tells(server: Server, tmp_path: Path) -> None:
    server.chunked = True
    assert fetch(server, tmp_path).read_bytes() == CONTENT
    server.stop_after = [5000]
    with pytest.raises(DownloadError, match="5000 bytes with SHA-256"):
        fetch(server, tmp_path / "again")


def test_redirects_are_followed_with_the_range(server: Server, tmp_path: Path) -> None:
    server.stop_after = [1000]
    url = server.url.replace("/folder/set.txt", "/moved/there.txt")
    path = download(url, SHA256, cache_folder=tmp_path, file_name="mine.txt", progress=False)
    assert path == tmp_path / "mine.txt"
    assert path.read_bytes() == CONTENT
    assert [request.get("Range") for request in server.requests] == [None, None, "bytes=1000-", "bytes=1000-"]


@pytest.mark.parametrize(("status", "reason"), [(404, "Not Found"), (403, "Forbidden"), (503, "Service Unavailable")])
def test_error_answers(server: Server, tmp_path: Path, status: int, reason: str) -> None:
    server.status = status
    with pytest.raises(DownloadError, match=rf"set\.txt cannot be had: the server answers {status} {reason}"):
        fetch(server, tmp_path)
    assert not list(tmp_path.glob("set.txt.part"))


def test_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"http://127.0.0.1:{probe.getsockname()[1]}/set.txt"
        with pytest.raises(DownloadError, match=r"127\.0\.0\.1 cannot be reached \(.*refused"):
            download(url, SHA256, cache_folder=tmp_path, progress=False)


def test_a_silent_server_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/set.txt"
        with pytest.raises(DownloadError, match=r"cannot be reached .*timed out"):
            download(url, SHA256, cache_folder=tmp_path, progress=False, timeout=0.05)


def test_the_disk_refuses(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match=r"cannot be written: .*Pass cache_folder="):
        fetch(server, tmp_path / "file" / "cache")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DownloadError, match=r"set\.txt cannot be written: .*No space left on device"):
        fetch(server, tmp_path)
    assert not (tmp_path / "set.txt").exists()


def test_many_at_once_fetch_it_once(server: Server, tmp_path: Path) -> None:
    paths: list[Path] = []
    threads = [threading.Thread(target=lambda: paths.append(fetch(server, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [tmp_path / "set.txt"] * 4
    assert len(server.requests) == 1


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    good = "http://127.0.0.1:1/x"
    for url, arguments, message in (
        ("file:///etc/passwd", {}, "url must start with http"),
        ("http:///x", {}, "name a host"),
        (good, {"sha256": "abc"}, "sha256 must be 64 hexadecimal digits"),
        (good, {"attempts": 0}, "attempts must be at least 1"),
        (good, {"timeout": 0}, "timeout must be above 0 seconds"),
        (good, {"file_name": "../x"}, "file_name must be a plain file name"),
        ("http://127.0.0.1:1/", {}, "file_name must be a plain file name"),
        ("http://127.0.0.1:1/%2e%2e", {}, "file_name must be a plain file name"),
    ):
        with pytest.raises(ValueError, match=message):
            download(url, **{"sha256": SHA256, "cache_folder": tmp_path} | arguments)  # type: ignore[arg-type]


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "minillm"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sys.platform", "linux")
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert default_cache_folder() == tmp_path / "home" / ".cache" / "minillm"
    monkeypatch.setattr("sys.platform", "darwin")
    assert default_cache_folder() == tmp_path / "home" / "Library" / "Caches" / "minillm"
