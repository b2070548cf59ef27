"""The sandwich: no point inside a certified ball may be broken.

Every image that is certified with its label's class is attacked at 0.99 of its own radius, in the norm of the
certificates, so that the check has power. Every other broken point of the run that lies within the radius, in that
norm, counts as well. A violation is an error of the certificate (probability <= the level of a single one) or of a
verdict (probability <= the verdicts' level). For n images their number is therefore stochastically at most Binomial(n,
the sum of the two). A number above its 1 - 1e-6 quantile is an error of the software or of the model's use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rush.attacks.threat import ThreatModel
from rush.certification.certificates import Certificates
from rush.choices import Norm
from rush.errors import SandwichError
from rush.evaluation.plans import Plan
from rush.evaluation.result import AttackResult

SHARE_OF_RADIUS = 0.99


@dataclass(frozen=True)
class Sandwich:
    """The result of comparing broken points with certificates.

    Attributes:
        checked: number of certified images with a judged point.
        violations: ids of those that are broken inside their radius.
        allowed: largest number of violations that chance explains.
    """

    checked: int
    violations: tuple[str, ...]
    allowed: int

    def require(self) -> None:
        """Raise SandwichError when there are more violations than chance explains."""
        if len(self.violations) > self.allowed:
            raise SandwichError(
                f"{len(self.violations)} of {self.checked} certified images are broken inside their radius, "
                f"at most {self.allowed} can be chance: {', '.join(self.violations[:10])}. "
                "The certificate or the verdict is wrong; do not rely on either"
            )


def sandwich_plan(steps: int, eot_samples: int = 16, norm: Norm = "l2") -> Plan:
    """Return PGD with ``steps`` steps of 2.5 / ``steps`` of the ball's radius, ``eot_samples`` fresh draws each.

    ``norm`` is that of the certificates, by which the plan is labelled.
    """
    return Plan("sandwich", f"{norm} at 0.99 of the certified radius", "pgd", "fresh", eot_samples, steps, 2.5 / steps)


def sandwich_positions(certificates: Certificates, ids: Sequence[str]) -> list[int]:
    """Return the positions in ``ids`` of the images that are certified with the correct class and a positive radius."""
    radii = _correct_radii(certificates)
    return [position for position, image_id in enumerate(ids) if image_id in radii]


def sandwich_threat(certificates: Certificates, ids: Sequence[str]) -> ThreatModel:
    """Return the balls of 0.99 of the certified radius around the images ``ids``, in the norm of the certificates."""
    radii = dict(zip(certificates.ids, certificates.radius, strict=True))
    return ThreatModel(certificates.rule.norm, torch.tensor([SHARE_OF_RADIUS * radii[image_id] for image_id in ids]))


def check_sandwich(certificates: Certificates, results: Sequence[AttackResult], verdict_level: float) -> Sandwich:
    """Compare every broken point of ``results`` with the certificate of its image.

    Args:
        certificates: certificates of the images, among others.
        results: results on one model, each by a different attacker.
        verdict_level: probability that any verdict on one image is false, over all of ``results``.
    """
    radii, rule = _correct_radii(certificates), certificates.rule
    attacked = {image_id for result in results for image_id in result.ids if image_id in radii}
    broken = {
        image_id
        for result in results
        for image_id, size, wrong in zip(result.ids, result.size(rule.norm), result.broken, strict=True)
        if wrong and image_id in radii and size <= radii[image_id] + rule.slack
    }
    allowed = rule.allowed_violations(len(attacked), verdict_level)
    return Sandwich(len(attacked), tuple(sorted(broken)), allowed)


def _correct_radii(certificates: Certificates) -> dict[str, float]:
    """Return the radius, by image id, of the images that are certified with the correct class and a positive radius."""
    columns = zip(certificates.ids, certificates.radius, certificates.correct, strict=True)
    return {image_id: radius for image_id, radius, correct in columns if correct and radius > 0}
