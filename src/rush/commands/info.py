"""``rush info``: the state of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rush.choices import TRAININGS, Stage
from rush.commands.run_folders import open_run
from rush.commands.terminal import Json, print_json, print_table

if TYPE_CHECKING:
    from rush.records.folder import RunFolder


def info(folder: Path, *, json: Json = False) -> None:
    """Show a run: data, network, labels, dates, size, finished stages and figures.

    Args:
        folder: Run folder.
    """
    from rush.records.read_run import read_run
    from rush.reporting.values import folder_size, run_value
    from rush.reporting.wording import about_rows, size_text, summary_rows

    run = open_run(folder)
    results = read_run(folder)
    if json:
        print_json(run_value(results))
        return
    states = [(stage, _state(run, stage)) for stage in run.recipe.stages]
    about = [*about_rows(results), ("size", size_text(folder_size(folder)))]
    print_table((f"{run.recipe.name}: {folder}", ""), [*about, *states, *summary_rows(results)])


def _state(run: RunFolder, stage: Stage) -> str:
    """Return whether a stage is finished and, if it trains for a number of minutes, its number of epochs."""
    state = "finished" if run.finished(stage) else "not finished"
    if stage not in TRAININGS:
        return state
    budget, minutes = run.budget(stage), run.recipe.training(stage).minutes
    if budget is not None:
        state += f", {budget['epochs']} epochs for {budget['minutes']:g} minutes"
    return state if minutes is None else f"{state}, as many epochs as fit into {minutes:g} minutes"
