"""Figures of runs and comparisons as plain numbers and text, as the commands print them with ``--json``."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rush.records.ladder import CurvePoint, Ladder, Rung
from rush.records.read_run import RunResults
from rush.reporting.compare import Comparison
from rush.reporting.costs import training_cost


def run_value(results: RunResults) -> dict[str, Any]:
    """Return everything that the files of a run state, with None for what is not finished."""
    return {
        **_compared_value(results),
        "recipe": dict(results.recipe),
        "provenance": dict(results.provenance),
        "missing": list(results.missing),
        "bytes": folder_size(results.folder),
        "stages": {stage: dict(record.fields) for stage, record in results.stages.items()},
        "certificates": None if results.certificates is None else results.certificates.to_dict(),
        "audit": None if results.audit is None else results.audit.to_json(),
    }


def folder_size(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def ladder_value(ladder: Ladder) -> dict[str, Any]:
    """Return the figures of an attack stage."""
    return {
        "norm": ladder.norm,
        "epsilon": ladder.epsilon,
        "images": len(ladder.clean),
        "alpha": ladder.alpha,
        "max_votes": ladder.max_votes,
        "rungs": list(map(_rung_value, ladder.rungs)),
        "combined": asdict(ladder.combined),
        "curve": None if ladder.curve is None else list(map(_point_value, ladder.curve.points)),
        "sandwich": asdict(ladder.sandwich),
    }


def comparison_value(comparison: Comparison | None, runs: Sequence[RunResults]) -> dict[str, Any]:
    """Return a comparison with the figures of each log at its radii, and the runs among the logs."""
    logs = () if comparison is None else comparison.logs
    radii = () if comparison is None else comparison.radii
    return {
        "radii": list(radii),
        "logs": [
            {"name": log.name, "path": str(log.path), "dataset": log.dataset, **log.certificates.to_dict(radii)}
            for log in logs
        ],
        "pairs": [] if comparison is None else list(map(asdict, comparison.pairs)),
        "runs": list(map(_compared_value, runs)),
    }


def _compared_value(results: RunResults) -> dict[str, Any]:
    cost, ladder = training_cost(results), results.ladder
    return {
        "name": results.name,
        "folder": str(results.folder),
        "training": None if cost is None else asdict(cost),
        "attacks": None if ladder is None else ladder_value(ladder),
    }


def _rung_value(rung: Rung) -> dict[str, Any]:
    return {
        "name": rung.name,
        "label": rung.label,
        "broken": int(rung.broken.sum()),
        "held": int(rung.held.sum()),
        "undecided": rung.undecided,
        "robust_accuracy": asdict(rung.accuracy),
        "robust_accuracy_lower": asdict(rung.accuracy_lower),
        "settings": dict(rung.settings),
    }


def _point_value(point: CurvePoint) -> dict[str, Any]:
    return {**asdict(point), "robust_accuracy": asdict(point.accuracy)}
