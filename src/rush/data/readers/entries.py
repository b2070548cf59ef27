"""Entries of a folder, without hidden ones and those of the system, and the warning about omitted ones."""

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rush.errors import DataError, DataWarning

_SYSTEM = frozenset(
    {"@eadir", "__macosx", "__pycache__", "#recycle", "@recycle", "$recycle.bin", "system volume information"}
    | {"lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini"}
)
"""Names, in lower case, of the entries that operating systems and file servers create."""

_NOTES = frozenset(
    {".txt", ".md", ".rst", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".tsv", ".xml", ".html", ".pdf", ".log", ".py"}
)
"""Suffixes of files that describe a data set, as those named README or LICENSE do."""


def list_entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return the entries of ``folder`` sorted by name, without hidden ones (a leading dot) and those of the system.

    Raises:
        DataError: ``folder`` cannot be listed.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not _is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be listed: {error.strerror}; allow reading it or give another folder"
        ) from error


def list_folders(folder: Path) -> list[Path]:
    """Return the folders, and links to folders, among the entries of ``folder``, or raise as ``list_entries``."""
    return [Path(entry.path) for entry in list_entries(folder) if entry.is_dir()]


def warn_of_omitted(folder: Path, omitted: Sequence[Path], what: str) -> None:
    """Give one DataWarning that counts the entries of ``omitted`` by suffix, without notes (.txt, .json, README, ...).

    Args:
        folder: the folder that was read.
        omitted: entries in it that were not read.
        what: the entries that are read, e.g. "images".
    """
    omitted = [path for path in omitted if not _is_note(path)]
    if not omitted:
        return
    counts = Counter(path.suffix.lower() or "no suffix" for path in omitted)
    listed = ", ".join(f"{count} with {suffix}" for suffix, count in counts.most_common(8))
    warnings.warn(
        f"{folder}: {len(omitted)} entries are omitted because they are not {what} ({listed}), the first is "
        f"{omitted[0]}; remove them, or convert what should be read",
        DataWarning,
        stacklevel=2,
    )


def describe_kind(path: Path) -> str:
    """Return in words what ``path`` is, given that it is not a regular file."""
    if path.is_dir():
        return "a directory"
    if path.is_symlink() and not path.exists():
        return "a broken link"
    return "a pipe, socket or device" if path.exists() else "missing"


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM


def _is_note(path: Path) -> bool:
    return path.suffix.lower() in _NOTES or path.stem.upper() in ("README", "LICENSE", "LICENCE")
