"""Tab-separated tables, read cell by cell with errors that name the line."""

import math
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from rush.errors import DataError, RunError
from rush.records.record import check_format

_WHOLE = re.compile(r"-?[0-9]{1,18}")
_REAL = re.compile(r"[0-9]+(\.[0-9]*)?(e[+-]?[0-9]+)?", re.IGNORECASE)
T = TypeVar("T")


@dataclass(frozen=True)
class Table:
    """Cells of a table by column. Its errors have the type ``error`` and end with ``ending``, the remedy."""

    path: Path
    cells: dict[str, list[str]]
    ending: str
    error: type[RunError] | type[DataError] = RunError

    @classmethod
    def parse(
        cls, path: Path, lines: Sequence[str], ending: str, error: type[RunError] | type[DataError] = RunError
    ) -> "Table":
        """Return the table in ``lines``, the first of which names the columns.

        Raises: ``error`` if a column is a duplicate, no line follows, or a line has a different number of fields.
        """
        names = lines[0].split("\t")
        table = cls(path, {}, ending, error)
        if len(set(names)) < len(names):
            table.refuse(-1, "duplicate column")
        if len(lines) < 2:
            table.refuse(-1, "no image follows")
        rows = [line.split("\t") for line in lines[1:]]
        for row, fields in enumerate(rows):
            if len(fields) != len(names):
                table.refuse(row, f"{len(fields)} fields instead of {len(names)}")
        table.cells.update(zip(names, map(list, zip(*rows, strict=True)), strict=True))
        return table

    def check_format(self, newest: int) -> None:
        """Raise RunError if the column ``format`` exists and has a newer format than ``newest``."""
        for text in dict.fromkeys(self.cells.get("format", ())):
            check_format(self.path, int(text) if re.fullmatch("[0-9]{1,9}", text) else text, newest)

    def whole(self, column: str) -> NDArray[np.int64]:
        """Return the whole numbers of ``column``, int64 (N,)."""
        return np.array(self.parsed(column, _whole), np.int64)

    def real(self, column: str) -> NDArray[np.float64]:
        """Return the finite numbers >= 0 of ``column``, float64 (N,)."""
        return np.array(self.parsed(column, parse_real), np.float64)

    def parsed(self, column: str, parse: Callable[..., T], *arguments: Iterable[object]) -> list[T]:
        """Return the result of ``parse`` for each cell of ``column`` and the values of ``arguments`` in its row.

        Raises: ``error`` naming the first line for which ``parse`` raises a ValueError or similar.
        """
        values = []
        for row, cell in enumerate(zip(self.cells[column], *arguments, strict=True)):
            try:
                values.append(parse(*cell))
            except (ValueError, TypeError, ArithmeticError, RecursionError, zlib.error) as error:
                self.refuse(row, f"{column} {self.cells[column][row][:60]!r}: {error}")
        return values

    def check_unique(self, column: str, values: Sequence[str] | NDArray[np.int64]) -> None:
        """Refuse the first line whose value is a duplicate of an earlier one."""
        first = np.zeros(len(values), bool)
        first[np.unique(np.array(values, object), return_index=True)[1]] = True
        self.check(first, f"duplicate image, by its {column}")

    def check(self, valid: NDArray[np.bool_], what: str) -> None:
        """Refuse the first line for which ``valid`` (N,) is false."""
        if not valid.all():
            self.refuse(int(np.argmin(valid)), what)

    def refuse(self, row: int, what: str) -> NoReturn:
        raise self.error(f"{self.path}, line {row + 2}: {what}{self.ending}")


def parse_real(text: str) -> float:
    """Return the finite number >= 0 in ``text``. Raises: ValueError if it holds anything else."""
    if not _REAL.fullmatch(text) or not math.isfinite(float(text)):
        raise ValueError("not a finite number >= 0")
    return float(text)


def _whole(text: str) -> int:
    if not _WHOLE.fullmatch(text):
        raise ValueError("not a whole number")
    return int(text)
