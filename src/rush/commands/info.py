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
    """Show the state of a run: recipe, finished stages and figures.

    Args:
        folder: Run folder.
    """
    from rush.records.read_run import read_run
    from rush.reporting.values import run_value
    from rush.reporting.wording import summary_rows

    run = open_run(folder)
    if json:
        print_json(run_value(read_run(folder)))
        return
    states = [(stage, _state(run, stage)) for stage in run.recipe.stages]
    print_table((f"{run.recipe.name}: {folder}", ""), [*states, *summary_rows(read_run(folder))])


def _state(run: RunFolder, stage: Stage) -> str:
    """Return whether a stage is finished and, if it trains for a number of minutes, its number of epochs."""
    state = "finished" if run.finished(stage) else "not finished"
    if stage not in TRAININGS:
        return state
    budget, minutes = run.budget(stage), run.recipe.training(stage).minutes
    if budget is not None:
        state += f", {budget['epochs']} epochs for {budget['minutes']:g} minutes"
    return state if minutes is None else f"{state}, as many epochs as fit into {minutes:g} minutes"
