"""``rush ladder``: a model under increasingly strong attacks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from rush.commands.external import NO_EVALUATION, ExternalEvaluation
from rush.commands.run_folders import Overrides, Redo, open_run, print_once
from rush.commands.terminal import Json, print_json, print_notes, print_table

if TYPE_CHECKING:
    from rush.evaluation.result import AttackResult
    from rush.records.folder import RunFolder

HEADER = ("attacker", "passes + forward", "accuracy", "held", "vs. previous rung", "time")


def ladder(
    folder: Path | None = None,
    *,
    external: ExternalEvaluation = NO_EVALUATION,
    overrides: Overrides = None,
    redo: Redo = False,
    json: Json = False,
) -> None:
    """Evaluate a model under a ladder of increasingly strong attacks. Takes a run (this is its attack stage) or any
    model.

    Args:
        folder: Run folder; or give --model and --data.
    """
    if folder is not None:
        _run_ladder(open_run(folder, external.data_of_run(), overrides, "attack" if redo else None), json)
        return
    from rush.reporting.wording import percent

    results = []
    for result in external.run_ladder():
        results.append(result)
        print_notes([f"{result.plan.label}: {percent(result.robust_accuracy)}"])
    if json:
        print_json([result.to_dict() for result in results])
        return
    title = f"{external.model}, {external.norm} {external.epsilon}, {len(results[0])} images"
    print_table(HEADER, rung_rows(results), title)


def _run_ladder(run: RunFolder, json: bool) -> None:
    from rush.pipeline.stages import run_stage
    from rush.records.read_run import read_run
    from rush.reporting.values import ladder_value
    from rush.reporting.wording import count, count_or_dash, duration, points, share

    run_stage(run, "attack", print_once)
    ladder = read_run(run.path).ladder
    assert ladder is not None
    if json:
        print_json(ladder_value(ladder))
        return
    steps = ("–", *(points(rung.above(previous)) for previous, rung in pairwise(ladder.rungs)))
    cells = [
        (
            rung.label,
            count(rung.spent("passes_per_image")),
            share(rung.accuracy),
            share(rung.accuracy_lower),
            count_or_dash(rung.undecided),
            step,
            duration(rung.spent("seconds")),
        )
        for rung, step in zip(ladder.rungs, steps, strict=True)
    ]
    header = ("attacker", "passes", "accuracy", "held", "undecided", "vs. previous rung", "time")
    print_table(header, cells, str(run.path))


def rung_rows(results: Sequence[AttackResult]) -> list[tuple[str, ...]]:
    """Return a row under ``HEADER`` per rung, each with its paired difference to the rung before."""
    from rush.reporting.wording import count, duration, percent, points, share
    from rush.statistics import paired_difference

    steps = [points(paired_difference(~after.broken, ~before.broken)) for before, after in pairwise(results)]
    return [
        (
            result.plan.label,
            f"{count(result.budget['passes_per_image'])} + {count(result.budget['forward_passes_per_image'])}",
            share(result.interval),
            percent(result.robust_accuracy_lower),
            step,
            duration(float(result.seconds.sum())),
        )
        for result, step in zip(results, ["", *steps], strict=True)
    ]
