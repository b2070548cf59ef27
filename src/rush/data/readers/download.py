"""Downloads that are checked against a known hash and go on where they were cut off."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rush.errors import DataError
from rush.runtime.files import one_process

_BLOCK = 1 << 18
Advance = Callable[[int, int | None], None]
"""Told (bytes on disk, bytes in all or None) after every block."""


def fetch(url: str, known_hash: str, target: Path, attempts: int = 5, pause: float = 1.0) -> Path:
    """``target``, downloaded from ``url`` and checked against ``known_hash`` (pooch's form, e.g. "md5:...").

    Bytes go to ``target`` + ".part" first. A lost connection is taken up again there (HTTP Range), and so is the part
    that an earlier, killed process left. ``attempts``: tries in a row that bring no byte before giving up, ``pause``
    seconds apart.
    Raises: DataError when the server cannot be reached, refuses, or sends other bytes than the hash says.
    """
    import pooch

    part = target.with_name(target.name + ".part")
    downloader = _Resuming(part, attempts, pause)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with one_process(target.parent, wait=True):
            pooch.retrieve(url, known_hash, fname=target.name, path=target.parent, downloader=downloader)
    except (OSError, HTTPException) as error:
        raise DataError(
            f"could not download {url}: {error}; run again to go on from {part}, or put the file at {target} yourself"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{url} for {target}: {error} Run again to download it anew, or get the file elsewhere"
        ) from error
    return target


@dataclass(frozen=True)
class _Resuming:
    """A pooch downloader that keeps what it has in ``part`` and moves it to pooch's temporary file once complete."""

    part: Path
    attempts: int
    pause: float

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task(self.part.stem)
            self._persist(url, lambda done, total: progress.update(task, completed=done, total=total))
        self.part.replace(output_file)

    def _persist(self, url: str, advance: Advance) -> None:
        fruitless, best = 0, _size(self.part)
        while True:
            try:
                return _receive(url, self.part, advance)
            except (OSError, HTTPException) as error:
                fruitless = 0 if _size(self.part) > best else fruitless + 1
                best = max(best, _size(self.part))
                if fruitless == self.attempts or _is_refusal(error):
                    raise
            time.sleep(self.pause)


def _receive(url: str, part: Path, advance: Advance) -> None:
    """Fill ``part`` by one request. Raises: OSError or HTTPException when the connection ends before the last byte."""
    have = _size(part)
    request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response: HTTPResponse = urlopen(request, timeout=30)
    except HTTPError as error:
        with error:
            if error.code == 416 and error.headers.get("Content-Range") == f"bytes */{have}":
                return  # nothing is missing
            if error.code == 416:
                part.unlink()
        raise
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise ConnectionError(f"asked for bytes from {have}, was sent {response.headers.get('Content-Range')}")
        _append(response, part, have if resumed else 0, advance)


def _append(response: HTTPResponse, part: Path, have: int, advance: Advance) -> None:
    length = response.headers.get("Content-Length")
    total = have + int(length) if length else None
    with part.open("ab" if have else "wb") as file:
        while block := response.read(_BLOCK):
            file.write(block)
            advance(file.tell(), total)
    if total is not None and _size(part) < total:
        raise ConnectionError(f"the connection ended after {_size(part)} of {total} bytes")


def _is_refusal(error: Exception) -> bool:
    """Whether asking again is pointless: 4xx other than a timeout, too many requests, or a part that did not fit."""
    return isinstance(error, HTTPError) and 400 <= error.code < 500 and error.code not in (408, 416, 429)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
