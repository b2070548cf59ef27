"""``rush audit``: whether the evaluation of a run or of any model can be trusted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rush.commands.external import NO_EVALUATION, ExternalEvaluation
from rush.commands.run_folders import Overrides, open_run, print_once
from rush.commands.terminal import print_lines
from rush.errors import ConfigError

if TYPE_CHECKING:
    from rush.records.folder import RunFolder


def audit(
    folder: Path | None = None,
    *,
    external: ExternalEvaluation = NO_EVALUATION,
    rung: str | None = None,
    tolerance: float = 0.05,
    out: Path | None = None,
    overrides: Overrides = None,
) -> None:
    """Check whether an evaluation can be trusted: that of a run, one rung of its ladder, or the default one (PGD-20,
    for stochastic models EOT 20) of any model.

    Args:
        folder: Run folder; or give --model and --data.
        rung: Rung of the run's ladder to audit instead, e.g. frozen. The audit is written to audit-RUNG.json.
        tolerance: Largest acceptable share of images that the evaluation reports as robust but this audit breaks.
            A run uses the tolerance of its recipe.
        out: File for the machine-readable audit of --model; audit.json by default.
    """
    if folder is not None:
        _audit_run(open_run(folder, external.data_of_run(), overrides), rung)
        return
    if rung is not None:
        raise ConfigError("--rung belongs to a run folder; give RUN --rung NAME")
    from rush.auditing.audit import audit
    from rush.auditing.report import reach_statement
    from rush.records.audit import write_audit

    threat, images, surrogate = external.threat, external.pixels, external.surrogate_module
    statement = reach_statement(len(images), tolerance) if 0 < tolerance < 1 else None
    if statement is not None:
        print_lines([statement], stderr=True)
    decision, seed = external.decision, external.seed or 0
    report = audit(
        external.classifier, images, threat, None, tolerance, decision=decision, surrogate=surrogate, seed=seed
    )
    file = out or Path("audit.json")
    write_audit(file, report)
    print_lines([*report.summary(), f"written to {file}"])


def _audit_run(run: RunFolder, rung: str | None) -> None:
    from rush.pipeline.attack import audit_run
    from rush.pipeline.stages import run_stage
    from rush.records.audit import read_audit, write_audit

    file = run.path / ("audit.json" if rung is None else f"audit-{rung}.json")
    if rung is None:
        run_stage(run, "audit", print_once)
    elif not file.exists():
        write_audit(file, audit_run(run, rung))
    report = read_audit(file, "delete it and audit again")
    print_lines([*report.summary(), f"in {file}"])
