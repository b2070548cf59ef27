"""The sandwich: silent where certificates are honest, loud where they are not."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

import rush
from exact_models import square_half_space, square_images
from rush.attacks.threat import ThreatModel
from rush.certification.certify import Certificates
from rush.data.checks import labelled_pixels
from rush.errors import SandwichError
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.model import defend
from rush.evaluation.result import AttackResult
from rush.evaluation.sandwich import (
    SHARE_OF_RADIUS,
    Sandwich,
    check_sandwich,
    sandwich_plan,
    sandwich_positions,
    sandwich_threat,
)
from rush.evaluation.verdict import BROKEN, HELD, UNDECIDED, VerdictSettings
from rush.smoothing.classifier import ABSTAIN, SmoothedClassifier
from rush.smoothing.noise import Gaussian

SIGMA, LEVEL = 0.25, 0.001
SMOOTHED = SmoothedClassifier(square_half_space(), SIGMA, 2)


def _certified(margins: NDArray[np.float64]) -> tuple[Tensor, Tensor, Certificates]:
    x = square_images(margins, seed=0)
    y = torch.from_numpy((margins > 0).astype(np.int64))
    return x, y, rush.certify(SMOOTHED, (x, y), num_estimation=10_000, alpha=0.001)


@pytest.fixture(scope="module")
def certified() -> tuple[Tensor, Tensor, Certificates]:
    """60 images at 0.3 to 1.6 sigma on their class's side of the plane; all certified to 0.9 of their distance."""
    margins = np.linspace(0.075, 0.4, 60) * np.where(np.arange(60) % 2, 1, -1)
    return _certified(margins)


def _attacked(x: Tensor, y: Tensor, certificates: Certificates) -> AttackResult:
    """The run's own sandwich attack, at 0.99 of each certified radius."""
    pixels = labelled_pixels((x, y))
    positions = sandwich_positions(certificates, pixels.ids)
    chosen = pixels.select(positions)
    threat = sandwich_threat(certificates, chosen.ids)
    evaluation = Evaluation(defend(SMOOTHED), chosen, threat, VerdictSettings(LEVEL, 10_000, seed=0))
    return evaluation.run(sandwich_plan(steps=10, eot_samples=4))


def test_honest_certificates_are_not_broken(certified: tuple[Tensor, Tensor, Certificates]) -> None:
    """Odds of failing by chance: at most 60 x (alpha + level) = 0.12 by the levels; in truth a bound would have to be
    wrong by the 1 % that the attack stays inside, < 60 x 1e-4, and the verdict then at fault as well."""
    x, y, certificates = certified
    assert (certificates.radius > 0.85 * np.abs(square_half_space().margins(x))).mean() > 0.9
    result = _attacked(x, y, certificates)
    np.testing.assert_allclose(result.l2, SHARE_OF_RADIUS * certificates.radius, rtol=1e-3)  # the attack went there
    sandwich = check_sandwich(certificates, [result], LEVEL)
    assert sandwich == Sandwich(60, (), sandwich.allowed)
    assert sandwich.allowed == stats.binom.isf(1e-6, 60, 0.002)
    sandwich.require()


def test_radii_inflated_by_a_half_are_an_error(certified: tuple[Tensor, Tensor, Certificates]) -> None:
    """The check has power: nearly every image is broken inside a radius that is 1.5 times too large."""
    x, y, certificates = certified
    inflated = replace(certificates, radius=1.5 * certificates.radius)
    sandwich = check_sandwich(inflated, [_attacked(x, y, inflated)], LEVEL)
    assert sandwich.checked == 60
    assert len(sandwich.violations) > 50
    with pytest.raises(SandwichError, match=r"\d+ of 60 certified images are broken.*do not rely on either") as caught:
        sandwich.require()
    assert sandwich.violations[0] in str(caught.value)
    # the violations are the attack's work, and not that of the comparison
    clean = rush.attack(SMOOTHED, (x, y), ThreatModel("l2", 1), "none", alpha=LEVEL)
    check_sandwich(inflated, [clean], LEVEL).require()


def test_certificates_from_noise_smaller_than_stated_are_an_error(
    certified: tuple[Tensor, Tensor, Certificates], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when noise is added in other units than sigma's: votes at half the deviation give radii twice too large."""
    x, y, _ = certified
    fill = Gaussian.fill
    with monkeypatch.context() as patched:
        patched.setattr(Gaussian, "fill", lambda *arguments: fill(*arguments).div_(2))
        wrong = rush.certify(SMOOTHED, (x, y), num_estimation=1000)
    with pytest.raises(SandwichError):
        check_sandwich(wrong, [_attacked(x, y, wrong)], LEVEL).require()


def _result(ids: str, verdict: list[int], l2: list[float]) -> AttackResult:
    """A result with these verdicts at points of these sizes."""
    x = torch.full((len(ids), 1, 2, 2), 0.5)
    clean = rush.attack(
        square_half_space(), (x, torch.zeros(len(ids), dtype=torch.int64)), ThreatModel("l2", 1.0), "none"
    )
    return replace(clean, ids=tuple(ids), verdict=np.array(verdict, np.uint8), l2=np.array(l2))


@pytest.fixture
def crafted(certified: tuple[Tensor, Tensor, Certificates]) -> Certificates:
    """Five images: a right certificate of 0.3, a right one of 0.1, a wrong class, an abstention, a right one of 0.2."""
    _, _, certificates = certified
    return replace(
        certificates.select(range(5)),
        ids=tuple("abcde"),
        labels=np.array([0, 1, 1, 0, 1]),
        prediction=np.array([0, 1, 0, ABSTAIN, 1]),
        radius=np.array([0.3, 0.1, 0.5, 0.0, 0.2]),
    )


@pytest.mark.parametrize(
    ("results", "violations", "checked"),
    [
        # inside, outside, wrong class, abstained, held, no certificate
        ([("abcdez", [BROKEN, BROKEN, BROKEN, BROKEN, HELD, BROKEN], [0.29, 0.11, 0.01, 0.0, 0.01, 0.01])], ("a",), 3),
        # the edge of the ball belongs to it; undecided points break nothing
        ([("abe", [BROKEN, UNDECIDED, BROKEN], [0.3, 0.05, 0.2001])], ("a",), 3),
        # an image counts once, however many attacks break it
        ([("ab", [BROKEN, HELD], [0.2, 0.05]), ("ba", [BROKEN, BROKEN], [0.05, 0.1])], ("a", "b"), 2),
        ([("cz", [BROKEN, BROKEN], [0.0, 0.0])], (), 0),
    ],
)
def test_only_broken_points_within_the_radius_of_a_right_certificate_are_violations(
    results: list[tuple[str, list[int], list[float]]], violations: tuple[str, ...], checked: int, crafted: Certificates
) -> None:
    sandwich = check_sandwich(crafted, [_result(*result) for result in results], LEVEL)
    assert sandwich.violations == violations
    assert sandwich.checked == checked
    assert checked > 0 or sandwich.allowed == 0


def in_l1(certificates: Certificates, radius: NDArray[np.float64] | None = None) -> Certificates:
    """The certificates with radii in l1, by the noise of their rule."""
    radius = certificates.radius if radius is None else radius
    return replace(certificates, radius=radius, rule=replace(certificates.rule, noise="laplace"))


def test_points_are_compared_with_the_radius_in_the_norm_of_the_certificates(crafted: Certificates) -> None:
    """Each image has a point within its radius in one norm alone."""
    result = replace(_result("abe", [BROKEN] * 3, [0.29, 0.11, 0.21]), l1=np.array([0.31, 0.09, 0.2]))
    assert check_sandwich(crafted, [result], LEVEL).violations == ("a",)
    assert check_sandwich(in_l1(crafted), [result], LEVEL).violations == ("b", "e")


def test_the_attack_has_the_norm_of_the_certificates(crafted: Certificates) -> None:
    for certificates, norm in ((crafted, "l2"), (in_l1(crafted), "l1")):
        threat = sandwich_threat(certificates, ["a", "b"])
        assert threat.norm == norm
        np.testing.assert_allclose(threat.epsilon, [0.297, 0.099])
    assert sandwich_plan(10).label == "l2 at 0.99 of the certified radius"
    assert sandwich_plan(10, norm="l1") == replace(sandwich_plan(10), label="l1 at 0.99 of the certified radius")


@pytest.mark.parametrize("share", [0.95, 1.1])
def test_l1_radii_on_either_side_of_the_l1_distance_are_told_apart(
    share: float, certified: tuple[Tensor, Tensor, Certificates]
) -> None:
    """All weights of the plane are 1/2, so that it is twice as far in l1 as in l2."""
    x, y, certificates = certified
    certificates = in_l1(certificates, share * 2 * np.abs(square_half_space().margins(x)))
    result = _attacked(x, y, certificates)
    np.testing.assert_allclose(result.l1, SHARE_OF_RADIUS * certificates.radius, rtol=1e-3)  # the attack went there
    sandwich = check_sandwich(certificates, [result], LEVEL)
    assert sandwich.checked == 60
    assert len(sandwich.violations) > 50 if share > 1 else not sandwich.violations


def test_as_many_violations_as_chance_explains_pass_and_one_more_does_not() -> None:
    Sandwich(1000, ("a", "b"), 2).require()
    with pytest.raises(SandwichError, match=r"3 of 1000 .* at most 2 can be chance: a, b, c"):
        Sandwich(1000, ("a", "b", "c"), 2).require()


def test_the_attack_is_given_exactly_the_right_certificates_and_their_radii(crafted: Certificates) -> None:
    ids = ["e", "z", "c", "a", "d", "b"]
    positions = sandwich_positions(crafted, ids)
    assert positions == [0, 3, 5]
    threat = sandwich_threat(crafted, [ids[i] for i in positions])
    assert threat.norm == "l2"
    np.testing.assert_allclose(threat.epsilon, 0.99 * np.array([0.2, 0.3, 0.1]))
