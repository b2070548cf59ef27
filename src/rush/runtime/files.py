"""Files that are whole or not there, and folders that one process at a time works in.

Everything that the library writes goes through this module. No link inside a run folder is followed, since the folder
may come from somebody else: a temporary is created exclusively, a file is appended to only where it is a regular file,
and a link is refused. The path of the run folder itself may hold links.
"""

import errno
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rush.errors import RunError, WriteError

RECIPE = "recipe.json"  # what makes a folder a run folder
# Folders that a run folder holds.
_PARTS = ("stages", "checkpoints", "model", "attacks", "certificates.parts")
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe does not block
_PLAIN = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` on a temporary neighbour of ``path``, flush it to the disk and rename it: a kill leaves the old
    file or the new one.

    The neighbour's name is always the same. What a kill has left of it is removed, and it is created exclusively. One
    process at a time may write ``path``. Outside a run folder ``path`` may be a link, whose target is then replaced.
    Raises: RunError where ``path`` leads through a link inside a run folder; WriteError where it cannot be written.
    """
    refuse_links(path)
    with _writing(path):
        if path.is_symlink():
            path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.partial")
        temporary.unlink(missing_ok=True)
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK | _PLAIN, 0o600))
        try:
            write(temporary)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())  # safetensors makes files that their owner alone may read
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically."""

    def write(target: Path) -> None:
        target.write_bytes(content)

    write_atomically(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON to ``path`` atomically."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_arrays(path: Path, **arrays: Any) -> None:
    """Write NumPy ``arrays`` as an .npz file to ``path`` atomically."""
    import numpy as np

    def write(target: Path) -> None:
        with open(target, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)

    write_atomically(path, write)


def append_text(path: Path, text: str, header: str = "") -> None:
    """Append ``text`` to the file ``path`` and flush it to the disk; a new file begins with ``header``.

    Where the disk is full, nothing of ``text`` stays.
    Raises: RunError where ``path`` is a link or leads through one inside a run folder, or is not a regular file;
    WriteError where it cannot be written.
    """
    refuse_links(path)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as descriptor:
            before = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, ((header if before == 0 else "") + text).encode("utf-8"))
                os.fsync(descriptor)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise


def cut_file(path: Path, size: int) -> None:
    """Cut the file ``path`` back to its first ``size`` bytes. Raises: as ``append_text``."""
    refuse_links(path)
    with _writing(path), _opened(path, os.O_WRONLY) as descriptor:
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)


def make_folder(path: Path) -> None:
    """Make the folder ``path`` where there is none. Raises: as ``write_atomically``."""
    refuse_links(path)
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)


def refuse_links(path: Path) -> None:
    """Raise RunError where ``path`` is a link inside a run folder, or a folder between the two is one."""
    below = [Path(os.path.abspath(path))]
    for folder in below[0].parents:
        first = below[-1]
        if (len(below) == 1 or first.name in _PARTS) and os.path.lexists(folder / RECIPE):
            link = next((part for part in below if part.is_symlink()), None)
            if link is not None:
                raise RunError(
                    f"{link} is a link to {os.readlink(link)!r}; nothing is written through a link inside a run "
                    "folder: replace it by the file or folder itself"
                )
        below.append(folder)


@contextmanager
def one_process(path: Path, wait: bool) -> Iterator[None]:
    """Within the context no other process is in one for the same file or folder ``path``, which must exist.

    Where another one is: waits for it, or raises BlockingIOError if not ``wait``. The system frees the lock of a killed
    process. On Windows, which has no such locks, nothing is held.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the system says within the context into one line about ``path``."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        link = error.errno == errno.ELOOP
        raise WriteError(path, "it is a link" if link else error.strerror or str(error)) from error


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """Within the context the regular file ``path``, open as a descriptor."""
    descriptor = os.open(path, flags | _NO_LINK | _PLAIN, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise RunError(f"{path} is not a regular file; replace it by one")
        yield descriptor
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _umask() -> int:
    current = os.umask(0o077)  # the system tells it by setting it
    os.umask(current)
    return current
