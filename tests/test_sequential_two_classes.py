"""The sequential bound with two classes: exact algebra, exact and simulated levels, cost, stored votes.

An image is the probabilities of its classes, the first of which is selected.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import special, stats

import rush
from certifying import as_older, assert_same, pixel_images, pixel_vote
from exact_models import bins_with
from rush.certification.apply_rule import rivals_of
from rush.certification.bounds import least_probability
from rush.certification.certificates import UNKNOWN, Certificates
from rush.certification.recertify import recompute
from rush.certification.rule import fewest_for, null_probability, reach
from rush.certification.sequential import (
    CERTIFIED,
    NOT_CERTIFIABLE,
    UNDECIDED,
    Cells,
    Evidence,
    FixedSequence,
    evidence,
    reachable,
    tangents,
)
from rush.choices import TOTAL_VARIATION, SequentialBound
from rush.errors import InputError, RunError
from rush.records.certificates import read_certificates, write_certificates
from rush.smoothing.classifier import SmoothedClassifier
from test_sequential import ALPHA, HAIR, critical_counts, crossing, most, null_at, odds_of_catching, rule_of

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Rivals = Callable[[Ints, Ints], tuple[Ints, Floats]]

TWO: SequentialBound = "two-classes"
ZS = (0.0, 0.5, 1.0, 2.0)  # radii in units of sigma


# ---- Tools.


def rival_at(p_a: float, z: float) -> float:
    """The probability of the other class with which p_a gives the radius z sigma exactly."""
    return float(special.ndtr(special.ndtri(p_a) - 2 * z))


def with_rest(p_a: float, p_b: float, others: int) -> Floats:
    """p_a, p_b, and what remains for ``others`` classes, none above p_b."""
    rest = (1 - p_a - p_b) / max(others, 1)
    assert rest <= p_b + 1e-12
    return np.array([p_a, p_b, *[rest] * others])


def diffuse(p_a: float, p_b: float) -> Floats:
    """The fewest classes that share the rest at no more than p_b each: nearly all of them are runners-up."""
    return with_rest(p_a, p_b, int(np.ceil((1 - p_a - p_b) / p_b - 1e-9)))


def single(z: float, level: float = ALPHA, cap: int = 1_000, futility: float = 1e-3) -> FixedSequence:
    return FixedSequence([null_at(z)], bound=TWO, level=level, futility=futility, cap=cap)


@dataclass(frozen=True)
class Sampled:
    passed: Ints
    outcome: NDArray[np.uint8]
    trials: Ints


def sample(
    tests: FixedSequence, p: Floats, draws: int, cap: int, seed: int, block: int = 100, rivals: Rivals = rivals_of
) -> Sampled:
    """``draws`` images with class probabilities ``p``, looked at after every block until decided or at the cap."""
    rng = np.random.default_rng(seed)
    selection = rng.multinomial(100, p, draws)
    selection[:, 0] = 101
    counts, trials = np.zeros((draws, len(p)), np.int64), np.zeros(draws, np.int64)
    passed, outcome, open_ = np.zeros(draws, np.int64), np.full(draws, UNDECIDED, np.uint8), np.arange(draws)
    while open_.size and trials[open_[0]] < cap:
        counts[open_] += rng.multinomial(block, p, len(open_))
        trials[open_] += block
        rival, weight = rivals(selection[open_], counts[open_])
        weights, number = np.unique(weight, return_inverse=True)
        shape = (10, *[int(trials[open_[0]]) + 1] * 2, len(weights))
        states = np.ravel_multi_index((passed[open_], counts[open_, 0], rival, number), shape)
        unique, at = np.unique(states, return_inverse=True)
        before, k, most_of_rest, number = np.unravel_index(unique, shape)
        now = tests.look(before, k, np.full(len(k), trials[open_[0]]), (most_of_rest, weights[number]))
        passed[open_], outcome[open_] = (column[at] for column in now)
        open_ = open_[outcome[open_] == UNDECIDED]
    return Sampled(passed, outcome, trials)


class OfTwo:
    """``tests`` for votes of two classes, where the rival has all that are not successes."""

    def __init__(self, tests: FixedSequence) -> None:
        self._tests = tests

    def look(self, passed: Ints, successes: Ints, trials: Ints) -> tuple[Ints, NDArray[np.uint8]]:
        return self._tests.look(passed, successes, trials, (trials - successes, 1))


def size_of_two(tests: FixedSequence, p: float, cap: int, block: int) -> tuple[float, float]:
    """Exact probabilities that an image of two classes passes the first null, and that it is given up."""
    looks = np.arange(block, cap + 1, block)
    exact = crossing(looks, *critical_counts(OfTwo(tests), looks), p)  # type: ignore[arg-type]
    return exact.passed, exact.given_up


def all_states(trials: int) -> tuple[Floats, Floats]:
    """Every (successes, rival) with at most ``trials`` votes in all."""
    k, b = (column.ravel() for column in np.meshgrid(*[np.arange(trials + 1.0)] * 2))
    return k[k + b <= trials], b[k + b <= trials]


def mean_factors(against: Evidence, trials: int, p_a: float, p_b: float) -> Floats:
    """The mean factor of the next vote from every state after ``trials`` votes."""
    k, b = all_states(trials)
    n = np.full(len(k), float(trials))
    before = against.log_value(k, n, b)
    votes = ((p_a, k + 1, b), (p_b, k, b + 1), (1 - p_a - p_b, k, b))
    return sum(p * np.exp(against.log_value(a, n + 1, r) - before) for p, a, r in votes)  # type: ignore[return-value]


# ---- Algebra.


@pytest.mark.parametrize("z", ZS)
def test_no_vote_raises_the_evidence_on_average_where_the_radius_is_not_larger(z: float) -> None:
    """Every state after 0, 1, 7 and 40 votes, at probabilities along the boundary and inside. The tangents touch the
    boundary: the mean factor of some state is above 0.997, and 1 at radius 0, where all tangents are one."""
    largest = 0.0
    for p_a in [*np.linspace(0, 0.99, 12) * null_at(z), null_at(z)]:
        p_b = rival_at(p_a, z)
        for against in (tangents(null_at(z), ALPHA, 60), evidence(TWO, null_at(z), ALPHA, 60)):
            for trials in (0, 1, 7, 40):
                at_boundary = mean_factors(against, trials, p_a, p_b)
                assert at_boundary.max() <= 1 + 1e-9
                assert mean_factors(against, trials, 0.8 * p_a, p_b).max() <= 1 + 1e-9
                assert mean_factors(against, trials, p_a, p_b + 0.3 * (1 - p_a - p_b)).max() <= 1 + 1e-9
                largest = max(largest, float(at_boundary.max()))
    assert largest == pytest.approx(1, abs=3e-3 if z else 1e-8)


class Cell:
    """The evidence against one cell."""

    def __init__(self, cells: Cells, number: int) -> None:
        self._cells, self._number = cells, number

    def log_value(self, successes: Floats, trials: Floats, rival: Floats | float = 0.0) -> Floats:
        return self._cells.log_values(successes, trials, rival)[:, self._number]


@pytest.mark.parametrize("z", ZS)
def test_each_certifiable_image_is_in_a_cell_whose_evidence_no_vote_raises_on_average(z: float) -> None:
    """Points below the boundary, those on it included, up to p_A = 1."""
    cells = [Cell(Cells(null_at(z), 0.05, 60), number) for number in range(7)]
    for p_a in np.linspace(0, 1, 60):
        for share in (1.0, 0.5, 0.0):
            p_b = share * min(rival_at(p_a, z), 1 - p_a)
            factors = [max(mean_factors(cell, trials, p_a, p_b).max() for trials in (0, 7)) for cell in cells]
            assert min(factors) <= 1 + 1e-9, (p_a, share)
    assert all(float(cell.log_value(np.zeros(1), np.zeros(1))[0]) == pytest.approx(0, abs=1e-9) for cell in cells)


@pytest.mark.parametrize(
    ("null", "p"),
    [
        (0.5, (Fraction(2, 5), Fraction(2, 5), Fraction(1, 5))),
        (0.5, (Fraction(1, 3), Fraction(1, 3), Fraction(1, 3))),
        (0.75, (Fraction(3, 4), Fraction(1, 4), Fraction(0))),
        (0.75, (Fraction(1, 2), Fraction(9, 100), Fraction(41, 100))),  # b(1/2) = 0.0887
        (0.75, (Fraction(1, 5), Fraction(3, 10), Fraction(1, 2))),
    ],
)
def test_all_paths_of_nine_votes_keep_the_level_in_rational_arithmetic(
    null: float, p: tuple[Fraction, Fraction, Fraction]
) -> None:
    """Three classes, of which the second is the more probable one of the others, while evidence is taken at the larger
    count of the two: the mean of the value where a path first crosses, or at its end, is at most 1; the paths that
    cross at most the level, 0.3."""
    votes = np.eye(3)[list(itertools.product(range(3), repeat=9))].cumsum(1)  # (paths, 9, 3)
    k, n, rival = votes[..., 0].ravel(), np.tile(np.arange(1.0, 10), len(votes)), votes[..., 1:].max(2).ravel()
    values = np.exp(evidence(TWO, null, 0.3, 9).log_value(k, n, rival)).reshape(-1, 9)
    over = values >= 1 / 0.3
    ends = np.where(over.any(1), over.argmax(1), 8)
    chances = np.prod(np.array(p, float) ** votes[:, -1], axis=1)
    stopped = float(chances @ values[np.arange(len(values)), ends])
    crossing_paths = Counter(map(tuple, votes[over.any(1), -1].astype(int).tolist()))
    crossed = sum(number * p[0] ** a * p[1] ** b * p[2] ** c for (a, b, c), number in crossing_paths.items())
    assert stopped <= 1 + 1e-9
    assert 0 < crossed <= Fraction(0.3)


def test_values_are_those_of_a_slow_textbook() -> None:
    """Products over single votes, averaged over tangents and points."""
    z, cap, level = 0.75, 500, 1e-3
    p_r = stats.norm.cdf(z)
    votes = ["A"] * 60 + ["B"] * 7 + [""] * 21
    total = 0.0
    for number, share in enumerate((1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 32)):
        u = z - 0.3 * number
        a, b = stats.norm.cdf(u), stats.norm.cdf(u - 2 * z)
        slope = stats.norm.pdf(u - 2 * z) / stats.norm.pdf(u)
        score = {"A": 1.0, "B": 0.0, "": 1 / (1 + slope)}
        m = a + score[""] * (1 - a - b) + TOTAL_VARIATION
        near = min(np.sqrt(2 * m * (1 - m) * np.log(1 / level) / cap), (1 - m) / 2)
        distances = near * (0.999 * (1 - m) / near) ** (np.arange(12) / 11)
        for distance, weight in zip(distances, distances**-0.75 / (distances**-0.75).sum(), strict=True):
            q = m + distance
            factors = [(1 - score[v]) * (1 - q) / (1 - m) + score[v] * q / m for v in votes]
            total += share * weight * float(np.prod(factors))
    found = tangents(p_r, level, cap).log_value(np.array([60.0]), np.array([88.0]), np.array([7.0]))[0]
    assert found == pytest.approx(np.log(total), abs=1e-8)


@pytest.mark.parametrize("level", [0.05, 1e-7])
@pytest.mark.parametrize("z", ZS)
def test_it_is_never_weaker_than_the_bound_for_one_class_at_half_the_level(z: float, level: float) -> None:
    """At every state of 60 votes, of a cap of 60 and of 10,000."""
    k, b = all_states(60)
    n = np.full(len(k), 60.0)
    for cap in (60, 10_000):
        one, two = (evidence(bound, null_at(z), level, cap) for bound in ("geometric", TWO))  # type: ignore[arg-type]
        assert (two.log_value(k, n, b) >= one.log_value(k, n) - np.log(2) - 1e-6).all()


@pytest.mark.parametrize("trials", [1, 10, 100, 700, 2_000])
def test_more_votes_for_the_class_or_fewer_for_the_rival_never_pass_fewer_radii(trials: int) -> None:
    """And a class with fewer votes for the rival is never given up sooner; a larger radius never later."""
    tests = rule_of(bound=TWO, alpha=0.001).tests()
    grid = np.unique(np.linspace(0, trials, 41).astype(np.int64))
    passed, given_up = (np.full((len(grid), len(grid)), -1) for _ in range(2))
    for row, k in enumerate(grid):
        b = grid[grid <= trials - k]
        fresh, n = np.zeros(len(b), np.int64), np.full(len(b), trials)
        passed[row, : len(b)], outcome = tests.look(fresh, np.full(len(b), k), n, (b, 1))
        given_up[row, : len(b)] = (outcome == NOT_CERTIFIABLE) & (passed[row, : len(b)] == 0)
    valid = passed >= 0
    down, right = valid[1:] & valid[:-1], valid[:, 1:] & valid[:, :-1]
    assert (np.diff(passed, axis=0)[down] >= 0).all()
    assert (np.diff(passed, axis=1)[right] <= 0).all()
    assert (np.diff(given_up, axis=0)[down] <= 0).all()
    assert (np.diff(given_up, axis=1)[right] >= 0).all()
    assert trials < 100 or (passed.max() > 2 and given_up.max() == 1)


@pytest.mark.parametrize("cap", [300, 20_000])
def test_a_larger_radius_is_given_up_wherever_a_smaller_one_is_and_not_certified_before_it(cap: int) -> None:
    """So that giving up keeps its level for all radii together, whichever is the next one."""
    for trials in (10, 100, cap):
        k, b = (column.ravel() for column in np.meshgrid(*[np.linspace(0, trials, 51).round()] * 2))
        k, b = k[k + b <= trials], b[k + b <= trials]
        n, looked = np.full(len(k), float(trials)), []
        for z in np.arange(0, 3.5, 0.25):
            if not reachable(TWO, null_at(z), 1e-3, cap):
                break
            certified = evidence(TWO, null_at(z), 1e-3, cap).log_value(k, n, b) >= np.log(1e3)
            looked.append((certified, Cells(null_at(z), 0.05, cap).log_value(k, n, b) >= np.log(20)))
        assert len(looked) > 6
        for (certified, futile), (larger_certified, larger_futile) in itertools.pairwise(looked):
            assert (larger_certified <= certified).all()
            assert (futile <= larger_futile).all()


# ---- Levels.


@pytest.mark.parametrize("alpha", [0.05, 1e-3])
@pytest.mark.parametrize("z", ZS)
def test_exact_levels_of_images_with_two_classes(z: float, alpha: float) -> None:
    """Both errors at the null, cap 2,000, a look every ten votes; at radius 0 more than 0.6 of alpha is used, so that a
    doubled level exceeds it; elsewhere more than 0.25."""
    tests = single(z, alpha, 2_000, futility=0.01)
    passed, given_up = size_of_two(tests, null_at(z), 2_000, 10)
    assert (0.6 if z == 0 else 0.25) * alpha < passed <= alpha
    assert 1e-4 < given_up <= 0.01
    doubled, _ = size_of_two(single(z, 2 * alpha, 2_000), null_at(z), 2_000, 10)
    assert z > 0 or doubled > 1.2 * alpha


BOUNDARY = [
    (0.0, with_rest(0.3, 0.3, 4)),
    (0.0, diffuse(0.1, 0.1)),
    (0.5, with_rest(0.5, rival_at(0.5, 0.5), 4)),
    (0.5, diffuse(0.35, rival_at(0.35, 0.5))),
    (1.0, with_rest(0.8, rival_at(0.8, 1.0), 1)),
    (1.0, diffuse(0.7, rival_at(0.7, 1.0))),
]


def _false(z: float, p: Floats, draws: int, level: float = ALPHA, rivals: Rivals = rivals_of, seed: int = 1) -> int:
    """False certificates of images a hair below radius z, looked at every twenty votes up to 600."""
    below = p + HAIR * np.array([-1, 1, *[0] * (len(p) - 2)])
    return int((sample(single(z, level, 600), below, draws, 600, seed, 20, rivals).passed > 0).sum())


@pytest.mark.parametrize(("z", "p"), BOUNDARY)
def test_no_more_false_certificates_than_alpha_on_the_boundary(z: float, p: Floats) -> None:
    """4,000 images each. Odds of failing by chance: 1e-6."""
    assert _false(z, p, 4_000) <= most(4_000, ALPHA)


@pytest.mark.slow
@pytest.mark.parametrize(("z", "p"), BOUNDARY)
def test_no_more_false_certificates_than_alpha_on_the_boundary_at_length(z: float, p: Floats) -> None:
    """100,000 images each, and a curve up to the radius. Odds of failing by chance: 2e-6."""
    assert _false(z, p, 100_000) <= most(100_000, ALPHA)
    nulls = [null_at(step * z) for step in (0.5, 1.0, 1.5)] if z else [null_at(0), null_at(0.5)]
    tests = FixedSequence(nulls, bound=TWO, level=ALPHA, futility=0.05, cap=2_000)
    found = sample(tests, p, 100_000, 2_000, seed=2)
    assert int((found.passed > (1 if z else 0)).sum()) <= most(100_000, ALPHA)


def test_twice_the_level_is_caught() -> None:
    """Two classes of 1/2, whose exact size is known: caught with probability > 0.999999."""
    exact, _ = size_of_two(single(0.0, 2 * ALPHA, 600), 0.5, 600, 20)
    assert odds_of_catching(40_000, ALPHA, exact) > 0.999999
    false = [_false(0.0, np.array([0.5, 0.5]), 40_000, level) for level in (ALPHA, 2 * ALPHA)]
    assert false[0] <= most(40_000, ALPHA) < false[1]


def test_a_class_selected_on_the_votes_that_test_it_is_caught() -> None:
    """Of two classes of 1/2, the one that leads is tested. Either may cross: caught with probability > 0.999999."""
    looks = np.arange(10, 1_001, 10)
    passing, _ = critical_counts(OfTwo(single(0.0)), looks)  # type: ignore[arg-type]
    exact = crossing(looks, passing, looks - passing, 0.5)
    assert odds_of_catching(40_000, ALPHA, exact.passed + exact.given_up) > 0.999999
    votes = np.random.default_rng(4).binomial(10, 0.5, (40_000, len(looks))).cumsum(1)
    assert int((np.maximum(votes, looks - votes) >= passing).any(1).sum()) > most(40_000, ALPHA)


def test_a_rival_that_is_not_the_largest_is_caught() -> None:
    """The least of the others in its place."""

    def least(selection: Ints, counts: Ints) -> tuple[Ints, Floats]:
        return counts[:, 1:].min(1), rivals_of(selection, counts)[1]

    p = with_rest(0.4, 0.4, 1)
    assert _false(0.0, p, 2_000) <= most(2_000, ALPHA) < _false(0.0, p, 2_000, rivals=least)


@pytest.mark.parametrize(("z", "p"), BOUNDARY)
def test_giving_up_keeps_its_level(z: float, p: Floats) -> None:
    """2,000 images a hair above the radius, and further above. Odds of failing by chance: 2e-6."""
    for shift in (HAIR, 0.3 * p[1]):
        above = p + shift * np.array([1, *[-1 / (len(p) - 1)] * (len(p) - 1)])
        found = sample(single(z, 1e-9, 600, futility=0.05), above, 2_000, 600, 5, 20)
        assert int((found.outcome == NOT_CERTIFIABLE).sum()) <= most(2_000, 0.05)


def test_weights_of_the_other_classes_sum_to_one() -> None:
    """Whichever of them leads. A class without selection votes has its part of the half that is shared equally."""
    selection = np.array([[3, 60, 0, 30, 7], [0, 100, 0, 0, 0], [20, 20, 20, 20, 20]])
    weights = np.zeros((3, 5))
    for row in range(3):
        for rival in range(5):
            counts = np.full((1, 5), 3)
            counts[0, rival], counts[0, selection[row].argmax()] = 5, 50
            largest, weight = rivals_of(selection[row : row + 1], counts)
            if rival != selection[row].argmax():
                assert largest[0] == 5
                weights[row, rival] = weight[0]
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights[0], np.array([3 + 41 / 4, 0, 41 / 4, 30 + 41 / 4, 7 + 41 / 4]) / 81)
    np.testing.assert_allclose(weights[1], [0.25, 0, 0.25, 0.25, 0.25])
    assert rivals_of(np.array([[7, 3]]), np.array([[1, 2]]))[1] == 1


def test_giving_up_by_the_largest_count_without_its_weight_is_caught() -> None:
    """Of ten classes of 1/10, some other one nearly always leads the selected one."""

    def unweighted(selection: Ints, counts: Ints) -> tuple[Ints, Floats]:
        return rivals_of(selection, counts)[0], np.ones(len(counts))

    p, tests = np.full(10, 0.1), single(0.0, 1e-9, 600, futility=0.05)
    for rivals, fits in ((rivals_of, True), (unweighted, False)):
        given_up = sample(tests, p, 2_000, 600, 6, 20, rivals).outcome == NOT_CERTIFIABLE
        assert (int(given_up.sum()) <= most(2_000, 0.05)) == fits


# ---- Rules.


def test_a_rule_knows_how_far_it_reaches() -> None:
    rule, one = rule_of(bound=TWO), rule_of()
    assert rule.needs_every_class
    assert not one.needs_every_class
    assert not rule_of(method="clopper-pearson", bound=TWO).needs_every_class
    assert one.radii is not None
    assert rule.radii is not None
    assert rule.radii == one.radii[: len(rule.radii)]
    fewest = fewest_for(rule, 0.25)
    assert fewest is not None
    assert reachable(TWO, rule.null_probability(0.25), rule.image_alpha, fewest)
    assert not reachable(TWO, rule.null_probability(0.25), rule.image_alpha, fewest - 1)
    assert f"{fewest} for sigma" in reach(rule)
    with pytest.raises(InputError, match="'two-classes' is for Gaussian noise, got noise 'laplace'"):
        rule_of(bound=TWO, noise="laplace")
    with pytest.raises(InputError, match="certifies nothing with the bound 'two-classes'"):
        rule_of(bound=TWO, num_estimation=3)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 1000])
def test_the_least_probability_of_a_certified_class(num_classes: int) -> None:
    """With it, all others at their largest, the radius is just reached; of two classes it is Phi(r / sigma)."""
    for radius in (0.0, 0.125, 0.25, 0.5, 0.9):
        p = least_probability(radius, 0.25, num_classes)
        other = (1 - p) / (num_classes - 1)
        exact = 0.125 * (special.ndtri(p) - special.ndtri(other))
        assert radius - 1e-7 <= exact <= radius
        assert num_classes > 2 or p == pytest.approx(null_probability(radius, 0.25), abs=1e-9)


# ---- Cost.


def test_many_classes_need_fewer_votes_and_two_need_few_more() -> None:
    """Mean votes for a radius at level 0.001, cap 10,000, against the bound for one class: with the rest spread over
    many classes less than half, and images below 1/2 certified in addition; with two classes at most 12 % more."""

    def mean_votes(bound: SequentialBound, z: float, p: Sequence[float]) -> tuple[float, float]:
        tests = FixedSequence([null_at(z)], bound=bound, level=1e-3, futility=0.01, cap=10_000)
        found = sample(tests, np.array(p), 200, 10_000, 7)
        return float(found.trials.mean()), float((found.outcome == CERTIFIED).mean())

    spread = [0.8, *[0.02] * 10]
    (one, certified), (two, too) = (mean_votes(bound, 0.75, spread) for bound in ("geometric", TWO))  # type: ignore[arg-type]
    assert two < 0.5 * one
    assert certified == too == 1
    assert mean_votes(TWO, 0.25, [0.4, *[0.03] * 20])[1] == 1 > mean_votes("geometric", 0.25, [0.4, *[0.03] * 20])[1]
    for z, p in ((0.5, (0.8, 0.2)), (1.0, (0.95, 0.05)), (0.5, (0.6, 0.4))):
        assert mean_votes(TWO, z, p)[0] < 1.12 * mean_votes("geometric", z, p)[0]


# ---- Certificates and stored votes.


def certified(count: int = 30, **given: Any) -> Certificates:
    given = {"method": "sequential", "bound": TWO, "num_selection": 30, "num_estimation": 1230, "seed": 3, **given}
    return rush.certify(pixel_vote(), pixel_images(count), **given)


def read(path: Path) -> Certificates:
    found = read_certificates(path)
    assert found is not None
    return found[1]


@pytest.mark.parametrize("shorter", [{}, {"num_estimation": 400}, {"alpha": 0.05}, {"alpha": 0.05, "level": "family"}])
def test_the_engine_recomputing_and_the_table_agree(tmp_path: Path, shorter: dict[str, Any]) -> None:
    long = certified(radii=(0.0, 0.2), alpha=1e-9, futility=1e-9)
    shorter = {"futility": 0.2, **shorter}
    fresh = certified(**{"radii": (0.0, 0.2), "alpha": 1e-9, **shorter})
    again = recompute(long, **shorter)
    assert_same(again, fresh)
    for path, count in zip(again.blocks, again.counts, strict=True):
        assert path.shape == (-(-int(count.sum()) // 100), 4)
        np.testing.assert_array_equal(path.sum(0), count)
    write_certificates(tmp_path / "new.tsv", again, range(30))
    assert_same(read(tmp_path / "new.tsv"), again)
    as_older(tmp_path / "new.tsv")
    assert_same(read(tmp_path / "new.tsv"), again, but="pixels model")


def test_the_bound_on_the_class_is_what_its_radius_implies() -> None:
    found = certified(radii=(0.0, 0.1, 0.2))
    assert set(found.radius.tolist()) == {0.0, 0.1, 0.2}
    for prediction, radius, p_lower in zip(found.prediction, found.radius, found.p_lower, strict=True):
        assert p_lower == (least_probability(float(radius), 0.25, 4) if prediction >= 0 else 0)


def test_votes_of_every_class_allow_the_bounds_for_one_too() -> None:
    changes: dict[str, Any] = {"alpha": 0.05, "bound": "geometric", "radii": (0.0, 0.25), "futility": 0.01}
    every, one = certified(alpha=1e-9, futility=1e-9), certified(**changes)
    again = recompute(every, **changes)
    assert_same(again, one, but="counts")
    assert {path.ndim for path in again.blocks} == {1}
    assert (again.counts[again.num_samples < every.num_samples] == UNKNOWN).any()
    assert_same(recompute(every), every)


def test_what_cannot_be_known_is_refused() -> None:
    with pytest.raises(InputError, match=r"'two-classes' needs the votes for every class, but blocks hold those for"):
        recompute(certified(bound="geometric"), bound=TWO)
    fixed = certified(method="clopper-pearson", bound=None)
    with pytest.raises(InputError, match=r"those of a sequential run that was certified with bound = two-classes"):
        recompute(recompute(fixed, bound="geometric"), bound=TWO)
    assert recompute(fixed, bound=TWO).rule.method == "clopper-pearson"
    with pytest.raises(InputError, match="these votes come from a sequential run"):
        recompute(certified(), bound="clopper-pearson")


def test_blocks_that_contradict_the_counts_are_refused(tmp_path: Path) -> None:
    """Votes moved from one class to another in a block, and from one block to the next."""
    found = certified(6)
    rows = [row for row, path in enumerate(found.blocks) if len(path) > 1]
    for change, text in (((0, 1), "blocks do not add up to its"), ((1, 0), "a block holds more than its 100 votes")):
        path = found.blocks[rows[0]].copy()
        path[0, 0] += 1
        path[change] -= 1
        blocks = tuple(path if row == rows[0] else other for row, other in enumerate(found.blocks))
        damaged = replace(found, blocks=blocks)
        write_certificates(tmp_path / "new.tsv", damaged, range(6))
        with pytest.raises(RunError, match=f"line {rows[0] + 2}: {text}"):
            read(tmp_path / "new.tsv")


def exact_images(p: Floats, count: int) -> tuple[SmoothedClassifier, tuple[torch.Tensor, torch.Tensor]]:
    """Images of class 0 with these class probabilities, which only their other pixels tell apart."""
    bins, x = bins_with(p.tolist(), 0.25)
    images = x.repeat(count, 1, 1, 2)
    images[:, 0, 0, 1] = torch.arange(count) / count
    return SmoothedClassifier(bins, 0.25, len(p)), (images, torch.zeros(count, dtype=torch.int64))


@pytest.mark.slow
@pytest.mark.parametrize(("z", "p"), BOUNDARY[::2])
def test_two_thousand_certificates_on_the_boundary_are_false_no_more_often_than_alpha(z: float, p: Floats) -> None:
    """Odds of failing by chance: 1e-6. A hair is more than float32 loses."""
    p = p + 1e-5 * np.array([-1, 1, *[0] * (len(p) - 2)])
    smoothed, images = exact_images(p, 2_000)
    radii = (z * 0.25,) if z == 0 else (0.0, z * 0.25)
    found = rush.certify(smoothed, images, "sequential", 100, 1_000, ALPHA, radii, futility=0.05, bound=TWO)
    false = (found.radius >= radii[-1]) & (found.prediction >= 0)
    assert int(false.sum()) <= most(2_000, ALPHA)
    assert z == 0 or found.accuracy(0.0) > 0.9
