"""The attack stage of a run and its audit: the ladder, accuracy against epsilon, every certified ball."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rush.attacks.threat import ThreatModel
from rush.auditing.audit import AuditReport, audit
from rush.auditing.case import VERDICTS
from rush.certification.certificates import Certificates
from rush.choices import parse_fraction
from rush.data.checks import LabelledPixels, kind_of
from rush.errors import ConfigError, InputError
from rush.evaluation.attack import Judging, evaluate
from rush.evaluation.ladder import curve, epsilon_text, ladder, plain_ladder
from rush.evaluation.model import Model, defend
from rush.evaluation.plans import Plan, Suite, worst_case
from rush.evaluation.result import AttackResult
from rush.evaluation.sandwich import Sandwich, check_sandwich, sandwich_plan, sandwich_positions, sandwich_threat
from rush.models.storage import load_plain, load_smoothed, read_description
from rush.pipeline.certify import NOT_SMOOTHED, read_run_certificates
from rush.pipeline.context import StageContext
from rush.recipe.schema import AttackConfig, Recipe
from rush.records.attacks import write_attacks
from rush.records.audit import write_audit
from rush.records.folder import RunFolder
from rush.runtime.distributed import barrier, rank, world_size
from rush.smoothing.classifier import SmoothedClassifier

AUDIT = Path("audit.json")


def run_attack(run: RunFolder) -> None:
    """Climb the ladder, follow accuracy against epsilon and attack inside every certified ball, of which there is none
    without noise; a group of images that was judged before is not attacked again. With several processes each takes its
    share of the groups.

    Raises: SandwichError when certified images are broken inside their radius more often than chance explains; the
    results are kept.
    """
    if run.finished("attack"):
        return
    run.require("certify")
    context = StageContext.of(run)
    context.begin("attack")
    barrier()
    siege = _Siege.of(context)
    certificates = None if siege.smoothed is None else read_run_certificates(run, siege.pixels, siege.smoothed)
    results = [siege.evaluate(plan) for plan in siege.rungs]
    curve_ = [siege.evaluate(plan, threat, siege.curve_rows) for threat, plan in siege.curve]
    sandwich = Sandwich(0, (), 0)
    if certificates is not None:
        results += siege.inside(certificates)
        sandwich = check_sandwich(certificates, [*results, *curve_], siege.config.alpha)
    if rank() == 0:
        write_attacks(run.path, results, dict(zip(siege.pixels.ids, siege.indices, strict=True)), siege.pixels)
        run.finish("attack", **_attack_figures(siege, results, curve_, sandwich))
    barrier()
    sandwich.require()


def run_audit(run: RunFolder) -> None:
    """Audit the recipe's evaluation on the first attacked images and write ``audit.json``."""
    if run.finished("audit"):
        return
    run.require("attack")
    run.begin("audit")
    started = time.perf_counter()
    report = audit_run(run)
    write_audit(run.path / AUDIT, report)
    figures = {"verdict": report.verdict, "images": report.images, "evaluation": report.evaluation}
    run.finish("audit", seconds=time.perf_counter() - started, **figures)


def audit_run(run: RunFolder, rung: str | None = None) -> AuditReport:
    """The audit of a run's evaluation: of the ladder's ``rung``, or of the one that the recipe names.

    Raises: ConfigError for a rung that the ladder does not have; RunError where the attack stage is not finished.
    """
    run.require("attack")
    context = StageContext.of(run)
    config, siege = context.recipe.audit, _Siege.of(context)
    rows = list(range(min(config.images or len(siege.pixels), len(siege.pixels))))
    certificates = None if siege.smoothed is None else read_run_certificates(run, siege.pixels, siege.smoothed)
    return audit(
        siege.model,
        siege.pixels.select(rows),
        siege.threat,
        siege.audited(rung or config.rung, rows),
        config.tolerance,
        certificates=certificates,
        alpha=config.alpha,
        max_votes=config.max_votes,
        seed=context.recipe.seed,
    )


@dataclass(frozen=True)
class _Attackers:
    """The attackers of a recipe's attack stage, and how their points are judged."""

    threat: ThreatModel
    rungs: list[Plan | Suite]
    curve: list[tuple[ThreatModel, Plan]]
    judging: Judging

    @classmethod
    def of(cls, recipe: Recipe, num_classes: int, pixels: int) -> "_Attackers":
        """Return those for images of this number of pixels, counted over all channels."""
        config, smoothed = recipe.attack, recipe.smoothing.sigma > 0
        threat = ThreatModel(config.norm, parse_fraction(config.epsilon))
        rungs = ladder(config, threat, num_classes) if smoothed else _plain_rungs(config, num_classes)
        draws = config.strong_eot_samples if smoothed else 0
        curve_ = curve(threat, pixels, config.steps, draws) if config.curve_images else []
        # one verdict a rung and point of the curve, and one inside the certified ball
        judging = Judging(config.alpha / (len(rungs) + len(curve_) + 1), config.max_votes, recipe.seed)
        return cls(threat, rungs, curve_, judging)


def check_attackers(recipe: Recipe, num_classes: int, shape: tuple[int, ...]) -> None:
    """Raise ConfigError when the attack stage or the audit of ``recipe`` could not judge a point, or has no rung of the
    name that is to be audited."""
    attackers = _Attackers.of(recipe, num_classes, math.prod(shape))
    rungs = {rung.name: rung for rung in attackers.rungs}
    _check_rung(recipe.audit.rung, rungs)
    if recipe.smoothing.sigma == 0:
        return  # a deterministic network is judged by its class
    most = max(_verdicts(plan) for plan in attackers.rungs)
    audit_ = Judging(recipe.audit.alpha / VERDICTS, recipe.audit.max_votes, recipe.seed)
    suite = worst_case("random", num_classes)
    for section, judging, verdicts in (("attack", attackers.judging, most), ("audit", audit_, _verdicts(suite))):
        try:
            judging.check_reachable(None, verdicts)
        except InputError as error:
            raise ConfigError(f"{section}: {error}") from error


def _verdicts(plan: Plan | Suite) -> int:
    """Number of verdicts on an image that share the level of ``plan``."""
    return len(plan.plans) if isinstance(plan, Suite) else 1


def _check_rung(name: str | None, rungs: Mapping[str, Plan | Suite]) -> None:
    """Raise ConfigError when there is no rung of this name."""
    if name is not None and name not in rungs:
        raise ConfigError(f"the ladder has no rung {name!r}; it has {', '.join(rungs)}")


@dataclass(frozen=True)
class _Siege:
    """What the attack stage and the audit share: model, images, threat, attackers and how points are judged.

    model: the smoothed classifier, or the classifier itself where the recipe has no noise. curve_rows: the images that
    are also attacked at rising epsilon.
    """

    path: Path
    config: AttackConfig
    model: Model
    num_classes: int
    indices: list[int]
    pixels: LabelledPixels
    threat: ThreatModel
    rungs: list[Plan | Suite]
    curve: list[tuple[ThreatModel, Plan]]
    judging: Judging

    @classmethod
    def of(cls, context: StageContext) -> "_Siege":
        config = context.recipe.attack
        model, num_classes = _load_model(context)
        indices, pixels = context.splits.evaluation(config.images, num_classes, kind_of(model))
        attackers = _Attackers.of(context.recipe, num_classes, pixels.x[0].numel())
        return cls(context.run.path, config, model, num_classes, indices, pixels, **vars(attackers))

    @property
    def smoothed(self) -> SmoothedClassifier | None:
        """The model where it is smoothed, so that there are certificates."""
        return self.model if isinstance(self.model, SmoothedClassifier) else None

    @property
    def curve_rows(self) -> list[int]:
        return list(range(min(self.config.curve_images, len(self.pixels))))

    def evaluate(
        self, plan: Plan | Suite, threat: ThreatModel | None = None, rows: list[int] | None = None
    ) -> AttackResult:
        """One attacker on all images or those in ``rows``; what is in the run's parts is read, not attacked again."""
        pixels = self.pixels if rows is None else self.pixels.select(rows)
        parts = self.path / "attacks/parts"
        defender = defend(self.model, self.num_classes)
        return evaluate(defender, pixels, threat or self.threat, plan, self.judging, parts)

    def inside(self, certificates: Certificates) -> list[AttackResult]:
        """The attack inside the balls of the images that are certified with the right class; [] where none is."""
        positions = sandwich_positions(certificates, self.pixels.ids)
        if not positions:
            return []
        balls = sandwich_threat(certificates, self.pixels.select(positions).ids)
        return [self.evaluate(sandwich_plan(self.config.steps), balls, positions)]

    def audited(self, name: str | None, rows: list[int]) -> AttackResult | None:
        """The ladder's rung of this name on ``rows``; None, for the audit's default, without a name.

        Raises: ConfigError when there is no such rung.
        """
        if name is None:
            return None
        known = {plan.name: plan for plan in self.rungs}
        _check_rung(name, known)
        return self.evaluate(known[name]).select(rows)


def _load_model(context: StageContext) -> tuple[Model, int]:
    """The run's model, smoothed where its recipe has noise, and its number of classes."""
    folder = context.run.path / "model"
    if context.noise is None:
        classifier = load_plain(folder, context.execution.device)
        return classifier, len(read_description(folder)["classes"])
    smoothed = load_smoothed(folder, context.execution)
    return smoothed, smoothed.num_classes


def _plain_rungs(config: AttackConfig, num_classes: int) -> list[Plan | Suite]:
    """The ladder of deterministic networks, without its strong attackers where the recipe wants none."""
    rungs = plain_ladder(num_classes)
    if config.strong_steps:
        return rungs
    return [rung for rung in rungs if isinstance(rung, Plan) and rung.method in ("none", "fgsm", "pgd")]


def _attack_figures(
    siege: _Siege, results: list[AttackResult], curve_: list[AttackResult], sandwich: Sandwich
) -> dict[str, Any]:
    rungs, config = [_rung_figures(result) for result in results], siege.config
    return {
        "seconds": sum(float(result.seconds.sum()) for result in (*results, *curve_)),
        "processes": world_size(),
        "threat": {"norm": config.norm, "epsilon": parse_fraction(config.epsilon), "epsilon_text": config.epsilon},
        "alpha": config.alpha,
        "level": siege.judging.level,
        "num_verdicts": len(results) + len(curve_),
        "max_votes": config.max_votes,
        "rungs": [rung for rung in rungs if rung["name"] != "sandwich"],
        **({"curve": _curve_figures(curve_)} if curve_ else {}),
        "sandwich": {
            **next((rung for rung in rungs if rung["name"] == "sandwich"), {}),
            "checked": sandwich.checked,
            "violations": list(sandwich.violations),
            "allowed": sandwich.allowed,
            **({} if siege.smoothed is not None else {"reason": NOT_SMOOTHED}),
        },
    }


def _rung_figures(result: AttackResult) -> dict[str, Any]:
    plan = result.plan
    own: dict[str, Any]
    if isinstance(plan, Suite):
        broken_by = np.bincount(result.attacker[result.broken], minlength=len(plan.plans))
        own = {
            "suite": plan.version,
            "attackers": dict(zip((p.name for p in plan.plans), broken_by.tolist(), strict=True)),
        }
    else:
        budget = ("method", "loss", "gradient", "steps", "step_size", "restarts", "eot_samples")
        own = {name: getattr(plan, name) for name in budget}
    return {"name": plan.name, "label": plan.label, **own, **result.budget, "seconds": float(result.seconds.sum())}


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
