"""Progress with rate, remaining time and running figures: a bar on a terminal, otherwise lines at intervals."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

_FAST = 10  # rates of at least this many units per second have no decimals


class Advance(Protocol):
    """Report that a number of units is done, with running figures in words.

    Units that were ``done_earlier``, whose results are read from disk, do not count towards the rate.
    """

    def __call__(self, done: int, note: str = "", done_earlier: bool = False) -> None: ...


def no_progress(done: int, note: str = "", done_earlier: bool = False) -> None:
    """Show nothing."""


@dataclass(frozen=True)
class Shown:
    """A way of showing progress.

    Attributes:
        bars: whether a terminal gets a bar.
        every: seconds between two lines where there is no bar, None for no lines.
    """

    bars: bool = True
    every: float | None = None


class Parts:
    """Long parts of one piece of work, such as the rungs of a ladder, with the time left for all of them together.

    Args:
        what: names a part.
        works: the work of each part, in any unit, from which the time left is extrapolated.
    """

    def __init__(self, what: str, works: Sequence[float]) -> None:
        self._what, self._works, self._number = what, works, 0
        self._finished = self._earlier = 0.0
        self._began = time.monotonic()

    @contextmanager
    def next(self) -> Iterator[None]:
        """Begin the next part within the context, where progress is prefixed with e.g. "rung 3 of 9, "."""
        self._number += 1
        token = _part.set(self)
        try:
            yield
        finally:
            _part.reset(token)
            self._finished += self._work

    @property
    def label(self) -> str:
        return f"{self._what} {self._number} of {len(self._works)}, "

    def done_earlier(self, share: float) -> None:
        """Note that the results of this share of the current part were read from disk."""
        self._earlier += share * self._work

    def seconds_left(self, share: float) -> float | None:
        """Return the time left for all parts, where ``share`` of the current one is done, or None if unknown."""
        done = self._finished + share * self._work
        new = done - self._earlier
        return (time.monotonic() - self._began) * (sum(self._works) - done) / new if new > 0 else None

    @property
    def _work(self) -> float:
        return self._works[self._number - 1]


NOTHING, _BARS = Shown(bars=False), Shown()
_shown: ContextVar[Shown] = ContextVar("shown", default=_BARS)
_part: ContextVar[Parts | None] = ContextVar("part", default=None)


@contextmanager
def showing(shown: Shown | None) -> Iterator[None]:
    """Show progress as ``shown`` within the context. None changes nothing."""
    token = _shown.set(_shown.get() if shown is None else shown)
    try:
        yield
    finally:
        _shown.reset(token)


def asked(progress: bool | None) -> Shown | None:
    """Return how a library call shows its progress: a bar or lines (True), nothing (False), or as before (None)."""
    if progress is None:
        return None
    return Shown(every=10.0) if progress else NOTHING


@contextmanager
def progress(description: str, total: int, unit: str = "images", start: int = 0) -> Iterator[Advance]:
    """Show progress within the context, advanced by calls of the yielded function with a number of units.

    Args:
        description: text before the figures.
        total: number of units.
        unit: plural name of a unit.
        start: number of units done earlier, in a resumed stage.
    """
    shown, counted = _shown.get(), _Counted(description, total, unit, start, _part.get())
    if shown.bars and sys.stderr.isatty():
        with _bar(counted) as advance:
            yield advance
    elif shown.every is not None:
        yield _lines(counted, shown.every)
    else:
        yield no_progress


class _Counted:
    """The units done so far, their rate, and the time left."""

    def __init__(self, description: str, total: int, unit: str, start: int, part: Parts | None) -> None:
        self.description, self.total, self.unit = ("" if part is None else part.label) + description, total, unit
        self.done = start
        self.note = ""
        self._earlier, self._part, self._began = start, part, time.monotonic()

    def add(self, done: int, note: str, done_earlier: bool) -> None:
        self.done, self.note = self.done + done, note or self.note
        if done_earlier:
            self._earlier += done
            if self._part is not None:
                self._part.done_earlier(done / self.total)

    @property
    def rate(self) -> float:
        """Units per second, 0 before the first."""
        seconds = time.monotonic() - self._began
        return (self.done - self._earlier) / seconds if seconds > 0 else 0.0

    @property
    def left(self) -> str:
        """The time left, and that of all parts, or an empty text."""
        if self.rate <= 0:
            return ""
        seconds = (self.total - self.done) / self.rate
        of_all = None if self._part is None else self._part.seconds_left(self.done / self.total)
        return f"{_clock(seconds)} left" + ("" if of_all is None else f", {_clock(max(seconds, of_all))} in all")


def _lines(counted: _Counted, every: float) -> Advance:
    """Return a function that writes lines of progress, with at least ``every`` seconds between two lines."""
    last = time.monotonic()

    def advance(done: int, note: str = "", done_earlier: bool = False) -> None:
        nonlocal last
        counted.add(done, note, done_earlier)
        now = time.monotonic()
        if now - last < every:
            return
        last, unit = now, counted.unit
        figures = f"{counted.done:,} of {counted.total:,} {unit}, {_rate(counted.rate)} {unit}/s"
        sys.stderr.write(f"{counted.description}: {', '.join(filter(None, (figures, counted.left, counted.note)))}\n")
        sys.stderr.flush()

    return advance


@contextmanager
def _bar(counted: _Counted) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.table import Column

    digits = len(str(counted.total))
    columns = (  # a narrow terminal truncates the figures
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
        BarColumn(bar_width=12),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * digits + 1)),
        TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=True)),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(counted.description, total=counted.total, completed=counted.done, figures="")

        def advance(done: int, note: str = "", done_earlier: bool = False) -> None:
            counted.add(done, note, done_earlier)
            rate = f"{_rate(counted.rate)} {counted.unit}/s"
            figures = ", ".join(filter(None, (rate, counted.left, counted.note)))
            bar.update(task, completed=counted.done, figures=figures)

        yield advance


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= _FAST else f"{rate:.2g}"


def _clock(seconds: float) -> str:
    """Return a duration as h:mm:ss, as the bar shows it."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
