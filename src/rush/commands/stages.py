"""``rush run``, ``pretrain``, ``teach`` and ``report``: the stages of a run."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from rush.commands.run_folders import (
    Data,
    Overrides,
    branch_run,
    create_run,
    open_run,
    print_once,
    rank_of_process,
)
from rush.commands.terminal import print_lines, print_table
from rush.errors import SandwichError

Out = Annotated[Path | None, Parameter(help="Run folder; runs/RECIPE by default.")]


def run(recipe: str, *, out: Out = None, data: Data = None, overrides: Overrides = None, quick: bool = False) -> None:
    """Run every stage: pretrain, finetune, certify, attack, audit and report. Re-running the command resumes where it
    stopped.

    Args:
        recipe: Name of a shipped recipe (see `rush recipes`), path of a .toml file, or an existing run folder.
        quick: Try the recipe in minutes: an epoch of each training, three audited images, and ten everywhere else. The
            run NAME-quick is marked as a trial, and its figures mean nothing.
    """
    folder = create_run(recipe, out, data, overrides, quick)
    from rush.pipeline.preconditions import check_run
    from rush.pipeline.stages import run_stage

    check_run(folder)
    first = rank_of_process() == 0
    try:
        for stage in folder.recipe.stages:
            run_stage(folder, stage, print_once)
    except SandwichError:
        if first:
            _print_report(folder.path)  # it lists the violations
        raise
    if first:
        _print_report(folder.path)


def pretrain(
    recipe: str, *, out: Out = None, data: Data = None, overrides: Overrides = None, weights: Path | None = None
) -> None:
    """Pre-train the encoder of a recipe in a new or existing run folder, or take its weights from a file.

    Args:
        recipe: Name of a shipped recipe, path of a .toml file, or an existing run folder.
        weights: Weights of an encoder of the recipe's architecture, safetensors or a state_dict of torch.save, e.g. of
            lightly, solo-learn or MoCo. pretrain.epochs is then 0.
    """
    overrides = overrides if weights is None else [*(overrides or []), "pretrain.epochs=0"]
    folder = create_run(recipe, out, data, overrides)
    if weights is not None:
        from rush.pipeline.train import import_encoder

        with folder.alone() if rank_of_process() == 0 else nullcontext():
            import_encoder(folder, weights, print_once)
        return
    from rush.pipeline.stages import run_stage

    run_stage(folder, "pretrain", print_once)


def teach(folder: Path, *, out: Path | None = None, data: Data = None, overrides: Overrides = None) -> None:
    """Label the images of a run whose labels are not read, by its pre-trained encoder, for a recipe with teach.rounds.

    With --out this happens in a new run, e.g. with fewer labels.

    Args:
        folder: Run folder.
        out: New run folder that begins with the encoder of this one.
    """
    target = open_run(folder, data, overrides) if out is None else branch_run(folder, out, data, overrides)
    from rush.pipeline.stages import run_stage

    run_stage(target, "teach", print_once)


def report(folder: Path) -> None:
    """Write report.html from the files of a run and print its summary.

    Args:
        folder: Run folder.
    """
    _print_report(open_run(folder).path)


def _print_report(folder: Path) -> None:
    from rush.records.read_run import read_run
    from rush.reporting.page import write_report
    from rush.reporting.wording import summary_rows

    page = write_report(folder)
    print_table(("", str(folder)), summary_rows(read_run(folder)))
    print_lines([f"report: {page}"])
