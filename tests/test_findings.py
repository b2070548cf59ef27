"""Decisions of the audit on crafted figures: each fails or passes where it must, and says when it cannot decide."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import stats

from rush.auditing import findings, gradients, probes, stronger, validity
from rush.auditing.audit import PROBES
from rush.auditing.probes import Outcome

HELD = [True] * 10

# decision, figures that must pass, figures that must fail
CRAFTED: list[tuple[Callable[..., Outcome], tuple[Any, ...], tuple[Any, ...]]] = [
    (validity.decide_range, (0.0, 1.0), (0.0, 255.0)),
    (validity.decide_range, (-5e-8, 1 + 5e-8), (-2.1, 2.6)),
    (validity.decide_scale, (60, 54, {"a": (3, 0)}), (60, 6, {"a": (48, 0)})),
    # a stochastic network whose own noise other scales drown, and one whose outputs do not depend on the images
    (validity.decide_scale, (60, 50, {"a": (9, 0)}, 8), (60, 6, {"a": (48, 0)}, 8)),
    (validity.decide_ball, ("linf", [1.0] * 10, HELD, 5.0), ("linf", [1.0] * 9 + [1.01], HELD, 5.0)),
    (validity.decide_ball, ("linf", [1 + 5e-5] * 10, HELD, 5.0), ("linf", [255 / 256] * 10, HELD, 5.0)),
    (validity.decide_ball, ("l2", [0.7] * 10, HELD, None), ("linf", [0.5] * 10, HELD, None)),
    # a plan whose steps cannot reach the edge says nothing about the ball, nor do the points of broken images
    (validity.decide_ball, ("linf", [0.2] * 10, HELD, 0.2), ("linf", [0.2] * 10, HELD, 5.0)),
    (validity.decide_ball, ("linf", [0.2] * 10, [False] * 10, 5.0), ("l1", [0.4] * 10, HELD, 5.0)),
    (validity.decide_mode, ((), 1e-6), (("bn1", "bn2"), None)),
    (validity.decide_mode, ((), None), ((), 0.5)),
    (validity.decide_randomness, (False, 0.0), (False, 0.1)),
    (validity.decide_randomness, (True, 0.1), (True, 0.0)),
    # draws that hardly ever change an output are draws
    (validity.decide_randomness, (True, 0.0, True), (True, 0.0)),
    (validity.decide_noise, (0.252, 0.25, "sigma"), (0.12, 0.25, "sigma")),
    (validity.decide_noise, (0.25, 0.25, "sigma"), (0.5, 0.25, "sigma")),
    (validity.decide_noise, (0.8, 1.0, "spread"), (0.0, 1.0, "spread")),
    (validity.decide_noise, (0.0, 0.0, "spread"), (1.0, 0.0, "spread")),
    (validity.decide_noise, (0.6, 1.0, "spread", lambda: 0.001), (0.4, 1.0, "spread", lambda: 0.001)),
    (gradients.decide_slopes, (0.99, 1.0, 32), (0.3, 1.0, 32)),
    # a gradient of the wrong scale points the right way; one of the wrong sign does not
    (gradients.decide_slopes, (0.99, 10.0, 32), (0.99, -1.0, 32)),
    (gradients.decide_steps, (5.0, 1.0, 30), (0.2, 0.2, 30)),
    (gradients.decide_steps, (None, 1.0, 30), (None, 0.3, 30)),
    (gradients.decide_steps, (5.0, 0.0, 2), (5.0, 0.1, 30)),
    (gradients.decide_draws, ([2.0] * 10, 20), ([2.0] * 10, 1)),
    (probes.share, (2, 40, 0.1, "images"), (9, 40, 0.1, "images")),
    (probes.gain, (1, 100, "it"), (4, 100, "it")),
]


@pytest.mark.parametrize(("decide", "passing", "failing"), CRAFTED)
def test_crafted_figures(decide: Callable[..., Outcome], passing: tuple[Any, ...], failing: tuple[Any, ...]) -> None:
    assert decide(*passing).status == "passed"
    failed = decide(*failing)
    assert failed.status == "failed"
    assert failed.evidence
    assert failed.figure is not None
    assert math.isfinite(failed.figure)


def test_every_decision_has_a_crafted_case() -> None:
    decisions = {
        value for module in (validity, gradients) for name, value in vars(module).items() if name.startswith("decide_")
    }
    assert decisions | {probes.share, probes.gain} == {decide for decide, _, _ in CRAFTED}


@pytest.mark.parametrize("probe", PROBES.values(), ids=lambda probe: probe.name)
def test_every_finding_says_its_question_its_cost_and_what_to_do(probe: probes.Probe) -> None:
    question, _, cost = str(probe.decide.__doc__).partition("Cost: ")
    assert "?" in question
    assert cost
    assert probe.remedy


def test_findings_run_from_causes_to_symptoms() -> None:
    """The first failed finding explains the others, and the reports in ``results/`` have this order."""
    assert tuple(PROBES) == (
        "input-range",
        "pixel-scale",
        "ball",
        "mode",
        "randomness",
        "noise",
        "verdict",
        "frozen-noise",
        "gradient",
        "finite-differences",
        "step-size",
        "signal-to-noise",
        "path",
        "more-eot-samples",
        "more-steps",
        "more-restarts",
        "other-loss",
        "large-epsilon",
        "planted",
        "fixed-noise-attack",
        "transfer",
        "straight-through",
        "smoothed-surrogate",
        "square",
        "random-search",
        "worst-case",
        "certificates",
    )
    assert set(PROBES) >= findings.INVALIDATING


@pytest.mark.parametrize("total", [3, 32, 64, 100])
def test_a_share_fails_by_its_exact_lower_bound_alone(total: int) -> None:
    """Against scipy's test of the same hypothesis: the share is at most the threshold."""
    for count in range(total + 1):
        p_value = stats.binomtest(count, total, 0.1, alternative="greater").pvalue
        status = findings.share_status(count, total, 0.1)
        assert (status == "failed") == (p_value < 0.05), count
        assert (status == "passed") == (count / total <= 0.1 and p_value >= 0.05), count


def test_the_levels_of_what_decides_alone_sum_to_the_verdicts() -> None:
    """d and every finding that decides alone have a level, no other has one, and the union bound gives 5 %."""
    assert set(findings.LEVELS) == findings.INVALIDATING | {"d"}
    assert sum(findings.LEVELS.values()) <= findings.OVERESTIMATED_LEVEL * (1 + 1e-12)
    assert findings.OVERESTIMATED_LEVEL == 0.05
    assert all(level >= 0 for level in findings.LEVELS.values())


def test_what_chance_explains_does_not_fail() -> None:
    assert validity.decide_noise(0.4, 1.0, "spread", lambda: 0.02).status == "undecided"
    assert validity.decide_scale(10, 5, {"a": (3, 0)}).status == "undecided"
    assert validity.decide_scale(60, 30, {"a": (29, 0)}, chance=8).status == "undecided"
    assert validity.decide_scale(60, 30, {"a": (29, 0)}).status == "failed"


@pytest.mark.parametrize("total", [5, 24, 64])
@pytest.mark.parametrize("worse_rate", [0.0, 0.05, 0.2, 0.4])
@pytest.mark.parametrize("slack", [0.0, 0.1])
def test_the_p_value_of_a_gain_is_valid(total: int, worse_rate: float, slack: float) -> None:
    """P(p-value <= u) <= u, summed exactly over all outcomes, for gains at the hypothesis' edge and inside it."""
    better_rate = worse_rate + validity.SCALE_GAIN - slack
    rates = [better_rate, worse_rate, max(0.0, 1 - better_rate - worse_rate)]
    p_values, chances = [], []
    for better in range(total + 1):
        for worse in range(total + 1 - better):
            p_values.append(_p_value(better, worse, total))
            chances.append(float(stats.multinomial.pmf([better, worse, total - better - worse], total, rates)))
    order = np.argsort(p_values)
    reached = np.cumsum(np.array(chances)[order])
    assert np.all(reached <= np.array(p_values)[order] + 1e-9)


@cache
def _p_value(better: int, worse: int, total: int) -> float:
    return validity.gain_p_value(better, worse, total, validity.SCALE_GAIN)


def test_the_p_value_of_a_gain_has_power() -> None:
    """A ten-class network from 10 to 95 % on 20 images, a two-class one from 50 to 100 % on 64: both far below the
    level. Where one side alone was ever right it is at least the binomial tail."""
    level = findings.LEVELS["pixel-scale"] / 3
    assert _p_value(17, 0, 20) < level
    assert _p_value(32, 0, 64) < level
    assert _p_value(12, 0, 24) >= stats.binom.sf(11, 24, validity.SCALE_GAIN)
    assert _p_value(0, 0, 5) == 1.0


@pytest.mark.parametrize("share", [1.0, 1 / validity.SIGMA_BAND, validity.SIGMA_BAND])
def test_the_band_of_sigma_is_beyond_chance(share: float) -> None:
    """16,384 normal values in pairs z, -z against 16,384: the ratio of the squares is F(8192, 16384) times share^2. It
    leaves the band by chance with probability < 1e-20, and a sigma at twice the band's distance is detected."""
    ratio = stats.f(8192, 16384)
    low, high = validity.SIGMA_BAND**-2, validity.SIGMA_BAND**2
    outside = ratio.cdf(low / share**4) + ratio.sf(high / share**4)
    assert outside < 1e-20 if share == 1.0 else outside > 1 - 1e-9


def test_few_images_decide_nothing() -> None:
    assert probes.share(1, 3, 0.1, "images").status == "undecided"
    assert gradients.decide_slopes(0.1, 1.0, 4).status == "undecided"
    assert gradients.decide_draws([100.0] * 4, 1).status == "undecided"
    assert probes.share(0, 0, 0.1, "images").status == "skipped"


def test_thresholds_are_the_frozen_ones() -> None:
    """They were fixed before the second half of the zoo was written; a change needs a zoo that is made after it."""
    assert {
        name: value
        for module in (findings, probes, validity, gradients, stronger)
        for name, value in vars(module).items()
        if name.isupper() and name[0] != "_" and isinstance(value, float)
    } == {
        "GAIN": 0.01,
        "CONFIDENCE": 0.95,
        "OVERESTIMATED_LEVEL": 0.05,
        "RANGE_SLACK": 1e-4,
        "SCALE_GAIN": 0.2,
        "BALL_SLACK": 1e-3,
        "BALL_256_WIDTH": 5e-4,
        "NEIGHBOURS": 1e-2,
        "PASSES_DIFFER": 1e-3,
        "SIGMA_BAND": 1.1,
        "SPREAD_BAND": 2.0,
        "DEAD_SHARE": 0.05,
        "AGREEMENT": 0.5,
        "REACH": 1.0,
        "EDGE": 0.5,
        "DRAWS_NEEDED": 1.0,
        "NOT_RISING": 0.1,
        "LARGE_EPSILON_HELD": 0.1,
        "PLANTED_MISSED": 0.1,
    }
    assert probes.FEWEST == 5
    assert validity.BALL_USED == {"linf": 0.9, "l2": 0.5, "l1": 0.5}
