"""Binomial bounds and tests against independent implementations and exact arithmetic; radii against 40 digits."""

from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from math import comb

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint  # type: ignore[import-untyped]

from rush.certification.bounds import RADIUS_DIGITS, certified_radius, certify_counts, largest_radius
from rush.errors import InputError
from rush.smoothing.classifier import ABSTAIN
from rush.statistics import lower_bound, sign_test, upper_quantile


def _successes(trials: int) -> np.ndarray:
    """All counts where there are few, else those at both ends and some between."""
    if trials <= 1000:
        return np.arange(trials + 1)
    ends = np.concatenate([np.arange(60), trials - np.arange(60)])
    return np.unique(np.concatenate([ends, np.linspace(0, trials, 301).astype(int), trials // 2 + np.arange(-50, 50)]))


@pytest.mark.parametrize("alpha", [0.05, 1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize("trials", [1, 2, 7, 100, 1000, 100_000, 1_000_000])
def test_the_lower_bound_is_that_of_statsmodels_and_keeps_its_level(trials: int, alpha: float) -> None:
    """It is never above the other one, and by the binomial itself no tighter bound keeps the level."""
    k = _successes(trials)
    bound = lower_bound(k, trials, alpha)
    reference, _ = proportion_confint(k, trials, alpha=2 * alpha, method="beta")
    assert (bound <= reference).all()
    np.testing.assert_allclose(bound, reference, rtol=1e-9, atol=0)
    k, bound = k[1:], bound[1:]  # without a success the bound is 0, which is above no probability
    assert np.all(stats.binom.sf(k - 1, trials, bound) <= alpha)
    assert np.all(stats.binom.sf(k - 1, trials, bound * (1 + 1e-8)) > alpha)


@pytest.mark.parametrize("alpha", [0.05, 1e-3, 1e-9])
@pytest.mark.parametrize("trials", [1, 5, 33, 60])
def test_the_lower_bound_keeps_its_level_in_rational_arithmetic(trials: int, alpha: float) -> None:
    for k in range(1, trials + 1):
        p = Fraction(float(lower_bound(k, trials, alpha)))
        tail = sum(comb(trials, i) * p**i * (1 - p) ** (trials - i) for i in range(k, trials + 1))
        assert tail <= Fraction(alpha)


def test_the_lower_bound_of_no_success_is_zero_and_arrays_broadcast() -> None:
    assert lower_bound(0, 10, 0.01) == 0
    rows = lower_bound(np.array([[0], [90]]), np.array([100, 200, 300]), 0.01)
    assert rows.shape == (2, 3)
    assert (np.diff(rows[1]) < 0).all()
    assert rows[1, 2] == lower_bound(90, 300, 0.01)


@pytest.mark.parametrize(
    ("successes", "trials", "alpha"),
    [(-1, 10, 0.1), (11, 10, 0.1), (0, 0, 0.1), (5, 10, 0.0), (5, 10, 1.0), (5, 10, np.nan), (np.nan, 10, 0.1)],
)
def test_impossible_counts_and_levels_are_refused(successes: float, trials: int, alpha: float) -> None:
    with pytest.raises(InputError, match=r"need 0 <= successes <= trials|alpha must lie in"):
        lower_bound(successes, trials, alpha)


def test_the_sign_test_is_scipys_one_sided_test_rounded_up() -> None:
    pairs = [(w, n - w) for n in (1, 2, 9, 10, 100, 101) for w in range(n + 1)]
    pairs += [(w, 10_000 - w) for w in range(4500, 5500, 37)] + [(50_700, 49_300), (400, 0), (0, 400)]
    wins, losses = np.array(pairs).T
    expected = np.array([stats.binomtest(w, w + loss, 0.5, alternative="greater").pvalue for w, loss in pairs])
    found = sign_test(wins, losses)
    assert (found >= np.minimum(expected, 1.0)).all()
    assert (found <= 1).all()
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_the_sign_test_without_votes_or_wins_proves_nothing() -> None:
    assert sign_test(0, 0) == 1
    assert sign_test(0, 7) == 1
    with pytest.raises(InputError, match="successes"):
        sign_test(-1, 7)
    with pytest.raises(InputError, match="successes"):
        sign_test(3, -1)


@pytest.mark.parametrize("tail", [0.5, 0.01, 1e-6, 1e-12])
@pytest.mark.parametrize("probability", [0.0, 1e-6, 0.002, 0.05, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("trials", [0, 1, 2, 30, 1000, 20_000])
def test_the_upper_quantile_is_the_smallest_count_with_so_small_a_tail(
    trials: int, probability: float, tail: float
) -> None:
    k = upper_quantile(trials, probability, tail)
    assert stats.binom.sf(k, trials, probability) <= tail * (1 + 1e-9)
    assert k == 0 or stats.binom.sf(k - 1, trials, probability) > tail * (1 - 1e-9)


def _decisive_probabilities(sigma: float) -> Iterator[float]:
    """Probabilities whose exact radius has any seventh decimal, and the neighbours of those with a whole sixth one."""
    draws = np.random.default_rng(0)
    yield from draws.uniform(0.5, 1, 300)
    yield from (1 - 10 ** draws.uniform(-12, -1, 300)).tolist()
    for radius in draws.integers(1, 3_000_000, 100) * 1e-6:
        p = float(stats.norm.cdf(radius / sigma))
        yield from (p, float(np.nextafter(p, 0)), float(np.nextafter(p, 1)))


@pytest.mark.parametrize("sigma", [0.12, 0.25, 0.5, 1.0, 1 / 3])
def test_no_radius_and_no_text_of_one_is_above_the_true_value(sigma: float) -> None:
    """Nor below it by more than a unit of the sixth decimal."""
    p = np.array([value for value in _decisive_probabilities(sigma) if 0.5 < value < 1])
    radii = certified_radius(p, sigma)
    assert (sigma * stats.norm.ppf(p) - radii < 1.001e-6).all()
    with mpmath.workdps(40):
        for probability, radius in zip(p, radii, strict=True):
            text = Decimal(f"{radius:.{RADIUS_DIGITS}f}")
            for value in (mpmath.mpf(float(radius)), mpmath.mpf(str(text))):
                assert mpmath.ncdf(value / mpmath.mpf(sigma)) <= mpmath.mpf(float(probability))


def test_the_ceiling_of_the_usual_sample_number_is_not_rounded_up() -> None:
    """At sigma 0.5, 100,000 samples and alpha 0.001 the largest radius is 1.9057...; published logs print 1.91."""
    largest = largest_radius(100_000, 0.5, 0.001)
    with mpmath.workdps(40):
        exact = mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf("0.001") ** (mpmath.mpf(1) / 100_000) - 1) / 2
    assert largest <= exact < largest + 1.001e-6
    assert f"{largest:.4f}" == "1.9057"
    assert Decimal(f"{largest:.{RADIUS_DIGITS}f}") < Decimal("1.91")


def test_one_half_certifies_nothing_and_the_next_float_does_not_divide_by_it() -> None:
    assert certified_radius(0.5, 1.0) == 0
    assert certified_radius([0.2, np.nextafter(0.5, 1)], 1.0).tolist() == [0, 0]
    assert certified_radius(0.51, 1.0) > 0


def test_ties_abstain_and_a_selected_class_that_is_no_majority_abstains() -> None:
    selection = np.array([[50, 50], [60, 40], [60, 40], [60, 40], [0, 100]])
    estimation = np.array([[500, 500], [499, 501], [0, 1000], [990, 10], [10, 990]])
    certified = certify_counts(selection, estimation, sigma=0.5, alpha=0.001)
    assert certified.prediction.tolist() == [ABSTAIN, ABSTAIN, ABSTAIN, 0, 1]
    assert certified.radius[:3].tolist() == [0, 0, 0]
    assert (certified.radius[3:] > 0).all()
    assert certified.p_lower[2] == 0


def test_the_lower_bound_just_at_one_half_abstains() -> None:
    """The counts around the threshold of a fair coin: a class is certified exactly where the exact test rejects."""
    k = np.arange(480, 600)
    estimation = np.stack([k, 1000 - k], 1)
    certified = certify_counts(np.tile([1, 0], (len(k), 1)), estimation, sigma=1.0, alpha=0.01)
    rejects = stats.binom.sf(k - 1, 1000, 0.5) <= 0.01
    assert rejects.any()
    assert not rejects.all()
    np.testing.assert_array_equal(certified.prediction == 0, rejects)
