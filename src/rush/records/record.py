"""JSON objects in a run folder: format numbers, and errors that name file, field and remedy."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rush.errors import RunError
from rush.runtime.lines import read_object
from rush.runtime.numbers import as_real

# The newest format of each kind of file that this version reads, and the one that it writes. Files without a number
# predate these numbers and are read as format 1. ``audit.json`` has its own, ``auditing.report.FORMAT``.
FORMATS: Mapping[str, int] = {
    "recipe.json": 3,  # 2: smoothing.noise; 3: teach
    "provenance.json": 1,
    "stages": 1,
    "log.jsonl": 1,
    "certificates.tsv": 2,  # 2: the rule names its noise
    "attacks.tsv": 1,
}
Content = TypeVar("Content")


def check_format(file: Path, number: Any, newest: int) -> None:
    """Raise RunError unless ``number`` is a format up to ``newest``, or None for a file without a format."""
    if number is None or (type(number) is int and 1 <= number <= newest):
        return
    if type(number) is int and number > newest:
        raise RunError(
            f"{file} has format {number}, this version reads {newest}; read it with the version of RUSH that wrote it, "
            "or update this one (pip install --upgrade rush-smoothing)"
        )
    raise RunError(f"{file}: its format must be a whole number >= 1, got {number!r}; restore it from a copy")


def without_format(file: Path, kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values``, read from ``file``, without their format number. Raises: RunError if the format is newer."""
    check_format(file, values.get("format"), FORMATS[kind])
    return {key: value for key, value in values.items() if key != "format"}


def with_format(kind: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values`` preceded by the format number of their kind of file."""
    return {"format": FORMATS[kind], **values}


@dataclass(frozen=True)
class Record:
    """The ``fields`` of a JSON object in ``file``, and the ``remedy`` that the errors about it name."""

    file: Path
    fields: Mapping[str, Any]
    remedy: str

    @classmethod
    def read(cls, file: Path, remedy: str, kind: str | None = None) -> "Record":
        """Read ``file``, without its format number if its ``kind`` has one.

        Raises: RunError if the file is missing, is not a JSON object or has a newer format.
        """
        fields = read_file(file, read_object, remedy)
        return cls(file, fields if kind is None else without_format(file, kind, fields), remedy)

    def at(self, fields: Mapping[str, Any]) -> "Record":
        """Return the record of an object inside this one."""
        return replace(self, fields=fields)

    def damaged(self, what: str) -> RunError:
        return damaged(self.file, what, self.remedy)

    def number(self, key: str) -> float:
        """Return the finite number ``key``."""
        value = self.fields.get(key)
        if value is None or as_real(value) is None:
            raise self.damaged(f"{key!r} must be a finite number, got {value!r}")
        return value

    def check_numbers(self, keys: tuple[str, ...]) -> None:
        """Raise RunError if one of ``keys`` exists and is not a finite number."""
        for key in keys:
            if self.fields.get(key) is not None:
                self.number(key)

    def count(self, key: str) -> int:
        """Return the number of images ``key``."""
        value = self.fields.get(key)
        if type(value) is not int or value < 0:
            raise self.damaged(f"{key!r} must be a number of images, got {value!r}")
        return value


def damaged(file: Path, what: str, remedy: str) -> RunError:
    return RunError(f"{file} is damaged: {what}. Remedy: {remedy}.")


def read_file(file: Path, read: Callable[[Path], Content], remedy: str) -> Content:
    """Return ``read(file)``. Raises: RunError if the file is missing or cannot be read."""
    try:
        return read(file)
    except FileNotFoundError:
        raise RunError(f"{file} is missing. Remedy: {remedy}.") from None
    except json.JSONDecodeError as error:
        raise damaged(file, f"not JSON ({error})", remedy) from error
    except OSError as error:
        raise RunError(f"{file} cannot be read: {error.strerror or error}. Remedy: allow it, or {remedy}.") from error
    except ValueError as error:
        raise damaged(file, str(error), remedy) from error
