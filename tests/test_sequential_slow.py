"""Sequential certification at length: more images, larger caps, counts of a million votes."""

from itertools import product

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
from scipy import stats

from rush.certification.sequential import BetaMixture, GeometricMixture, evidence, reachable
from rush.choices import SequentialBound
from test_sequential import (
    BOUNDS,
    HAIR,
    TAIL,
    exactly,
    fates,
    known_p_votes,
    mean_votes,
    most,
    null_at,
    published_probabilities,
    sample,
    single,
    slow_value,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("bound", BOUNDS)
def test_the_usual_cap_keeps_the_usual_level(bound: SequentialBound) -> None:
    """100,000 images just below two sigma, cap 100,000, alpha 0.001: no more false ones than alpha, and as many as the
    exact calculation says. Odds of failing by chance: 3e-6."""
    cap, draws = 100_000, 100_000
    tests = single(null_at(2), bound, 1e-3, cap, futility=0.05)
    false = int(sample(tests, np.full(draws, null_at(2) - HAIR), cap, seed=21).passed.sum())
    exact = exactly(tests, null_at(2) - HAIR, cap).passed
    assert false <= most(draws, 1e-3)
    assert stats.binom.isf(1 - TAIL, draws, exact) <= false <= stats.binom.isf(TAIL, draws, exact)


@pytest.mark.parametrize("alpha", [0.05, 1e-3, 1e-7])
@pytest.mark.parametrize("bound", BOUNDS)
def test_exact_levels_at_the_usual_cap(bound: SequentialBound, alpha: float) -> None:
    """Both errors at every null up to 3.5 sigma, cap 100,000. The geometric bound uses more than 0.75 of alpha up to
    3 sigma (0.05 and 0.001); doubled, every level would be exceeded."""
    cap = 100_000
    for half in range(8):
        null = null_at(half / 2)
        if not reachable(bound, null, alpha, cap):
            continue
        at_null, inside = fates(single(null, bound, alpha, cap), (null, null + 0.01 * (1 - null)), cap)
        assert max(at_null.passed / alpha, at_null.given_up / 1e-3, inside.given_up / 1e-3) <= 1
        if bound == "geometric" and half <= 6 and alpha > 1e-7:
            assert at_null.passed > 0.75 * alpha
            assert exactly(single(null, bound, 2 * alpha, cap), null, cap).passed > 1.4 * alpha


@pytest.mark.parametrize("bound", BOUNDS)
def test_levels_looked_at_after_every_vote(bound: SequentialBound) -> None:
    """Up to 20,000 votes: no scheme of looks sees more crossings than this one."""
    for z in (0, 1, 2, 3):
        tests = single(null_at(z), bound, 0.05, 20_000)
        every = exactly(tests, null_at(z), 20_000, 1).passed
        assert exactly(tests, null_at(z), 20_000, 100).passed < every <= 0.05


def test_one_radius_costs_little_more_than_with_known_probabilities_at_the_usual_cap() -> None:
    """200 images, cap 100,000, in expectation: at most 1.3 times the votes of a test that knows every p at every
    radius, and fewer than with the beta mixture up to two sigma; at three the beta mixture needs 1 to 2 % fewer."""
    p, cap = published_probabilities(200), 100_000
    for z in (0, 0.5, 1, 1.5, 2, 3):
        votes = mean_votes(p, z, "geometric", cap)
        assert votes <= 1.3 * known_p_votes(p, null_at(z), 1e-3, cap)
        assert votes < (1 if z <= 2 else 1.04) * mean_votes(p, z, "beta", cap)


@pytest.mark.parametrize("cap", [100_000, 1_000_000])
def test_rounding_stays_far_below_the_margin_of_the_threshold(cap: int) -> None:
    """Counts around the decision, where a value near 1 / level is the difference of terms of the size of ``cap``:
    within 1e-8 of 30 digits, where thresholds are raised by 1e-6."""
    level = 1e-3
    with mpmath.workdps(30):
        for z, side, sds in product((0, 2, 3), (1, -1), (-2, 0, 3, 5)):
            null, n = null_at(z), cap // 2
            k = round(n * null + side * sds * (n * null * (1 - null)) ** 0.5)
            counts = np.array([float(k)]), np.array([float(n)])
            for name, mixture in (("geometric mixture", GeometricMixture), ("beta mixture", BetaMixture)):
                expected = mpmath.log(slow_value(name, side, null, level, cap, k, n))
                found = mixture(null, level, cap, side).log_value(*counts)[0]
                assert abs(found - expected) < 1e-8, (name, side, z, sds)


@pytest.mark.parametrize("cap", [2_000, 20_000, 100_000])
def test_the_binomial_test_at_the_cap_is_always_passed_on(cap: int) -> None:
    """At the cap the geometric bound rejects wherever the binomial test at a third of the level does, 1e-5 apart, to a
    single count."""
    for z in (0, 1, 2, 2.5):
        null, level = null_at(z), 1e-3
        k = np.arange(int(cap * null), cap + 1)
        tail = stats.binom.sf(k - 1, cap, null)
        value = evidence("geometric", null, level, cap).log_value(k.astype(float), np.full(len(k), float(cap)))
        assert (value[tail <= level / 3 * (1 - 1e-5)] >= np.log(1 / level) + 1e-6).all()
        assert (value[tail > level] < np.log(1 / level)).all()
