"""``rush audit``: whether the evaluation of a run or of any model can be trusted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rush.choices import AuditVerdict
from rush.commands.external import NO_EVALUATION, ExternalEvaluation
from rush.commands.run_folders import Overrides, Redo, open_run, print_once, rank_of_process, refuse_existing
from rush.commands.terminal import Json, print_json, print_lines, print_notes
from rush.errors import ConfigError

if TYPE_CHECKING:
    from rush.auditing.report import AuditReport
    from rush.records.folder import RunFolder

FAILED = 3
"""Exit status for a verdict that ``--fail-on`` names."""
_WORSE: tuple[AuditVerdict, ...] = ("holds", "undecided", "overestimated")


def audit(
    folder: Path | None = None,
    *,
    external: ExternalEvaluation = NO_EVALUATION,
    rung: str | None = None,
    tolerance: float = 0.05,
    max_votes: int = 4000,
    out: Path | None = None,
    fail_on: AuditVerdict | None = None,
    overrides: Overrides = None,
    redo: Redo = False,
    json: Json = False,
) -> None:
    """Check whether an evaluation can be trusted: that of a run, one rung of its ladder, or the default one (PGD-20,
    for stochastic models EOT 20) of any model.

    Args:
        folder: Run folder; or give --model and --data.
        rung: Rung of the run's ladder to audit instead, e.g. frozen. The audit is written to audit-RUNG.json.
        tolerance: Largest acceptable share of images that the evaluation reports as robust but this audit breaks.
            A run uses the tolerance of its recipe.
        max_votes: Largest number of votes per verdict. A run uses that of its recipe.
        out: File for the machine-readable audit of --model; audit.json by default.
        fail_on: End with exit status 3 on this verdict or a worse one, of holds, undecided, overestimated.
    """
    if folder is not None:
        report, place = _audit_run(open_run(folder, external.data_of_run(), overrides, "audit" if redo else None), rung)
    else:
        report, place = _audit_model(external, rung, tolerance, max_votes, out or Path("audit.json"))
    if rank_of_process() == 0:
        if json:
            print_json(report.to_json())
        else:
            print_lines([*report.summary(), place])
    if fail_on is not None and _WORSE.index(report.verdict) >= _WORSE.index(fail_on):
        sys.exit(FAILED)


def _audit_model(
    external: ExternalEvaluation, rung: str | None, tolerance: float, max_votes: int, out: Path
) -> tuple[AuditReport, str]:
    """Return the audit of a model that belongs to no run, written to ``out``, and where it is.

    Raises:
        ConfigError: A rung is named, which only a run has, or no model is.
        RunError: ``out`` exists.
    """
    if rung is not None:
        raise ConfigError("--rung belongs to a run folder; give RUN --rung NAME")
    refuse_existing(out)
    from rush.auditing.audit import audit
    from rush.auditing.report import reach_statement
    from rush.records.audit import write_audit

    threat, images, surrogate = external.threat, external.pixels, external.surrogate_module
    statement = reach_statement(len(images), tolerance) if 0 < tolerance < 1 else None
    if statement is not None:
        print_notes([statement])
    report = audit(
        external.classifier,
        images,
        threat,
        None,
        tolerance,
        decision=external.decision,
        surrogate=surrogate,
        seed=external.seed or 0,
        max_votes=max_votes,
    )
    if rank_of_process() == 0:
        write_audit(out, report)
    return report, f"written to {out}"


def _audit_run(run: RunFolder, rung: str | None) -> tuple[AuditReport, str]:
    """Return the audit of a run or of one of its rungs, and where it is."""
    from rush.pipeline.attack import audit_run
    from rush.pipeline.stages import run_stage
    from rush.records.audit import read_audit, write_audit
    from rush.runtime.distributed import in_turn

    file = run.path / ("audit.json" if rung is None else f"audit-{rung}.json")
    if rung is None:
        run_stage(run, "audit", print_once)
    elif not in_turn(file.exists):
        report = audit_run(run, rung)
        if rank_of_process() == 0:
            write_audit(file, report)
        return report, f"in {file}"
    return read_audit(file, "delete it and audit again"), f"in {file}"
