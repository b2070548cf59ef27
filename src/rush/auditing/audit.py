"""Is an evaluation of a model believable? The strongest attack here, many cheap probes, and one verdict."""

import copy
import warnings
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rush.attacks.threat import ThreatModel
from rush.auditing.case import VERDICTS, Case
from rush.auditing.findings import ORDER, Finding
from rush.auditing.probes import PROBES
from rush.auditing.report import AuditReport, AuditVerdict, decide, write_audit
from rush.certification.certificates import Certificates
from rush.choices import Decision
from rush.data.checks import Images, LabelledPixels, pixel_ids
from rush.errors import CopiesWarning, InputError
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.model import Defender, Model
from rush.evaluation.plans import Kind, Plan, Suite, worst_case
from rush.evaluation.result import AttackResult
from rush.evaluation.verdict import BROKEN, VerdictSettings
from rush.runtime.numbers import as_real
from rush.runtime.progress import progress
from rush.smoothing.classifier import SmoothedClassifier

PATIENCE = 4  # times max_votes, for the evaluation's own points: what votes alone leave open is no fault of an attack

__all__ = ["AuditReport", "AuditVerdict", "Finding", "audit", "default_plan", "write_audit"]


def default_plan(kind: Kind) -> Plan:
    """The evaluation that is audited where none is given: PGD-20 on the cross-entropy, EOT over 20 draws of a random
    model."""
    if kind == "plain":
        return Plan("default", "PGD-20, cross-entropy (the default)", "pgd", "fresh", 0, 20, 0.25)
    return Plan("default", "PGD-20, cross-entropy, EOT 20 (the default)", "pgd", "fresh", 20, 20, 0.25)


def audit(
    model: Model,
    images: Images,
    threat: ThreatModel,
    evaluation: AttackResult | Plan | Suite | None = None,
    tolerance: float = 0.05,
    *,
    decision: Decision | None = None,
    surrogate: nn.Module | None = None,
    certificates: Certificates | None = None,
    alpha: float = 0.001,
    max_votes: int = 4000,
    seed: int = 0,
) -> AuditReport:
    """Whether ``evaluation`` tells what ``model`` is worth on ``images`` within ``threat`` (the report says the rest).

    evaluation: an AttackResult, whose points and verdicts are taken as they are and whose points are judged once more;
    a plan or suite, run here; or None for ``default_plan``. Against it stand the worst-case suite, on the images that
    the evaluation did not break, and the attacks of all probes (``audit_probes``): an image is broken here when any of
    them breaks it. d is the share of images that the evaluation held, or left undecided, and that are broken here; the
    verdict follows from its bounds and from the findings (``audit_report.decide``). tolerance: the d that is put up
    with.
    model, images, threat, decision, surrogate: as ``rush.attack``; surrogate: also a source of transferred points.
    certificates: of the same images, held against all attacks. alpha: bound on the probability that any verdict on an
    image here is false, split evenly over ``VERDICTS`` of them; max_votes: most votes of each, ``PATIENCE`` times as
    many for the evaluation's own points; both matter for random models alone.
    Copies of one picture are audited once, with a CopiesWarning.
    A model in training mode is a failed finding; the rest of the audit then looks at a copy in evaluation mode.
    Cost: the evaluation, the suite on what it held, and on at most 64 of these about six times the evaluation and at
    most 320 passes through a smoothed surrogate. Where a model has steps without a derivative, 800 passes more on all
    that the evaluation held, 100 of a deterministic model.
    Raises: InputError for bad images or numbers and for an evaluation of other images or another threat model;
    ModelError for an unusable model.
    """
    whole = VerdictSettings.checked(alpha, max_votes, seed)
    alpha, max_votes, tolerance = whole.level, whole.max_votes, _checked_tolerance(tolerance)
    judging = replace(whole, level=alpha / VERDICTS)
    training = _training_layers(model)
    model = _in_evaluation_mode(model) if training else model
    checked = Evaluation.of(model, images, threat, judging, decision, surrogate, declared=False)
    defender, pixels = checked.defender, checked.images
    pixels, threat, evaluation = _without_copies(pixels, threat, evaluation)
    suite = worst_case(defender.kind, defender.num_classes, defender.transferable)
    checked.check_reachable(suite)
    patient = replace(judging, max_votes=PATIENCE * max_votes)
    result = _evaluated(evaluation, defender, pixels, threat, patient)
    again = None
    if isinstance(evaluation, AttackResult):
        points = threat.project(evaluation.adversarial.clamp(0, 1), pixels.x)
        judged = LabelledPixels(points, pixels.y, pixels.ids)
        again = defender.judge(judged, "audit-again", patient)
    case = Case(model, defender, pixels, threat, result, again, training, surrogate, certificates, judging)
    newly = _broken_by_suite(case, suite)
    found = _findings(case)
    defender.recheck()
    return _report(case, suite, newly | _broken_by_probes(case), found, tolerance, alpha)


def _without_copies(
    pixels: LabelledPixels, threat: ThreatModel, evaluation: AttackResult | Plan | Suite | None
) -> tuple[LabelledPixels, ThreatModel, AttackResult | Plan | Suite | None]:
    """Keep the first image of each picture: the bounds of the audit are over independent ones."""
    if isinstance(evaluation, AttackResult):
        _check_same(evaluation, pixels, threat)
    rows = sorted(np.unique(np.array(pixel_ids(pixels.x)), return_index=True)[1].tolist())
    copies = len(pixels) - len(rows)
    if not copies:
        return pixels, threat, evaluation
    warnings.warn(
        f"{copies} of {len(pixels)} images are copies of others, pixel by pixel; each picture is audited once, "
        "with its first label",
        CopiesWarning,
        stacklevel=3,
    )
    chosen = evaluation.select(rows) if isinstance(evaluation, AttackResult) else evaluation
    return pixels.select(rows), threat.select(rows), chosen


def _checked_tolerance(tolerance: float) -> float:
    number = as_real(tolerance)
    if number is None or not 0 < number < 1:
        raise InputError(f"tolerance is a share of images between 0 and 1, e.g. 0.05, got {tolerance!r}")
    return number


def _training_layers(model: Model) -> tuple[str, ...]:
    module = model.classifier if isinstance(model, SmoothedClassifier) else model
    if not isinstance(module, nn.Module):
        return ()  # the door says what is wrong
    return tuple(name or "(the module itself)" for name, layer in module.named_modules() if layer.training)


def _in_evaluation_mode(model: Model) -> Model:
    if not isinstance(model, SmoothedClassifier):
        return copy.deepcopy(model).eval()
    return SmoothedClassifier(
        copy.deepcopy(model.classifier).eval(),
        noise=model.noise,
        num_classes=model.num_classes,
        execution=model.execution,
        classes=model.kind.classes,
        image_shape=model.image_shape,
    )


def _evaluated(
    evaluation: AttackResult | Plan | Suite | None,
    defender: Defender,
    pixels: LabelledPixels,
    threat: ThreatModel,
    judging: VerdictSettings,
) -> AttackResult:
    if isinstance(evaluation, AttackResult):
        return evaluation
    if evaluation is not None and not isinstance(evaluation, Plan | Suite):
        raise InputError(
            f"evaluation must be an AttackResult, a Plan, a Suite or None, got {type(evaluation).__name__}"
        )
    return Evaluation(defender, pixels, threat, judging).run(evaluation or default_plan(defender.kind))


def _check_same(evaluation: AttackResult, pixels: LabelledPixels, threat: ThreatModel) -> None:
    """Raises InputError unless the evaluation is of these images, labels and balls, in this order."""
    if evaluation.ids != pixels.ids or evaluation.labels.tolist() != pixels.y.tolist():
        raise InputError(
            f"the evaluation is of {len(evaluation)} images, which are not, in this order, the {len(pixels)} images "
            "and labels given; give the images that were attacked"
        )
    if evaluation.adversarial.shape != pixels.x.shape:
        raise InputError(
            f"the evaluation's points have shape {tuple(evaluation.adversarial.shape)}, "
            f"the images {tuple(pixels.x.shape)}"
        )
    own, given = (np.broadcast_to(np.asarray(each.epsilon), len(pixels)) for each in (evaluation.threat, threat))
    if evaluation.threat.norm != threat.norm or not np.allclose(own, given, rtol=1e-6, atol=0):
        raise InputError(
            f"the evaluation is of {evaluation.threat.norm} at epsilon up to {own.max():g}, the audit of "
            f"{threat.norm} at {given.max():g}; audit under the threat model that was evaluated"
        )


def _broken_by_suite(case: Case, suite: Suite) -> NDArray[np.bool_]:
    """Images (N,) that the evaluation did not break and that its points judged again or the suite break."""
    broken = np.zeros(len(case.pixels), bool)
    if case.again is not None:
        broken |= case.again.verdict == BROKEN
    rows = np.flatnonzero(~(case.evaluation.broken | broken)).tolist()
    if rows:
        broken[rows] |= case.attack(suite, rows).broken
    return broken & ~case.evaluation.broken


def _findings(case: Case) -> tuple[Finding, ...]:
    found = []
    with progress("audit", len(ORDER)) as advance:
        for name in ORDER:
            found.append(PROBES[name](case))
            advance(1)
    return tuple(found)


def _broken_by_probes(case: Case) -> NDArray[np.bool_]:
    broken = {own for result in case.found for own in np.array(result.ids)[result.broken].tolist()}
    return np.array([own in broken for own in case.pixels.ids]) & ~case.evaluation.broken


def _report(
    case: Case, suite: Suite, newly: NDArray[np.bool_], found: tuple[Finding, ...], tolerance: float, alpha: float
) -> AuditReport:
    failed = [finding.name for finding in found if finding.status == "failed"]
    total = len(case.pixels)
    return AuditReport(
        verdict=decide(int(newly.sum()), total, tolerance, failed),
        evaluation=case.evaluation.plan.label,
        evaluation_accuracy=case.evaluation.robust_accuracy,
        here=suite.label,
        accuracy_here=1 - float((case.evaluation.broken | newly).mean()),
        images=total,
        newly_broken=tuple(np.array(case.pixels.ids)[newly].tolist()),
        tolerance=tolerance,
        findings=found,
        norm=case.threat.norm,
        epsilon=float(torch.as_tensor(case.threat.epsilon).max()),
        alpha=alpha,
        max_votes=case.judging.max_votes,
        seed=case.seed,
    )
