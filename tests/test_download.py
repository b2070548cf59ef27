"""Downloads from a server on this machine that can drop the connection."""

import hashlib
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from rush.data import sources
from rush.data.readers import stl10
from rush.data.readers.download import fetch
from rush.errors import DataError
from test_official import pack, write_stl10

CONTENT = np.random.default_rng(0).bytes(700_000)
HASH = "md5:" + hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves CONTENT at every path; the first ``drops`` answers end halfway through what they promised."""

    daemon_threads = True
    drops = 0
    supports_range = True
    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.ranges: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/file.tar.gz"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        requested = self.headers.get("Range")
        self.server.ranges.append(requested)
        start = int(requested.removeprefix("bytes=").rstrip("-")) if requested and self.server.supports_range else 0
        if self.server.status != 200:
            return self.send_error(self.server.status)
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        body = CONTENT[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.server.drops:
            self.server.drops -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)
        return None

    def log_message(self, *_arguments: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("part", "drops", "supports_range", "ranges"),
    [
        pytest.param(None, 1, True, [None, "bytes=350000-"], id="dropped connection"),
        pytest.param(None, 1, False, [None, "bytes=350000-"], id="server without ranges"),
        pytest.param(CONTENT[:600_001], 0, True, ["bytes=600001-"], id="part of a killed process"),
        pytest.param(CONTENT, 0, True, ["bytes=700000-"], id="part that is whole"),
        pytest.param(CONTENT + b"more", 0, True, ["bytes=700004-", None], id="part longer than the file"),
    ],
)
def test_a_download_goes_on_from_the_part_on_disk_or_starts_again(
    server: Server, tmp_path: Path, part: bytes | None, drops: int, supports_range: bool, ranges: list[str | None]
) -> None:
    target = tmp_path / "new" / "file.tar.gz"
    if part is not None:
        target.parent.mkdir()
        target.with_name("file.tar.gz.part").write_bytes(part)
    server.drops, server.supports_range = drops, supports_range
    assert fetch(server.url, HASH, target, pause=0).read_bytes() == CONTENT
    assert server.ranges == ranges
    assert not list(target.parent.glob("*.part"))


def test_other_bytes_than_the_hash_says_are_not_kept(server: Server, tmp_path: Path) -> None:
    wrong = "md5:" + "0" * 32
    with pytest.raises(DataError, match=f"expected {wrong} but got {HASH[4:]}.*Run again") as caught:
        fetch(server.url, wrong, tmp_path / "file.tar.gz", pause=0)
    assert server.url in str(caught.value)
    assert not (tmp_path / "file.tar.gz").exists()
    assert not (tmp_path / "file.tar.gz.part").exists()


def test_a_damaged_part_fails_once_and_then_starts_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.tar.gz.part").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="does not match"):
        fetch(server.url, HASH, tmp_path / "file.tar.gz", pause=0)
    assert fetch(server.url, HASH, tmp_path / "file.tar.gz", pause=0).read_bytes() == CONTENT


def test_a_connection_that_keeps_failing_gives_up_and_keeps_the_part(server: Server, tmp_path: Path) -> None:
    server.drops = 100
    server.supports_range = False
    with pytest.raises(DataError, match=r"could not download .*350000 of 700000.*run again to resume from .*\.part"):
        fetch(server.url, HASH, tmp_path / "file.tar.gz", attempts=3, pause=0)
    assert (tmp_path / "file.tar.gz.part").read_bytes() == CONTENT[:350_000]
    assert len(server.ranges) == 4  # the first brought bytes, three in a row brought none beyond them


def test_a_refusal_is_not_asked_again(server: Server, tmp_path: Path) -> None:
    server.status = 404
    with pytest.raises(DataError, match=r"could not download .*404.*put the file at .*file\.tar\.gz yourself"):
        fetch(server.url, HASH, tmp_path / "file.tar.gz", pause=0)
    assert len(server.ranges) == 1


def test_an_unreachable_server_names_the_remedy(server: Server, tmp_path: Path) -> None:
    url = server.url
    server.server_close()
    with pytest.raises(DataError, match=r"could not download .*put the file at"):
        fetch(url, HASH, tmp_path / "file.tar.gz", attempts=2, pause=0)


def test_a_missing_archive_is_downloaded_and_read(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the name to the images: nothing on disk, one download, and no second one."""
    pixels = write_stl10(monkeypatch, tmp_path)
    md5 = pack(tmp_path / "stl10_binary", tmp_path / "served.tar.gz")
    monkeypatch.setattr("test_download.CONTENT", (tmp_path / "served.tar.gz").read_bytes())
    monkeypatch.setattr(sources, "STL10", replace(stl10.STL10, md5=md5, url=server.url))
    (tmp_path / "fresh").mkdir()
    for _ in range(2):
        images = sources.load_images("stl10", "train", root=tmp_path / "fresh")
        assert images.images.equal(images.images.new_tensor(pixels))
    assert server.ranges == [None]
    assert (tmp_path / "fresh" / "stl10_binary.tar.gz").is_file()
