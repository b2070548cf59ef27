"""Downloads that are checked against a known hash and resume after an interruption."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from rush.errors import DataError
from rush.runtime.files import one_process

_BLOCK = 1 << 18  # bytes
Advance = Callable[[int, int | None], None]
"""Callback after every block, with the bytes on disk and the bytes in total, where known."""


def fetch(url: str, known_hash: str, target: Path, attempts: int = 5, pause: float = 1.0) -> Path:
    """Download ``url`` to ``target``, check it against ``known_hash`` and return ``target``.

    Bytes go to ``target`` + ".part" first. After a lost connection or an interrupted process, the download resumes from
    there (HTTP Range).

    Args:
        url: address of the file.
        known_hash: expected hash in pooch's form, e.g. "md5:...".
        target: path of the finished file.
        attempts: number of consecutive tries without a new byte before giving up.
        pause: seconds between tries.

    Raises:
        DataError: the server cannot be reached or refuses, or the file does not have the expected hash.
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
            f"could not download {url}: {error}; run again to resume from {part}, or put the file at {target} yourself"
        ) from error
    except ValueError as error:
        raise DataError(f"{url} for {target}: {error} Run again to download it, or get the file elsewhere") from error
    return target


@dataclass(frozen=True)
class _Resuming:
    """A pooch downloader that collects bytes in ``part`` and moves it to pooch's temporary file when complete."""

    part: Path
    attempts: int
    pause: float

    def __call__(self, url: str, output_file: str, _pooch: object) -> None:
        from rich import progress as bars
        from rich.console import Console

        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.DownloadColumn(),
            bars.TransferSpeedColumn(),
            bars.TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        with bars.Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task = progress.add_task(self.part.stem)
            self._retry(url, lambda done, total: progress.update(task, completed=done, total=total))
        self.part.replace(output_file)

    def _retry(self, url: str, advance: Advance) -> None:
        failures, most_bytes = 0, _size(self.part)
        while True:
            try:
                return _receive(url, self.part, advance)
            except (OSError, HTTPException) as error:
                failures = 0 if _size(self.part) > most_bytes else failures + 1
                most_bytes = max(most_bytes, _size(self.part))
                if failures == self.attempts or _is_refusal(error):
                    raise
            time.sleep(self.pause)


def _receive(url: str, part: Path, advance: Advance) -> None:
    """Fill ``part`` by one request, or raise OSError or HTTPException if the connection ends before the last byte."""
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
            raise ConnectionError(f"requested bytes from {have}, received {response.headers.get('Content-Range')}")
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
    """Return whether a retry is pointless: 4xx other than a timeout, too many requests or an unsatisfiable range."""
    return isinstance(error, HTTPError) and 400 <= error.code < 500 and error.code not in (408, 416, 429)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
