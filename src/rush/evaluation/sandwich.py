"""The sandwich: no point inside a certified ball may be broken.

Every image that is certified with its label's class is attacked in l2 at 0.99 of its own radius, so that the check has
power, and every other broken point of the run whose l2 change is within the radius counts as well. A violation is an
error of the certificate (probability <= the level of a single one) or of a verdict (probability <= the verdicts'
level), so for n images their number is at most Binomial(n, the sum of the two) in law; more than its 1 - 1e-6 quantile
is an error of the software or of the model's use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rush.attacks.threat import ThreatModel
from rush.certification.certificates import Certificates
from rush.errors import SandwichError
from rush.evaluation.plans import Plan
from rush.evaluation.result import AttackResult
from rush.statistics import most_by_chance

SHARE_OF_RADIUS = 0.99


@dataclass(frozen=True)
class Sandwich:
    """checked: number of images; violations: their ids; allowed: the largest number that chance explains."""

    checked: int
    violations: tuple[str, ...]
    allowed: int

    def require(self) -> None:
        """Raises SandwichError when there are more violations than chance explains."""
        if len(self.violations) > self.allowed:
            raise SandwichError(
                f"{len(self.violations)} of {self.checked} certified images are broken inside their radius, "
                f"at most {self.allowed} can be chance: {', '.join(self.violations[:10])}. "
                "The certificate or the verdict is wrong; do not rely on either"
            )


def sandwich_plan(steps: int, eot_samples: int = 16) -> Plan:
    """PGD in l2 with ``steps`` steps of 2.5 / steps of the ball, ``eot_samples`` fresh draws each."""
    return Plan("sandwich", "l2 at 0.99 of the certified radius", "pgd", "fresh", eot_samples, steps, 2.5 / steps)


def sandwich_positions(certificates: Certificates, ids: Sequence[str]) -> list[int]:
    """Positions within ``ids`` of the images that are certified with the correct class and a positive radius."""
    certified = {
        own
        for own, correct, r in zip(certificates.ids, certificates.correct, certificates.radius, strict=True)
        if correct and r > 0
    }
    return [position for position, own in enumerate(ids) if own in certified]


def sandwich_threat(certificates: Certificates, ids: Sequence[str]) -> ThreatModel:
    """The l2 balls of 0.99 of the certified radius around the images ``ids``."""
    radius = dict(zip(certificates.ids, certificates.radius, strict=True))
    return ThreatModel("l2", torch.tensor([SHARE_OF_RADIUS * radius[own] for own in ids]))


def check_sandwich(certificates: Certificates, results: Sequence[AttackResult], verdict_level: float) -> Sandwich:
    """Compare every broken point of ``results`` with the certificate of its image.

    verdict_level: probability that any verdict on one image is false, over all of ``results``.
    """
    radius = {
        own: r
        for own, r, correct in zip(certificates.ids, certificates.radius, certificates.correct, strict=True)
        if correct and r > 0
    }
    attacked = {own for result in results for own in result.ids if own in radius}
    broken = {
        own
        for result in results
        for own, l2 in zip(np.array(result.ids)[result.broken], result.l2[result.broken], strict=True)
        if own in radius and l2 <= radius[own]
    }
    allowed = most_by_chance(len(attacked), certificates.rule.image_alpha + verdict_level)
    return Sandwich(len(attacked), tuple(sorted(str(own) for own in broken)), allowed)
