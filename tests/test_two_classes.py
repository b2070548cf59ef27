"""The bound with two classes: slow textbook, coverage of both bounds, and what is refused."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

import rush
from certifying import pixel_images, pixel_vote
from rush.certification.bounds import certify_counts, certify_two_classes
from rush.certification.certificates import Certificates
from rush.certification.recertify import recompute
from rush.certification.rule import make_rule
from rush.choices import ABSTAIN
from rush.errors import InputError
from rush.records.certificates import read_certificates, write_certificates
from rush.statistics import upper_quantile

SIGMA, ALPHA = 0.5, 0.05


def textbook(counts: NDArray[np.int64], selected: int, alpha: float) -> float:
    """The radius of one image, from scipy's exact intervals; 0 where nothing is certified."""
    total, other = int(counts.sum()), int(np.delete(counts, selected).max())
    lower = stats.binomtest(int(counts[selected]), total, alternative="greater").proportion_ci(1 - alpha / 2).low
    upper = stats.binomtest(other, total, alternative="less").proportion_ci(1 - alpha / 2).high
    upper = min(upper, 1 - lower)
    if lower <= upper:
        return 0.0
    return float(SIGMA / 2 * (stats.norm.ppf(lower) - stats.norm.ppf(upper)))


def votes_of(probabilities: NDArray[np.float64], trials: int, draws: int) -> NDArray[np.int64]:
    return np.random.default_rng(0).multinomial(trials, probabilities, draws).astype(np.int64)


def test_radii_are_those_of_a_slow_textbook() -> None:
    rng = np.random.default_rng(1)
    estimation = np.stack([rng.multinomial(1000, rng.dirichlet([0.3] * 10)) for _ in range(200)])
    selection = rng.multinomial(50, [0.1] * 10, 200)
    selection[:100] = estimation[:100]
    certified = certify_two_classes(selection, estimation, SIGMA, ALPHA)
    expected = np.array([textbook(n, int(s.argmax()), ALPHA) for n, s in zip(estimation, selection, strict=True)])
    assert (certified.radius <= expected).all()
    assert (certified.radius >= expected - 1.1e-6).all()
    assert (expected > 0).sum() > 50
    np.testing.assert_array_equal(certified.prediction, np.where(certified.radius > 0, selection.argmax(1), ABSTAIN))


def test_it_certifies_below_one_half_and_costs_little_above() -> None:
    spread = np.array([[400, *[600 // 19] * 19]])
    two, one = certify_two_classes(spread, spread, SIGMA, ALPHA), certify_counts(spread, spread, SIGMA, ALPHA)
    assert one.prediction[0] == ABSTAIN
    assert two.prediction[0] == 0
    assert two.radius[0] > 0.3
    clear = np.array([[990, 10, *[0] * 18]])
    assert (
        0.95
        < certify_two_classes(clear, clear, SIGMA, ALPHA).radius / certify_counts(clear, clear, SIGMA, ALPHA).radius
        < 1
    )


def test_a_doubled_level_would_be_noticed() -> None:
    """Probabilities just below and above values that the two bounds take, so that each level is nearly used up."""
    draws, trials = 100_000, 1000
    counts = np.arange(trials + 1)
    agreeing = np.stack([counts, trials - counts], 1)
    selection = np.tile([1, 0], (trials + 1, 1))
    lower = certify_two_classes(selection, agreeing, SIGMA, ALPHA).p_lower
    p_a = float(lower[600]) - 1e-9  # fails from 600 votes on
    b = 200
    p_b = (
        1
        - float(certify_two_classes(selection, np.stack([trials - counts, counts], 1), SIGMA, ALPHA).p_lower[b])
        + 1e-9
    )
    p = np.array([p_a, p_b, *[(1 - p_a - p_b) / 8] * 8])
    votes = votes_of(p, trials, draws)
    chosen = np.tile(np.eye(10, dtype=np.int64)[0], (draws, 1))
    half = upper_quantile(draws, ALPHA / 2, 1e-6)
    for alpha, fits in ((ALPHA, True), (2 * ALPHA, False)):
        certified = certify_two_classes(chosen, votes, SIGMA, alpha)
        assert ((certified.p_lower > p_a).sum() <= half) == fits
        assert ((certified.p_upper < p_b).sum() <= half) == fits


def certified(**given: Any) -> Certificates:
    given = {"num_selection": 30, "num_estimation": 1200, "seed": 3, **given}
    return rush.certify(pixel_vote(), pixel_images(20), **given)


def test_the_engine_recomputing_and_the_table_agree(tmp_path: Any) -> None:
    """Same votes, same certificates, whether the bound is chosen before the votes or applied to stored ones."""
    one, two = certified(), certified(bound="two-classes")
    np.testing.assert_array_equal(one.counts, two.counts)
    again = recompute(one, bound="two-classes")
    assert again.rule == two.rule
    for name in ("prediction", "radius", "p_lower", "outcome"):
        np.testing.assert_array_equal(getattr(again, name), getattr(two, name))
    assert (two.prediction >= 0).sum() >= (one.prediction >= 0).sum()
    write_certificates(tmp_path / "certificates.tsv", two, range(20))
    read = read_certificates(tmp_path / "certificates.tsv")
    assert read is not None
    np.testing.assert_array_equal(read[1].radius, two.radius)
    np.testing.assert_array_equal(recompute(read[1], bound="clopper-pearson").radius, one.radius)


def test_what_cannot_be_known_is_refused() -> None:
    one = certified()
    with pytest.raises(InputError, match=r"'two-classes' needs the votes for every class"):
        recompute(one, bound="two-classes", num_estimation=600)
    shorter = recompute(one, num_estimation=600)
    with pytest.raises(InputError, match=r"'two-classes' needs the votes for every class"):
        recompute(shorter, bound="two-classes")
    with pytest.raises(InputError, match=r"'two-classes' needs the votes for every class"):
        recompute(certified(method="sequential"), bound="two-classes")


def test_a_rule_knows_how_far_it_reaches() -> None:
    given = {"sigma": 0.25, "method": "clopper-pearson", "alpha": 0.001, "level": "image", "num_images": 1}
    given |= {"num_selection": 100, "futility": 0.05, "bound": "two-classes"}
    rule = make_rule(**given, num_estimation=11, radii=None)
    assert 0 < rule.largest_radius < make_rule(**{**given, "bound": None}, num_estimation=11, radii=None).largest_radius
    with pytest.raises(InputError, match="give at least 11"):
        make_rule(**given, num_estimation=10, radii=None)
    on_grid = make_rule(**given, num_estimation=1000, radii=(0.0, 0.25))
    assert on_grid.largest_radius == 0.25
