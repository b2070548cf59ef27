"""Tables and lines on the terminal, in a pipe or in a file. rich is imported only where something is printed.

Whatever is printed passes ``printable`` and is plain text: names from outside neither end a line nor move the cursor,
and nothing in them is read as markup or as an emoji.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rush.runtime.lines import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_UNLIMITED = 10_000  # a width that no table reaches
_BETWEEN = len(" | ")


def print_lines(lines: Iterable[str], stderr: bool = False, quiet: bool = False) -> None:
    """Print each of ``lines`` on standard output or standard error; nothing where ``quiet``."""
    out = _console(stderr, quiet)
    for line in lines:
        out.print(_text(line), soft_wrap=True)


def print_table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> None:
    from rich.table import Table

    table = Table(show_edge=False)
    for title in head:
        table.add_column(_text(title))
    for row in rows:
        table.add_row(*map(_text, row))
    _console().print(table)


def print_wide_table(title: str | None, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """A table, in several one below the other where its words need more columns than a terminal has; in a pipe or file
    as wide as it is."""
    from rich.table import Table

    out = _console()
    if not out.is_terminal and "COLUMNS" not in os.environ:
        out.width = _UNLIMITED
    columns = [tuple(map(printable, column)) for column in zip(header, *rows, strict=True)]
    for part in _parts(columns, out.width):
        table = Table(title=None if title is None else _text(title), title_justify="left", show_edge=False)
        for column, width in zip(part, _widths(part, out.width), strict=True):
            table.add_column(_text(column[0]), width=width)
        for row in zip(*(column[1:] for column in part), strict=True):
            table.add_row(*map(_text, row))
        out.print(table)


def _console(stderr: bool = False, quiet: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)


def _text(text: str) -> Text:
    from rich.text import Text

    return Text(printable(text))


def _parts(columns: Sequence[tuple[str, ...]], width: int) -> list[list[tuple[str, ...]]]:
    """The columns after the first in groups that fit ``width`` without a broken word, each with the first before it."""
    first, *others = columns
    parts = [[first]]
    for column in others:
        least = sum(_longest_word(held) + _BETWEEN for held in (*parts[-1], column))
        if least > width and len(parts[-1]) > 1:
            parts.append([first])
        parts[-1].append(column)
    return parts


def _widths(columns: Sequence[tuple[str, ...]], width: int) -> list[int]:
    """The longest word of each column, and up to its longest cell while ``width`` lasts, the least wishes first."""
    widths = [_longest_word(column) for column in columns]
    wishes = [max(map(len, column)) - least for column, least in zip(columns, widths, strict=True)]
    spare = max(0, width - sum(least + _BETWEEN for least in widths))
    for index in sorted(range(len(columns)), key=wishes.__getitem__):
        given = min(wishes[index], spare)
        widths[index] += given
        spare -= given
    return widths


def _longest_word(column: tuple[str, ...]) -> int:
    return max(len(word) for cell in column for word in (*cell.split(), ""))
