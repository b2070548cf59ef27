"""The folders in which a data set is looked for: one, or several that hold parts of it."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from rush.errors import InputError

Root = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None
"""One folder, several, or None for the default."""


def root_folders(root: Root) -> list[str | os.PathLike[str]]:
    """Return the folders of ``root`` as a list, empty for None.

    Raises:
        InputError: ``root`` is neither a path nor a non-empty sequence of paths.
    """
    if root is None:
        return []
    folders = [root] if isinstance(root, str | os.PathLike) else root
    if not isinstance(folders, list | tuple) or not folders or not all(map(_is_path, folders)):
        raise InputError(f"root must be a folder or a list of at least one folder, got {root!r}; or pass None")
    return list(folders)


def without_repeats(paths: Iterable[Path]) -> list[Path]:
    """Return the paths in their order, of several that lead to the same place only the first."""
    places: dict[str, Path] = {}
    for path in paths:
        places.setdefault(os.path.realpath(path), path)
    return list(places.values())


def joined_names(paths: Sequence[Path]) -> str:
    """Return the paths as a list for an error text: "A", "A and B", "A, B and C"."""
    *others, last = map(str, paths)
    return f"{', '.join(others)} and {last}" if others else last


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike)
