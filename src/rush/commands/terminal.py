"""Lines and tables on a terminal, in a pipe or in a file. rich is imported when something is printed.

All text passes ``printable`` and is printed as it is: names from outside neither end a line nor move the cursor, and
nothing in them is read as markup or as an emoji.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from rush.runtime.lines import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

Json = Annotated[bool, Parameter(negative=(), help="Print JSON, whose keys docs/commands.md lists.")]
"""Option of the commands that print figures."""
_UNLIMITED = 10_000  # wider than any table
_SEPARATOR = len(" | ")


quiet = False
"""Whether nothing but results and errors is printed; set once by the program."""


def print_notes(lines: Iterable[str]) -> None:
    """Print lines on progress on standard error, unless the program is quiet."""
    if not quiet:
        print_lines(lines, stderr=True)


def print_lines(lines: Iterable[str], stderr: bool = False) -> None:
    """Print each of ``lines`` on standard output or standard error."""
    console = _console(stderr)
    for line in lines:
        console.print(_text(line), soft_wrap=True)


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table, in a pipe or file as wide as it is.

    On a terminal that is too narrow for its words it becomes several tables, one below the other, each with the first
    column.
    """
    from rich.table import Table

    console = _console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = _UNLIMITED
    columns = [tuple(map(printable, column)) for column in zip(header, *rows, strict=True)]
    for part in _parts(columns, console.width):
        table = Table(title=None if title is None else _text(title), title_justify="left", show_edge=False)
        for column, width in zip(part, _widths(part, console.width), strict=True):
            table.add_column(_text(column[0]), width=width)
        for row in zip(*(column[1:] for column in part), strict=True):
            table.add_row(*map(_text, row))
        console.print(table)


def print_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table on a terminal, and elsewhere one line per row without the header, its cells separated by tabs."""
    if _console().is_terminal:
        print_table(header, rows)
    else:
        sys.stdout.writelines("\t".join(map(printable, row)) + "\n" for row in rows)


def print_csv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print comma-separated values (RFC 4180), None as an empty field."""
    import csv

    writer = csv.writer(sys.stdout)
    writer.writerow(header)
    writer.writerows([["" if cell is None else printable(str(cell)) for cell in row] for row in rows])


def print_json(value: object) -> None:
    """Print ``value`` as JSON in ASCII, NaN and infinity as null."""
    import json

    sys.stdout.write(json.dumps(_finite(value), indent=2) + "\n")


def _finite(value: object) -> object:
    """Return ``value`` with None for every number that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return list(map(_finite, value)) if isinstance(value, list | tuple) else value


def _console(stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def _text(text: str) -> Text:
    from rich.text import Text

    return Text(printable(text))


def _parts(columns: Sequence[tuple[str, ...]], width: int) -> list[list[tuple[str, ...]]]:
    """Return the columns in groups that fit ``width`` without breaking a word, each led by the first column."""
    first, *others = columns
    parts = [[first]]
    for column in others:
        least = sum(_longest_word(member) + _SEPARATOR for member in (*parts[-1], column))
        if least > width and len(parts[-1]) > 1:
            parts.append([first])
        parts[-1].append(column)
    return parts


def _widths(columns: Sequence[tuple[str, ...]], width: int) -> list[int]:
    """Return a width per column: its longest word, and up to its longest cell from an equal share of what is left.

    Columns that need the least beyond their longest word are served first. What they do not need goes to the others.
    """
    widths = [_longest_word(column) for column in columns]
    missing = [max(map(len, column)) - least for column, least in zip(columns, widths, strict=True)]
    spare = max(0, width - sum(least + _SEPARATOR for least in widths))
    for served, index in enumerate(sorted(range(len(columns)), key=missing.__getitem__)):
        added = min(missing[index], spare // (len(columns) - served))
        widths[index] += added
        spare -= added
    return widths


def _longest_word(column: tuple[str, ...]) -> int:
    return max(len(word) for cell in column for word in (*cell.split(), ""))
