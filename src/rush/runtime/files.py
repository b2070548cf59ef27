"""Atomic file writes and exclusive directory locks.

The library writes every file through this module. Links inside a run folder are never followed, since the folder may
come from an untrusted source: a temporary file is created exclusively, only regular files are appended to, and a link
is refused. The path of the run folder itself may contain links.
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

RECIPE = "recipe.json"  # its presence makes a folder a run folder
# Folders inside a run folder.
_PARTS = ("stages", "checkpoints", "model", "attacks", "certificates.parts")
_NO_LINK = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # opening a pipe must not block
_PLAIN = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write ``path`` so that a crash leaves either the old file or the new one.

    ``write`` fills a temporary file beside ``path``, which is flushed to the disk and renamed. The temporary file's
    name is fixed: a leftover from a crash is removed, and the file is created exclusively. Only one process at a time
    may write ``path``. Outside a run folder ``path`` may be a link, whose target is then replaced.

    Args:
        path: the file, whose missing parent folders are created.
        write: called with the path of the temporary file, which is empty.

    Raises:
        RunError: ``path`` leads through a link inside a run folder.
        WriteError: The file cannot be written.
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
            os.chmod(temporary, 0o666 & ~_umask())  # safetensors creates files that only their owner can read
            os.replace(temporary, path)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` atomically."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` atomically."""
    write_atomically(path, lambda target: target.write_bytes(content))


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
    """Append ``text`` to the file ``path`` and flush it to the disk. A new file begins with ``header``.

    If writing fails, e.g. on a full disk, the file is cut back to its former size.

    Raises:
        RunError: ``path`` is a link or leads through one inside a run folder, or is not a regular file.
        WriteError: The file cannot be written.
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
    """Truncate the file ``path`` to its first ``size`` bytes. Raises like ``append_text``."""
    refuse_links(path)
    with _writing(path), _opened(path, os.O_WRONLY) as descriptor:
        os.ftruncate(descriptor, size)
        os.fsync(descriptor)


def make_folder(path: Path) -> None:
    """Create the folder ``path`` if it does not exist. Raises like ``write_atomically``."""
    refuse_links(path)
    with _writing(path):
        path.mkdir(parents=True, exist_ok=True)


def refuse_links(path: Path) -> None:
    """Raise RunError if ``path``, or a folder between it and its run folder, is a link."""
    below = [Path(os.path.abspath(path))]
    for folder in below[0].parents:
        first = below[-1]
        if (len(below) == 1 or first.name in _PARTS) and os.path.lexists(folder / RECIPE):
            link = next((part for part in below if part.is_symlink()), None)
            if link is not None:
                raise RunError(
                    f"{link} is a link to {os.readlink(link)!r}; nothing is written through a link inside a run "
                    "folder: replace it with the file or folder itself"
                )
        below.append(folder)


@contextmanager
def one_process(path: Path, wait: bool) -> Iterator[None]:
    """Hold an exclusive lock on the existing file or folder ``path`` within the context.

    The system releases the lock of a killed process. Windows has no such locks, so nothing is held there.

    Args:
        path: the file or folder to lock.
        wait: whether to wait for a process that holds the lock.

    Raises:
        BlockingIOError: Another process holds the lock and ``wait`` is False.
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
    """Turn an OSError within the context into a WriteError about ``path``."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        link = error.errno == errno.ELOOP
        raise WriteError(path, "it is a link" if link else error.strerror or str(error)) from error


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """Open the regular file ``path`` as a descriptor within the context."""
    descriptor = os.open(path, flags | _NO_LINK | _PLAIN, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise RunError(f"{path} is not a regular file; replace it with one")
        yield descriptor
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def _umask() -> int:
    current = os.umask(0o077)  # it can only be read by setting it
    os.umask(current)
    return current
