"""The audit of an evaluation of a model: the worst-case suite, many cheap probes, and one verdict."""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from rush.attacks.threat import ThreatModel
from rush.auditing import gradients, stronger, validity
from rush.auditing.case import VERDICTS, Case
from rush.auditing.findings import Finding
from rush.auditing.probes import Probe
from rush.auditing.report import AuditReport, decide
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

PATIENCE = 4  # times max_votes, for the evaluation's own points, so that few are undecided for lack of votes
# In the order of their definition, which runs from causes to symptoms: the first failed finding is the best explanation
# of an overestimate. The certificates use the results of all other probes and come last.
PROBES = {
    probe.name: probe
    for module in (validity, gradients, stronger)
    for probe in vars(module).values()
    if isinstance(probe, Probe)
}

__all__ = ["AuditReport", "Finding", "audit", "default_plan"]


def default_plan(kind: Kind) -> Plan:
    """Return the evaluation that is audited by default, PGD-20 on the cross-entropy.

    The gradients of a stochastic model are averaged over 20 draws (EOT).
    """
    draws, label = (0, "") if kind == "plain" else (20, ", EOT 20")
    return Plan("default", f"PGD-20, cross-entropy{label} (the default)", "pgd", "fresh", draws, 20, 0.25)


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
    suite: AttackResult | None = None,
    alpha: float = 0.001,
    max_votes: int = 4000,
    seed: int = 0,
) -> AuditReport:
    """Audit whether ``evaluation`` overestimates the robustness of ``model`` on ``images`` within ``threat``.

    The evaluation is compared with the worst-case suite, on the images that it did not break, and with the attacks of
    all probes (``validity``, ``gradients``, ``stronger``). An image counts as broken when any of them breaks it. d is
    the share of images that the evaluation held, or left undecided, and that are broken. The verdict follows from the
    bounds of d and from the findings (``report.decide``). Duplicates of a picture are audited once, with a
    CopiesWarning. A model in training mode is a failed finding, and the rest of the audit uses a copy in evaluation
    mode.

    Args:
        model, images, threat, decision: as for ``rush.attack``.
        evaluation: an AttackResult, a plan or suite to run, or None for ``default_plan``. The points and verdicts of an
            AttackResult are taken as they are, and its points are judged once more.
        tolerance: the largest acceptable d.
        surrogate: as for ``rush.attack``. It is also a source of transferred points.
        certificates: certificates of the same images, which are compared with all attacks.
        suite: the result of the worst-case suite on the same images, if there is one. Its points are judged again, on
            separate draws of the audit, and the suite is not run.
        alpha: bound on the probability that any verdict on an image is false, split evenly over ``VERDICTS`` of them.
            Only stochastic models depend on it.
        max_votes: most votes per verdict, ``PATIENCE`` times as many for the evaluation's own points. Only stochastic
            models depend on it.

    Returns:
        The report, with its findings in the order of ``PROBES``.

    Raises:
        InputError: for bad images or numbers, and for an evaluation of other images or another threat model.
        ModelError: for an unusable model.

    Cost:
        The evaluation, the suite on the images that it held unless its result is given, and on at most 64 of these
        about six times the evaluation and at most 320 passes through a smoothed surrogate. Where a model has steps
        without a derivative, 800 more passes (100 of a deterministic model) on all images that the evaluation held.

    Example:
        >>> import rush, torch
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
        >>> images, threat = rush.load_images("digits", split="test")[:5], rush.ThreatModel("linf", 8 / 255)
        >>> evaluation = rush.attack(model, images, threat, method="fgsm")
        >>> report = rush.audit(model, images, threat, evaluation)
        >>> report.verdict in ("holds", "overestimated", "undecided")
        True
    """
    whole = VerdictSettings.checked(alpha, max_votes, seed)
    alpha, max_votes, tolerance = whole.level, whole.max_votes, _checked_tolerance(tolerance)
    judging = replace(whole, level=alpha / VERDICTS)
    training = _training_layers(model)
    model = _in_evaluation_mode(model) if training else model
    checked = Evaluation.of(model, images, threat, judging, decision, surrogate, declared=False)
    defender, pixels = checked.defender, checked.images
    reference = worst_case(defender.kind, defender.num_classes, defender.transferable)
    if suite is not None and (not isinstance(suite, AttackResult) or suite.plan != reference):
        got = suite.plan.label if isinstance(suite, AttackResult) else type(suite).__name__
        raise InputError(f"suite must be the AttackResult of the {reference.label}, got {got}")
    for result in (evaluation, suite):
        if isinstance(result, AttackResult):
            _check_same(result, pixels, threat)
    rows = _without_copies(pixels)
    if len(rows) < len(pixels):
        evaluation = evaluation.select(rows) if isinstance(evaluation, AttackResult) else evaluation
        suite = None if suite is None else suite.select(rows)
        pixels, threat = pixels.select(rows), threat.select(rows)
    checked.check_reachable(reference)
    patient = replace(judging, max_votes=PATIENCE * max_votes)
    audited = _evaluated(evaluation, defender, pixels, threat, patient)
    case = Case(model, defender, pixels, threat, audited, judging, training, surrogate, certificates)
    if isinstance(evaluation, AttackResult):
        points = LabelledPixels(case.points, pixels.y, pixels.ids)
        case.rejudged = defender.judge(points, "audit-again", patient)
    unbroken = np.flatnonzero(~(case.evaluation.broken | _broken(case))).tolist()
    if unbroken and suite is not None:
        case.judge_again(suite, unbroken)
    elif unbroken:
        case.attack(reference, unbroken)
    findings = tuple(_findings(case))
    defender.recheck()
    return _report(case, reference.label + ("" if suite is None else ", judged again"), findings, tolerance, alpha)


def _without_copies(pixels: LabelledPixels) -> list[int]:
    """Return the positions of the first image of each picture: the bounds of the audit are for independent images."""
    rows: list[int] = sorted(np.unique(np.array(pixel_ids(pixels.x)), return_index=True)[1].tolist())
    copies = len(pixels) - len(rows)
    if copies:
        warnings.warn(
            f"{copies} of {len(pixels)} images are copies of others, pixel by pixel; each picture is audited once, "
            "with its first label",
            CopiesWarning,
            stacklevel=3,
        )
    return rows


def _checked_tolerance(tolerance: float) -> float:
    number = as_real(tolerance)
    if number is None or not 0 < number < 1:
        raise InputError(f"tolerance is a share of images between 0 and 1, e.g. 0.05, got {tolerance!r}")
    return number


def _training_layers(model: Model) -> tuple[str, ...]:
    module = model.classifier if isinstance(model, SmoothedClassifier) else model
    if not isinstance(module, nn.Module):
        return ()  # ``prepare`` raises the error
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
    """Raise InputError unless the evaluation is of these images, labels and balls, in this order."""
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
    evaluated, audited = (
        np.broadcast_to(np.asarray(each.epsilon), len(pixels)) for each in (evaluation.threat, threat)
    )
    if evaluation.threat.norm != threat.norm or not np.allclose(evaluated, audited, rtol=1e-6, atol=0):
        raise InputError(
            f"the evaluation is of {evaluation.threat.norm} at epsilon up to {evaluated.max():g}, the audit of "
            f"{threat.norm} at {audited.max():g}; audit under the threat model that was evaluated"
        )


def _findings(case: Case) -> Iterator[Finding]:
    with progress("audit", len(PROBES)) as advance:
        for probe in PROBES.values():
            yield probe(case)
            advance(1)


def _broken(case: Case) -> NDArray[np.bool_]:
    """Return which images (N,) the suite, a probe or the second judgement of the evaluation's points has broken."""
    broken = np.zeros(len(case.pixels), bool) if case.rejudged is None else case.rejudged.verdict == BROKEN
    ids = {image_id for result in case.results for image_id in np.array(result.ids)[result.broken].tolist()}
    return broken | np.array([image_id in ids for image_id in case.pixels.ids])


def _report(case: Case, reference: str, findings: tuple[Finding, ...], tolerance: float, alpha: float) -> AuditReport:
    newly = _broken(case) & ~case.evaluation.broken
    failed = [finding.name for finding in findings if finding.status == "failed"]
    total = len(case.pixels)
    return AuditReport(
        verdict=decide(int(newly.sum()), total, tolerance, failed),
        evaluation=case.evaluation.plan.label,
        evaluation_accuracy=case.evaluation.robust_accuracy,
        reference=reference,
        reference_accuracy=1 - float((case.evaluation.broken | newly).mean()),
        images=total,
        newly_broken=tuple(np.array(case.pixels.ids)[newly].tolist()),
        tolerance=tolerance,
        findings=findings,
        norm=case.threat.norm,
        epsilon=float(torch.as_tensor(case.threat.epsilon).max()),
        alpha=alpha,
        max_votes=case.judging.max_votes,
        seed=case.seed,
    )
