"""Official archives and their extracted folders: found or downloaded, hash-checked, and read without extracting."""

import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from rush.data.readers.download import fetch
from rush.errors import DataError

_MOST_TEXT = 1 << 20
Parsed = TypeVar("Parsed")
Parse = Callable[[IO[bytes], str], Parsed]
"""From an open member and its name for error texts to what it holds."""


@dataclass(frozen=True)
class Archive:
    """An official ``file`` (.tar.gz) at ``url`` with the MD5 its authors publish, which unpacks to ``folder``."""

    file: str
    folder: str
    url: str
    md5: str


def locate(archives: Sequence[Archive], root: Path, name: str) -> tuple[Archive, Path] | None:
    """The first archive, else the first extracted folder, that lies in ``root`` or ``root``/``name``; None without any.

    ``root`` may also be the extracted folder itself. Archives are hash-checked, folders are not (their readers check
    sizes).
    Raises: DataError for an archive whose hash is wrong.
    """
    for base in (root, root / name):
        for archive in archives:
            if (base / archive.file).is_file():
                return archive, verified(archive, base / archive.file)
        for archive in archives:
            for folder in (base / archive.folder, base):
                if folder.name == archive.folder and folder.is_dir():
                    return archive, folder
    return None


def download_archive(archive: Archive, root: Path) -> Path:
    """``archive`` in ``root``, fetched from its official address and hash-checked. Raises: DataError."""
    return fetch(archive.url, f"md5:{archive.md5}", root / archive.file)


def verified(archive: Archive, path: Path) -> Path:
    """``path`` again when its MD5 is the published one. Raises: DataError with both hashes."""
    import pooch

    found = pooch.file_hash(str(path), alg="md5")
    if found != archive.md5:
        raise DataError(
            f"{path} has MD5 {found}, the official file has {archive.md5}: it is truncated or altered; "
            f"delete it and run again to download it, or get it from {archive.url}"
        )
    return path


def read_members(archive: Archive, path: Path, parsers: dict[str, Parse[Parsed]]) -> dict[str, Parsed]:
    """What each parser makes of its member, by member name, from the archive or the extracted folder at ``path``.

    An archive is read once from front to back and nothing is written to disk.
    Raises: DataError naming the file when a member is missing or the archive is damaged.
    """
    read = _from_folder if path.is_dir() else _from_tar
    try:
        found = read(archive, path, parsers)
    except DataError:
        raise
    except Exception as error:  # tarfile, gzip and zlib raise many kinds on damaged files
        raise DataError(
            f"{path} is damaged or truncated ({error or type(error).__name__}); delete it and get it again from "
            f"{archive.url}"
        ) from error
    missing = [member for member in parsers if member not in found]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; get it again from {archive.url}")
    return found


def read_words(file: IO[bytes]) -> list[str]:
    """Return the words of a short text file, without a byte order mark. Raise ValueError for a long one."""
    content = file.read(_MOST_TEXT + 1)
    if len(content) > _MOST_TEXT:
        raise ValueError(f"more than {_MOST_TEXT} bytes of class names")
    return content.removeprefix(b"\xef\xbb\xbf").decode("latin1").split()


def _from_folder(_archive: Archive, path: Path, parsers: dict[str, Parse[Parsed]]) -> dict[str, Parsed]:
    found = {}
    for member, parse in parsers.items():
        if (path / member).is_file():
            with (path / member).open("rb") as file:
                found[member] = parse(file, str(path / member))
    return found


def _from_tar(archive: Archive, path: Path, parsers: dict[str, Parse[Parsed]]) -> dict[str, Parsed]:
    found: dict[str, Parsed] = {}
    with tarfile.open(path, "r|gz") as tar:
        for entry in tar:
            member = entry.name.removeprefix("./").removeprefix(archive.folder + "/")
            # A link is no official member, and following it would leave the stream.
            file = tar.extractfile(entry) if member in parsers and entry.isreg() else None
            if file is not None:
                found[member] = parsers[member](file, f"{path}:{entry.name}")
            if len(found) == len(parsers):
                break
    return found
