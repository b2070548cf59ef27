"""Folders in which a data set is looked up: one, or several that hold parts of it."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from rush.errors import InputError

Root = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None
"""One folder, several, or None for the default."""


def root_folders(root: Root) -> list[str | os.PathLike[str]]:
    """Return the folders of ``root`` as a list, empty for None.

    Raises:
        InputError: ``root`` is neither a path nor a non-empty list or tuple of paths.
    """
    if root is None:
        return []
    folders = [root] if isinstance(root, str | os.PathLike) else root
    is_list = isinstance(folders, list | tuple) and all(isinstance(folder, str | os.PathLike) for folder in folders)
    if not is_list or not folders:
        raise InputError(f"root must be a folder or a list of at least one folder, got {root!r}; or pass None")
    return list(folders)


def without_repeats(paths: Iterable[Path]) -> list[Path]:
    """Return the paths in order, without those that lead to the same place as an earlier one."""
    by_place: dict[str, Path] = {}
    for path in paths:
        by_place.setdefault(os.path.realpath(path), path)
    return list(by_place.values())


def joined_names(paths: Sequence[Path]) -> str:
    """Return the paths as a list for error messages: "A", "A and B", "A, B and C"."""
    *others, last = map(str, paths)
    return f"{', '.join(others)} and {last}" if others else last
