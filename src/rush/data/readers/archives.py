"""Official archives and their extracted folders: located or downloaded, hash-checked, read without extraction."""

import tarfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from rush.data.readers.damage import name_damage
from rush.errors import DataError

_MOST_TEXT = 1 << 20  # bytes
Parsed = TypeVar("Parsed")
Parse = Callable[[IO[bytes], str], Parsed]
"""Parser of one member: takes the open file and its name for error messages, and returns the content."""


@dataclass(frozen=True)
class Archive:
    """An official ``file`` (.tar.gz) at ``url``, with the MD5 that its authors publish. It unpacks to ``folder``."""

    file: str
    folder: str
    url: str
    md5: str

    @property
    def remedy(self) -> str:
        """Advice in error messages about a damaged archive or one of its files."""
        return f"delete it and get it again from {self.url}"


def locate(archives: Collection[Archive], roots: Iterable[Path], name: str) -> tuple[Archive, Path] | None:
    """Return the first archive, or else the first extracted folder, in the first of ``roots`` that holds any.

    A root holds what lies in it or in its sub-folder ``name``, and may also be the extracted folder itself. Archives
    are hash-checked. Folders are not: their readers check sizes. The result is None without any.

    Raises:
        DataError: an archive has a wrong hash.
    """
    for base in (base for root in roots for base in (root, root / name)):
        for archive in archives:
            if (base / archive.file).is_file():
                _check_hash(archive, base / archive.file)
                return archive, base / archive.file
        for archive in archives:
            for folder in (base / archive.folder, base):
                if folder.name == archive.folder and folder.is_dir():
                    return archive, folder
    return None


def read_members(archive: Archive, path: Path, parsers: dict[str, Parse[Parsed]]) -> dict[str, Parsed]:
    """Parse members of the archive or extracted folder at ``path`` and return their contents by member name.

    An archive is read once from front to back, and nothing is written to disk.

    Raises:
        DataError: the file is damaged, or a member is missing. The message names the file.
    """
    with name_damage(f"{path} is damaged or truncated", archive.remedy):
        contents = _from_folder(path, parsers) if path.is_dir() else _from_tar(archive, path, parsers)
    missing = [member for member in parsers if member not in contents]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}; get it again from {archive.url}")
    return contents


def read_words(file: IO[bytes]) -> list[str]:
    """Return the words of a short text file, without a byte order mark, or raise ValueError for a long one."""
    content = file.read(_MOST_TEXT + 1)
    if len(content) > _MOST_TEXT:
        raise ValueError(f"more than {_MOST_TEXT} bytes of class names")
    return content.removeprefix(b"\xef\xbb\xbf").decode("latin1").split()


def _check_hash(archive: Archive, path: Path) -> None:
    """Raise DataError with both hashes unless the MD5 of the file at ``path`` is the published one."""
    import pooch

    md5 = pooch.file_hash(str(path), alg="md5")
    if md5 != archive.md5:
        raise DataError(
            f"{path} has MD5 {md5}, the official file has {archive.md5}: it is truncated or altered; "
            f"delete it and run again to download it, or get it from {archive.url}"
        )


def _from_folder(path: Path, parsers: dict[str, Parse[Parsed]]) -> dict[str, Parsed]:
    contents: dict[str, Parsed] = {}
    for member, parse in parsers.items():
        if (path / member).is_file():
            with (path / member).open("rb") as file:
                contents[member] = parse(file, str(path / member))
    return contents


def _from_tar(archive: Archive, path: Path, parsers: dict[str, Parse[Parsed]]) -> dict[str, Parsed]:
    contents: dict[str, Parsed] = {}
    with tarfile.open(path, "r|gz") as tar:
        for entry in tar:
            member = entry.name.removeprefix("./").removeprefix(archive.folder + "/")
            # A link is not an official member, and following it would leave the stream.
            file = tar.extractfile(entry) if member in parsers and entry.isreg() else None
            if file is not None:
                contents[member] = parsers[member](file, f"{path}:{entry.name}")
            if len(contents) == len(parsers):
                break
    return contents
