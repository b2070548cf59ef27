"""The user's cache folder, for results that every process would otherwise recompute. It may be deleted at any time."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from rush.errors import RushError
from rush.runtime.files import write_atomically

VARIABLE = "RUSH_CACHE"
"""Environment variable that names another folder, or "off"."""


def user_cache(part: str) -> Path | None:
    """Return the folder of one part of the cache, which need not exist, or None where nothing is kept."""
    import pooch

    named = os.environ.get(VARIABLE)
    if named == "off":
        return None
    return (Path(named) if named else Path(pooch.os_cache("rush"))) / part


def cache_file(part: str, facts: object, suffix: str) -> Path | None:
    """Return the file of ``part`` whose name changes with ``facts``, JSON values, or None where nothing is kept."""
    folder = user_cache(part)
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    return None if folder is None else folder / f"{name}{suffix}"


def keep(file: Path, write: Callable[[Path], object]) -> None:
    """Fill ``file`` by ``write``, as ``write_atomically`` does. Where this is not possible, nothing is kept."""
    own = file.with_suffix(f".{os.getpid()}")  # several processes may write the same file
    try:
        write_atomically(own, write)
        own.replace(file)
    except (OSError, RushError):
        with suppress(OSError):
            own.unlink()
