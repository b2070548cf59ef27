"""The attackers of a recipe's attack stage, and whether their points can be judged."""

import math
from dataclasses import dataclass

from rush.attacks.threat import ThreatModel
from rush.auditing.case import VERDICTS
from rush.choices import CERTIFIED_NORM, parse_fraction
from rush.errors import ConfigError, InputError
from rush.evaluation.ladder import curve, ladder, plain_ladder
from rush.evaluation.plans import WORST_CASE, Kind, Plan, Suite, worst_case
from rush.evaluation.sandwich import sandwich_plan
from rush.evaluation.verdict import VerdictSettings
from rush.recipe.schema import AttackConfig, Recipe


@dataclass(frozen=True)
class Attackers:
    """The attackers of a recipe's attack stage, and the settings by which their points are judged.

    Attributes:
        rungs: the ladder's attackers, from the weakest to the strongest.
        curve: one attacker at rising epsilon, for the first ``config.curve_images`` images.
        sandwich: the attacker inside every certified ball, None without noise.
        kind: kind of the model, random where it is smoothed.
    """

    threat: ThreatModel
    rungs: list[Plan | Suite]
    curve: list[tuple[ThreatModel, Plan]]
    settings: VerdictSettings
    sandwich: Plan | None
    kind: Kind

    @classmethod
    def of(cls, recipe: Recipe, num_classes: int, pixels: int) -> "Attackers":
        """Return the attackers for images of this number of pixels, counted over all channels."""
        config, smoothed = recipe.attack, recipe.smoothing.sigma > 0
        threat = ThreatModel(config.norm, parse_fraction(config.epsilon))
        rungs = ladder(config, threat, num_classes) if smoothed else _plain_rungs(config, num_classes)
        draws = config.strong_eot_samples if smoothed else 0
        points = curve(threat, pixels, config.steps, draws) if config.curve_images else []
        # an image gets one verdict per rung and point of the curve, and one inside the certified ball
        level = config.alpha / (len(rungs) + len(points) + 1)
        settings = VerdictSettings(level, config.max_votes, recipe.seed)
        inside = sandwich_plan(config.steps, norm=CERTIFIED_NORM[recipe.smoothing.noise]) if smoothed else None
        return cls(threat, rungs, points, settings, inside, "random" if smoothed else "plain")

    @property
    def has_suite(self) -> bool:
        """Whether the ladder has the worst-case suite."""
        return any(rung.name == WORST_CASE for rung in self.rungs)

    def rung(self, name: str | None) -> Plan | Suite | None:
        """Return the rung of this name, or None without a name. Raises: ConfigError if there is no such rung."""
        rungs = {rung.name: rung for rung in self.rungs}
        if name is not None and name not in rungs:
            raise ConfigError(f"the ladder has no rung {name!r}; it has {', '.join(rungs)}")
        return None if name is None else rungs[name]


def check_attackers(recipe: Recipe, num_classes: int, shape: tuple[int, ...]) -> None:
    """Check that the attack stage and the audit of ``recipe`` can judge a point, and that the audited rung exists.

    Raises:
        ConfigError: they cannot, or there is no such rung.
    """
    attackers = Attackers.of(recipe, num_classes, math.prod(shape))
    attackers.rung(recipe.audit.rung)
    if recipe.smoothing.sigma == 0:
        return  # a deterministic network is judged by its class
    most = max(_verdicts(plan) for plan in attackers.rungs)
    audited = VerdictSettings(recipe.audit.alpha / VERDICTS, recipe.audit.max_votes, recipe.seed)
    suite = worst_case("random", num_classes)
    for section, settings, verdicts in (("attack", attackers.settings, most), ("audit", audited, _verdicts(suite))):
        try:
            settings.check_reachable(None, verdicts)
        except InputError as error:
            raise ConfigError(f"{section}: {error}") from error


def _verdicts(plan: Plan | Suite) -> int:
    """Return the number of verdicts on an image that share the level of ``plan``."""
    return len(plan.plans) if isinstance(plan, Suite) else 1


def _plain_rungs(config: AttackConfig, num_classes: int) -> list[Plan | Suite]:
    """Return the ladder of deterministic networks, without its strong attackers if the recipe has none."""
    rungs = plain_ladder(num_classes)
    if config.strong_steps:
        return rungs
    return [rung for rung in rungs if isinstance(rung, Plan) and rung.method in ("none", "fgsm", "pgd")]
