"""Progress with rate, remaining time and running figures: a bar on a terminal, else a line every so often."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

_FAST = 10  # units per second from which on a rate has no decimals


class Advance(Protocol):
    """Report that a number of units is done, with running figures in words."""

    def __call__(self, done: int, note: str = "") -> None: ...


@dataclass(frozen=True)
class Shown:
    """A way of showing progress.

    Attributes:
        bars: whether a terminal gets a bar.
        every: seconds between two lines where there is no bar, None for no lines.
    """

    bars: bool = True
    every: float | None = None


NOTHING, _BARS = Shown(bars=False), Shown()
_shown: ContextVar[Shown] = ContextVar("shown", default=_BARS)
_part: ContextVar[str] = ContextVar("part", default="")


@contextmanager
def showing(shown: Shown | None) -> Iterator[None]:
    """Show progress as ``shown`` within the context; None changes nothing."""
    token = _shown.set(_shown.get() if shown is None else shown)
    try:
        yield
    finally:
        _shown.reset(token)


def asked(progress: bool | None) -> Shown | None:
    """Return how the ``progress`` argument of a library call shows it: a bar or lines, nothing, or as before (None)."""
    if progress is None:
        return None
    return Shown(every=10.0) if progress else NOTHING


@contextmanager
def part_of(number: int, total: int, what: str) -> Iterator[None]:
    """Begin the progress within the context with e.g. "rung 3 of 9, "; ``number`` counts from 1."""
    token = _part.set(f"{what} {number} of {total}, ")
    try:
        yield
    finally:
        _part.reset(token)


@contextmanager
def progress(description: str, total: int, unit: str = "images", start: int = 0) -> Iterator[Advance]:
    """Show progress within the context, advanced by calls of the yielded function with a number of units.

    Args:
        description: text before the figures.
        total: number of units.
        unit: plural name of a unit.
        start: number of units done earlier, in a resumed stage.
    """
    shown, description = _shown.get(), _part.get() + description
    if shown.bars and sys.stderr.isatty():
        with _bar(description, total, unit, start) as advance:
            yield advance
    elif shown.every is not None:
        yield _Lines(description, total, unit, start, shown.every)
    else:
        yield lambda _done, _note="": None


class _Lines:
    """Write lines of progress, with at least ``every`` seconds between two."""

    def __init__(self, description: str, total: int, unit: str, start: int, every: float) -> None:
        self._description, self._total, self._unit, self._start, self._every = description, total, unit, start, every
        self._done, self._note = start, ""
        self._began = self._last = time.monotonic()

    def __call__(self, done: int, note: str = "") -> None:
        self._done, self._note = self._done + done, note or self._note
        now = time.monotonic()
        if now - self._last < self._every:
            return
        self._last = now
        rate = (self._done - self._start) / (now - self._began)
        left = f", {_clock((self._total - self._done) / rate)} left" if rate > 0 else ""
        sys.stderr.write(
            f"{self._description}: {self._done:,} of {self._total:,} {self._unit}, {_rate(rate)} {self._unit}/s{left}"
            f"{', ' if self._note else ''}{self._note}\n"
        )
        sys.stderr.flush()


@contextmanager
def _bar(description: str, total: int, unit: str, start: int) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{{task.fields[rate]}} {unit}/s"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total, completed=start, rate="-", note="")

        def advance(done: int, note: str = "") -> None:
            bar.advance(task, done)
            elapsed = bar.tasks[0].elapsed or 0.0
            if elapsed > 0:
                bar.update(task, rate=_rate((bar.tasks[0].completed - start) / elapsed))
            if note:
                bar.update(task, note=note)

        yield advance


def _rate(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= _FAST else f"{rate:.2g}"


def _clock(seconds: float) -> str:
    """Return a duration as h:mm:ss, as the bar shows it."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
