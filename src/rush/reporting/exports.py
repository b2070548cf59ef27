"""Figures and tables of a page as CSV and LaTeX, in links that hold their content.

A link holds a few kilobytes, so the page remains a single file. A figure is not stored a second time as an SVG file.
The page's script makes that file from the drawing in the page, which keeps the page small.
"""

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from rush.reporting.wording import share
from rush.runtime.lines import printable
from rush.statistics import Interval

Value = str | int | float | Interval | None
_SAFE = ",()[]/:;=-_.!*"
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "–": "--", "−": "$-$", "ℓ": r"$\ell$", "∞": r"$_\infty$",
    "σ": r"$\sigma$", "ε": r"$\varepsilon$", "α": r"$\alpha$", "≥": r"$\ge$", "≤": r"$\le$", "×": r"$\times$",
    "·": r"$\cdot$", "…": r"\dots{}", "“": "``", "”": "''", "’": "'",
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """The values of one figure or table.

    Attributes:
        name: name of its files, without an extension.
        rows: rows as long as ``header``. Fractions are numbers, and an interval is one value.
        curve: whether it is drawn over its first column, which then holds numbers.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[Value, ...]]
    curve: bool = False

    @property
    def csv_uri(self) -> str:
        return _uri(csv_text(self), "text/csv")

    @property
    def latex_uri(self) -> str:
        return _uri(latex_text(self), "application/x-tex")


def csv_text(data: Data) -> str:
    """Return the values as CSV, with all digits of each number.

    An interval becomes the columns NAME, NAME low and NAME high. None becomes an empty cell.
    """
    intervals = [any(isinstance(row[place], Interval) for row in data.rows) for place in range(len(data.header))]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    parts = [("", " low", " high") if wide else ("",) for wide in intervals]
    writer.writerow([f"{printable(name)}{part}" for name, own in zip(data.header, parts, strict=True) for part in own])
    for row in data.rows:
        writer.writerow([cell for value, wide in _zip(row, intervals) for cell in _cells(value, wide)])
    return buffer.getvalue()


def latex_text(data: Data) -> str:
    """Return LaTeX: a table for the package booktabs or, for a curve, a plot for the package pgfplots."""
    return "\n".join([f"% {_one_line(data.title)}", *(_latex_plot(data) if data.curve else _latex_table(data))]) + "\n"


def _latex_table(data: Data) -> Iterator[str]:
    yield r"\begin{tabular}{l" + "r" * (len(data.header) - 1) + "}"
    yield r"\toprule"
    yield _latex_row(data.header)
    yield r"\midrule"
    yield from (_latex_row(row) for row in data.rows)
    yield r"\bottomrule"
    yield r"\end{tabular}"


def _latex_row(row: Sequence[Value]) -> str:
    return " & ".join(_latex(_text(value)) for value in row) + r" \\"


def _latex_plot(data: Data) -> Iterator[str]:
    """Yield one curve per column after the first, without the rows in which it is empty."""
    yield r"\begin{tikzpicture}"
    yield rf"\begin{{axis}}[xlabel={{{_latex(data.header[0])}}}]"
    for place, name in enumerate(data.header[1:], start=1):
        points = [(row[0], row[place]) for row in data.rows if row[place] is not None]
        yield r"\addplot coordinates {" + " ".join(f"({_plain(x)},{_plain(y)})" for x, y in points) + "};"
        yield rf"\addlegendentry{{{_latex(name)}}}"
    yield r"\end{axis}"
    yield r"\end{tikzpicture}"


def _cells(value: Value, wide: bool) -> list[str]:
    if not wide:
        return [_plain(value)]
    ends = (value.estimate, value.low, value.high) if isinstance(value, Interval) else (value, None, None)
    return [_plain(end) for end in ends]


def _plain(value: Value) -> str:
    if isinstance(value, Interval):
        return _plain(value.estimate)
    return "" if value is None else f"{value:.10g}" if isinstance(value, float) else printable(str(value))


def _text(value: Value) -> str:
    if isinstance(value, Interval):
        return share(value)
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in _one_line(text))


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


def _zip(values: Sequence[Value], flags: Sequence[bool]) -> Iterator[tuple[Value, bool]]:
    yield from zip(values, flags, strict=True)


def _uri(text: str, kind: str) -> str:
    return f"data:{kind};charset=utf-8,{quote(text, safe=_SAFE)}"
