"""The attack stage of a run and its audit: the ladder, accuracy against epsilon, and every certified ball."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rush.auditing.audit import AuditReport, audit
from rush.certification.certificates import Certificates
from rush.choices import parse_fraction
from rush.data.checks import kind_of
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.ladder import epsilon_text
from rush.evaluation.model import Model, defend
from rush.evaluation.plans import WORST_CASE, Suite
from rush.evaluation.result import AttackResult
from rush.evaluation.sandwich import Sandwich, check_sandwich, sandwich_positions, sandwich_threat
from rush.models.description import read_description
from rush.models.storage import load_plain, load_smoothed
from rush.pipeline.attackers import Attackers
from rush.pipeline.certify import NOT_SMOOTHED, read_run_certificates
from rush.pipeline.context import StageContext
from rush.pipeline.estimate import attack_estimate, audit_estimate, estimate_text, measured_rates
from rush.recipe.schema import AttackConfig
from rush.records.attacks import write_attacks
from rush.records.audit import write_audit
from rush.records.folder import RunFolder
from rush.runtime.distributed import barrier, rank, world_size
from rush.smoothing.classifier import SmoothedClassifier

AUDIT = Path("audit.json")


def run_attack(run: RunFolder, tell: Callable[[str], None] = lambda _: None) -> None:
    """Run the ladder, measure accuracy at rising epsilon, and attack inside every certified ball.

    Without noise there are no certified balls. Groups of images that were judged before are read from disk. Several
    processes share the groups.

    Args:
        tell: gets one line on the time that it takes at most, before it begins.

    Raises:
        SandwichError: more certified images are broken inside their radius than chance explains. The results are kept.
    """
    run.require("certify")
    context = StageContext.of(run)
    context.begin("attack")
    barrier()
    session = AttackSession.of(context)
    evaluation, certificates = session.evaluation, session.certificates()
    rates = measured_rates(session.model, evaluation.images.x.shape[1:])
    estimate = attack_estimate(session.attackers, len(evaluation.images), session.config.curve_images, rates)
    tell(f"attack: {estimate_text(estimate, rates)}")
    results = list(evaluation.run_all(session.attackers.rungs, session.parts))
    few = evaluation.select(list(range(min(session.config.curve_images, len(evaluation.images)))))
    curve_results = [replace(few, threat=threat).run(plan, session.parts) for threat, plan in session.attackers.curve]
    sandwich = Sandwich(0, (), 0)
    if certificates is not None:
        results += session.inside_certified_balls(certificates)
        sandwich = check_sandwich(certificates, [*results, *curve_results], session.config.alpha)
    if rank() == 0:
        images = evaluation.images
        write_attacks(run.path, results, dict(zip(images.ids, session.indices, strict=True)), images)
        run.finish("attack", **_attack_figures(session, results, curve_results, sandwich))
    barrier()
    sandwich.require()


def run_audit(run: RunFolder, tell: Callable[[str], None] = lambda _: None) -> None:
    """Audit the recipe's evaluation on the first attacked images and write ``audit.json``.

    Several processes share the attacks, as in ``run_attack``.

    Args:
        tell: gets one line on the time that it usually takes, before it begins.
    """
    run.require("attack")
    if rank() == 0:
        run.begin("audit")
    barrier()
    started = time.perf_counter()
    report = audit_run(run, tell=tell)
    if rank() == 0:
        write_audit(run.path / AUDIT, report)
        figures = {"verdict": report.verdict, "images": report.images, "evaluation": report.evaluation}
        run.finish("audit", seconds=time.perf_counter() - started, processes=world_size(), **figures)
    barrier()


def audit_run(run: RunFolder, rung: str | None = None, tell: Callable[[str], None] = lambda _: None) -> AuditReport:
    """Return the audit of a run's evaluation, the ladder's ``rung`` or the one that the recipe names.

    Raises:
        ConfigError: the ladder has no such rung.
        RunError: the attack stage is not finished.
    """
    run.require("attack")
    context = StageContext.of(run)
    config, session = context.recipe.audit, AttackSession.of(context)
    images = session.evaluation.images
    rows = list(range(min(config.images or len(images), len(images))))
    rates = measured_rates(session.model, images.x.shape[1:])
    config = config.replace(rung=rung or config.rung)
    classes = session.evaluation.defender.num_classes
    tell(f"audit: {estimate_text(audit_estimate(session.attackers, config, classes, len(rows), rates), rates)}")
    return audit(
        session.model,
        images.select(rows),
        session.evaluation.threat,
        session.rung(config.rung, rows),
        config.tolerance,
        certificates=session.certificates(),
        suite=session.suite(config.rung, rows),
        alpha=config.alpha,
        max_votes=config.max_votes,
        seed=context.recipe.seed,
    )


@dataclass(frozen=True)
class AttackSession:
    """Model, images and attackers that the attack stage and the audit of a run share.

    Attributes:
        model: the smoothed classifier, or the classifier itself where the recipe has no noise.
        indices: positions in the test split of the attacked images.
        evaluation: the model, the attacked images, the threat and the settings of the verdicts.
    """

    run: RunFolder
    config: AttackConfig
    model: Model
    indices: list[int]
    evaluation: Evaluation
    attackers: Attackers

    @classmethod
    def of(cls, context: StageContext) -> "AttackSession":
        """Load the model and the images of a run, and make the attackers of its recipe."""
        config = context.recipe.attack
        model, num_classes = _load_model(context)
        indices, images = context.splits.evaluation(config.images, num_classes, kind_of(model))
        attackers = Attackers.of(context.recipe, num_classes, images.x[0].numel())
        evaluation = Evaluation(defend(model, num_classes), images, attackers.threat, attackers.settings)
        return cls(context.run, config, model, indices, evaluation, attackers)

    def certificates(self) -> Certificates | None:
        """Return the certificates of the attacked images, or None if the model is not smoothed."""
        if not isinstance(self.model, SmoothedClassifier):
            return None
        return read_run_certificates(self.run, self.evaluation.images, self.model)

    def inside_certified_balls(self, certificates: Certificates) -> list[AttackResult]:
        """Return the attack on the correctly certified images inside their balls, or [] if there are none."""
        positions = sandwich_positions(certificates, self.evaluation.images.ids)
        if not positions:
            return []
        certified = self.evaluation.select(positions)
        inside = replace(certified, threat=sandwich_threat(certificates, certified.images.ids))
        assert self.attackers.sandwich is not None
        return [inside.run(self.attackers.sandwich, self.parts)]

    def rung(self, name: str | None, rows: list[int]) -> AttackResult | None:
        """Return the result of the ladder's rung of this name on the images at ``rows``, or None without a name.

        Raises:
            ConfigError: there is no such rung.
        """
        rung = self.attackers.rung(name)
        return None if rung is None else self.evaluation.run(rung, self.parts).select(rows)

    def suite(self, audited: str | None, rows: list[int]) -> AttackResult | None:
        """Return the result of the ladder's suite on the images at ``rows``, None without one or if it is audited."""
        name = None if audited == WORST_CASE or not self.attackers.has_suite else WORST_CASE
        return self.rung(name, rows)

    @property
    def parts(self) -> Path:
        """Folder of the groups of images that were judged before."""
        return self.run.path / "attacks/parts"


def _load_model(context: StageContext) -> tuple[Model, int]:
    """Return the run's model, smoothed where its recipe has noise, and its number of classes."""
    folder = context.run.path / "model"
    if context.noise is None:
        classifier = load_plain(folder, context.execution.device)
        return classifier, len(read_description(folder)["classes"])
    smoothed = load_smoothed(folder, context.execution)
    return smoothed, smoothed.num_classes


def _attack_figures(
    session: AttackSession, results: list[AttackResult], curve_results: list[AttackResult], sandwich: Sandwich
) -> dict[str, Any]:
    rungs, config = [_rung_figures(result) for result in results], session.config
    return {
        "seconds": sum(float(result.seconds.sum()) for result in (*results, *curve_results)),
        "processes": world_size(),
        "threat": {"norm": config.norm, "epsilon": parse_fraction(config.epsilon), "epsilon_text": config.epsilon},
        "alpha": config.alpha,
        "level": session.evaluation.settings.level,
        "num_verdicts": len(results) + len(curve_results),
        "max_votes": config.max_votes,
        "rungs": [rung for rung in rungs if rung["name"] != "sandwich"],
        **({"curve": _curve_figures(curve_results)} if curve_results else {}),
        "sandwich": {
            **next((rung for rung in rungs if rung["name"] == "sandwich"), {}),
            "checked": sandwich.checked,
            "violations": list(sandwich.violations),
            "allowed": sandwich.allowed,
            **({} if isinstance(session.model, SmoothedClassifier) else {"reason": NOT_SMOOTHED}),
        },
    }


def _rung_figures(result: AttackResult) -> dict[str, Any]:
    plan = result.plan
    attacker: dict[str, Any]
    if isinstance(plan, Suite):
        broken_by = np.bincount(result.attacker[result.broken], minlength=len(plan.plans))
        attacker = {
            "suite": plan.version,
            "attackers": dict(zip((p.name for p in plan.plans), broken_by.tolist(), strict=True)),
        }
    else:
        budget = ("method", "loss", "gradient", "steps", "step_size", "restarts", "eot_samples")
        attacker = {name: getattr(plan, name) for name in budget}
    return {"name": plan.name, "label": plan.label, **attacker, **result.budget, "seconds": float(result.seconds.sum())}


def _curve_figures(results: list[AttackResult]) -> dict[str, Any]:
    points = [
        {
            "epsilon": float(result.threat.epsilon),
            "epsilon_text": epsilon_text(result.threat.norm, float(result.threat.epsilon)),
            "broken": int(result.broken.sum()),
            "held": int(result.held.sum()),
            "undecided": int(result.undecided.sum()),
        }
        for result in results
    ]
    return {"label": results[0].plan.label, "images": len(results[0]), "points": points}
