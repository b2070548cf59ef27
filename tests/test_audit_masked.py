"""Defences that hide their gradient: the audit's own accuracy comes near to what an attack made for them leaves."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from audit_stochastic import Picked, dithered
from audit_zoo import digits, linf, quantised
from audit_zoo_second import noisy_perceptron, perceptron
from rush.auditing.audit import AuditReport, audit
from rush.auditing.surrogates import Changed, attacked_through, smoothed_surrogate, steps_without_derivative, twin
from rush.evaluation.attack import attack, verdict
from rush.evaluation.evaluation import Evaluation
from rush.evaluation.plans import Plan
from rush.evaluation.verdict import VerdictSettings

LEVELS = 3
NEAR = 0.05  # of the truth


def known_dither(inner: nn.Module, levels: int) -> nn.Module:
    """``dithered``, written with the knowledge that its mean is the pixel: the same values, derivative 1."""

    def dither(x: Tensor) -> Tensor:
        rounded = (x.detach() * levels + torch.rand_like(x)).floor() / levels
        return x - x.detach() + rounded

    return Changed(inner, dither)


@dataclass(frozen=True)
class Masked:
    """A defence, and the same one with a derivative that is written by hand."""

    name: str
    defence: Callable[[], nn.Module]
    known: Callable[[], nn.Module]
    epsilon: float


def ensemble(dither: Callable[[nn.Module, int], nn.Module]) -> nn.Module:
    return Picked([dither(network, LEVELS) for network in (perceptron(), noisy_perceptron())])


CASES = [
    Masked(
        "bit reduction with dither",
        lambda: dithered(perceptron(), LEVELS),
        lambda: known_dither(perceptron(), LEVELS),
        0.12,
    ),
    Masked("ensemble of dithered networks", lambda: ensemble(dithered), lambda: ensemble(known_dither), 0.15),
]
# What the attack made for the defence does: gradients, targets and losses that the audit's do not have together.
MADE_FOR_IT: Sequence[dict[str, object]] = (
    {"loss": "margin", "steps": 50, "eot_samples": 48},
    {"loss": "cross-entropy", "steps": 30, "eot_samples": 48},
    {"loss": "margin", "steps": 25, "eot_samples": 32, "targets": (1, 2)},
)


def truly_broken(case: Masked, number: int) -> NDArray[np.bool_]:
    """Images that attacks on the known defence, or its images as they are, break; judged on the defence itself."""
    images, threat = digits(number), linf(case.epsilon)
    broken = attack(case.defence(), images, threat, "none", decision="vote").broken
    for seed, options in enumerate(MADE_FOR_IT):
        made = attack(case.known(), images, threat, "apgd", decision="vote", seed=seed, **options)  # type: ignore[arg-type]
        broken = broken | verdict(case.defence(), images, made.adversarial, threat, decision="vote").broken
    return broken


@cache
def reported(case: Masked, number: int) -> AuditReport:
    return audit(case.defence(), digits(number), linf(case.epsilon), decision="vote")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_masks_the_gradient_is_named(case: Masked) -> None:
    """PGD-20 through the rounding stands still; the twin does not, and the finding names it."""
    report = reported(case, 16)
    assert report.verdict == "overestimated", str(report)
    assert "straight-through" in report.failed, str(report)
    assert report.failed[0] == "gradient", str(report)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_audits_accuracy_is_near_the_truth(case: Masked) -> None:
    """40 images: at most two (5 points) that attacks made for the defence break and the audit does not.

    The suite alone, without the twin, is 10 points and more away: else nothing is seen here."""
    truth = 1 - truly_broken(case, 40).mean()
    assert reported(case, 40).reference_accuracy <= truth + NEAR + 1e-9
    suite = attack(case.defence(), digits(40), linf(case.epsilon), "worst-case", decision="vote")
    assert suite.robust_accuracy > truth + 2 * NEAR


def test_a_deterministic_quantiser_is_passed_straight_through() -> None:
    """Points of the twin are judged on the network itself: what it breaks, the network gives another class."""
    model, threat = quantised(perceptron(), 8), linf(0.1)
    evaluation = Evaluation.of(model, digits(40), threat, VerdictSettings(1e-3, 100, 0))
    defender, images = evaluation.defender, evaluation.images
    assert steps_without_derivative(defender, images.x[:2]) > 0
    plan = Plan("apgd", "APGD-30", "apgd", steps=30, loss="margin")
    plain = evaluation.run(plan)
    through = replace(evaluation, defender=attacked_through(defender, twin(defender))).run(plan)
    assert plain.robust_accuracy > through.robust_accuracy + 0.3
    wrong = (model(through.adversarial).argmax(1) != images.y).numpy()
    np.testing.assert_array_equal(through.broken, wrong)


@pytest.mark.parametrize("decision", [None, "vote"])
def test_a_smoothed_surrogate_climbs_where_the_gradient_is_hidden(decision: str | None) -> None:
    """A ripple on the pixels has slopes ten times those of the image; the mean over noisy images has not. Four images
    of 40 at least are broken by it alone."""
    images, threat = digits(40), linf(0.1)
    rippled = Changed(perceptron(), lambda x: x + 0.02 * torch.sin(x * 500))
    model = rippled if decision is None else Picked([rippled])
    settings = VerdictSettings(1e-3, 400, 0)
    evaluation = Evaluation.of(model, images, threat, settings, decision)  # type: ignore[arg-type]
    plan, defender = Plan("apgd", "APGD-20", "apgd", "fresh", 16, 20, loss="margin"), evaluation.defender
    bare = evaluation.run(plan)
    surrogate = attacked_through(defender, smoothed_surrogate(defender, 0.1, straight=False))
    through = replace(evaluation, defender=surrogate).run(plan)
    assert through.robust_accuracy <= bare.robust_accuracy - 0.1
