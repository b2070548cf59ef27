"""Progress bars with rates and remaining time, silent when standard error is not a terminal."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(description: str, total: int, unit: str = "images", start: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a progress bar within the context, advanced by calls of the yielded function with a number of units.

    Args:
        description: text before the bar.
        total: number of units.
        unit: plural name of a unit.
        start: number of units done earlier, in a resumed stage.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda _: None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{{task.fields[rate]}} {unit}/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, completed=start, rate="-")

        def advance(done: int) -> None:
            bar.advance(task, done)
            elapsed = bar.tasks[0].elapsed or 0.0
            if elapsed > 0:
                rate = (bar.tasks[0].completed - start) / elapsed
                bar.update(task, rate=f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}")

        yield advance
