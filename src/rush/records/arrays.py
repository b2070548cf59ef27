"""Arrays in a run folder."""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from rush.errors import RunError
from rush.records.record import damaged


def read_arrays(file: Path, names: tuple[str, ...], remedy: str) -> dict[str, np.ndarray]:
    """Return the named arrays of an .npz file, never unpickled. Raises: RunError if it is missing or damaged."""
    if not file.exists():
        raise RunError(f"{file} is missing. Remedy: {remedy}.")
    try:
        with open(file, "rb") as opened, np.load(opened, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise damaged(file, f"it cannot be read as arrays {', '.join(names)} ({error})", remedy) from error
