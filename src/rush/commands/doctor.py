"""``rush doctor``: what this machine offers, and what is missing."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import rush
from rush.commands.run_folders import data_roots
from rush.commands.terminal import Json, print_json, print_table
from rush.errors import ConfigError, DataError

_EXTRAS = {
    "pandas": "to_pandas() of certificates and attack results",
    "pyautoattack": "the original AutoAttack beside this one",
    "pynvml": "energy of an NVIDIA GPU in the logs",
}
_MISSING = "not installed"


def doctor(*, data: list[Path] | None = None, json: Json = False) -> None:
    """Show what this machine offers: device, precision, threads, versions, data sets found, optional packages.

    Args:
        data: Folder in which to look for data sets; repeatable. By default RUSH_DATA, else the cache folder.
    """
    found = dict(_findings(data_roots(data)))
    if json:
        print_json(found)
    else:
        print_table(("", "this machine"), list(found.items()))


def _findings(root: str | list[str] | None) -> Iterator[tuple[str, str]]:
    """Yield names and texts of what was found."""
    import torch

    from rush.records.folder import commit
    from rush.runtime.execution import decide_execution
    from rush.runtime.machine import machine

    here, execution = machine(), decide_execution("auto", "auto")
    source = commit()
    yield "rush", rush.__version__ + (f", commit {source}" if source else "")
    yield "python", f"{sys.version.split()[0]}, {here['system']}"
    yield "processor", f"{here['processor']}, {here['cores']} cores"
    yield "torch", f"{torch.__version__}, {torch.get_num_threads()} threads"
    name = f" ({torch.cuda.get_device_name()})" if execution.device == "cuda" else ""
    yield "device", f"{execution.device}{name}"
    yield "precision", f"{execution.precision}, {'channels_last' if execution.channels_last else 'contiguous'}"
    yield "8-bit integers", _integers_text()
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    yield "C++ compiler", compiler or "none: execution.compile has no effect on the CPU"
    for data_set in ("cifar10", "cifar100", "stl10"):
        yield data_set, _place_of(data_set, root)
    yield "decoded images", _cache_text()
    for package, purpose in _EXTRAS.items():
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            yield package, f"{_MISSING}; it is for {purpose}"


def _integers_text() -> str:
    """Return whether networks can be computed in 8-bit integers (``execution.precision = "int8"``)."""
    from rush.runtime.execution import check_integers

    try:
        check_integers("cpu")
    except ConfigError as error:
        return f"no: {error}"
    return "yes, on the CPU"


def _cache_text() -> str:
    """Return where decoded images are kept, and their size."""
    from rush.reporting.values import folder_size
    from rush.reporting.wording import size_text
    from rush.runtime.user_cache import user_cache

    folder = user_cache("decoded")
    if folder is None:
        return "none are kept"
    return f"{size_text(folder_size(folder))} in {folder}, which may be deleted"


def _place_of(name: str, root: str | list[str] | None) -> str:
    """Return where a data set lies, or what the next command that needs it would do."""
    from rush.data.sources import find_official

    try:
        place = find_official(name, root)
    except DataError as error:
        return str(error)
    return str(place) if place is not None else "not found; it is downloaded when it is needed"
