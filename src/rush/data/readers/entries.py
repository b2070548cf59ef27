"""What lies in a folder: its entries without those of the system, and word of what is left out."""

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
"""Names that operating systems and file servers give to entries of their own, in lower case."""

_NOTES = frozenset(
    {".txt", ".md", ".rst", ".json", ".jsonl", ".yaml", ".yml", ".csv", ".tsv", ".xml", ".html", ".pdf", ".log", ".py"}
)
"""Files that describe a data set; with them those named README or LICENSE."""


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
    """Return the folders in ``folder``, also those that are links, as ``list_entries`` does."""
    return [Path(entry.path) for entry in list_entries(folder) if entry.is_dir()]


def warn_of_omitted(folder: Path, omitted: Sequence[Path], what: str) -> None:
    """Give one DataWarning for all entries of ``omitted`` but notes (.txt, .json, README, ...), counted by suffix.

    Args:
        folder: What was read.
        omitted: The entries in it that were not.
        what: What such an entry is not, e.g. "images".
    """
    omitted = [path for path in omitted if not _is_note(path)]
    if not omitted:
        return
    counts = Counter(path.suffix.lower() or "no suffix" for path in omitted)
    listed = ", ".join(f"{count} with {suffix}" for suffix, count in counts.most_common(8))
    text = (
        f"{folder}: {len(omitted)} entries are omitted, not being {what} ({listed}), the first is {omitted[0]}; "
        "remove them, or convert what should be read"
    )
    warnings.warn(text, DataWarning, stacklevel=2)


def describe_kind(path: Path) -> str:
    """Return what ``path`` is where it is not a file that can be read."""
    if path.is_dir():
        return "a directory"
    if path.is_symlink() and not path.exists():
        return "a link to nothing"
    return "a pipe, socket or device" if path.exists() else "missing"


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _SYSTEM


def _is_note(path: Path) -> bool:
    return path.suffix.lower() in _NOTES or path.stem.upper() in ("README", "LICENSE", "LICENCE")
