"""The user's cache folder: what would otherwise be computed again in every process. It may be deleted at any time."""

import os
from pathlib import Path

VARIABLE = "RUSH_CACHE"
"""Environment variable that names another folder, or "off"."""


def user_cache(part: str) -> Path | None:
    """Return the folder of one part of the cache, which need not exist, or None where nothing is kept."""
    import pooch

    named = os.environ.get(VARIABLE)
    if named == "off":
        return None
    return (Path(named) if named else Path(pooch.os_cache("rush"))) / part
