"""Sequential certification against exact algebra, exact crossing probabilities and simulated votes; its rules.

No network: an image is a probability p of voting for its selected class, and every block of votes is binomial.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import comb
from typing import Any, get_args

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

import stored
from rush.certification import sequential
from rush.certification.bounds import largest_radius
from rush.certification.rule import Rule, fewest_for, null_probability, reach
from rush.certification.sequential import (
    CERTIFIED,
    GIVEN_UP,
    NOT_CERTIFIABLE,
    OUTCOMES,
    UNDECIDED,
    BetaMixture,
    Evidence,
    FixedSequence,
    GeometricMixture,
    evidence,
    reachable,
)
from rush.choices import SequentialBound, Stopping
from rush.errors import InputError
from rush.statistics import lower_bound, upper_quantile

SIGMA, TAIL, HAIR = 0.25, 1e-6, 1e-9
BOUNDS: tuple[SequentialBound, ...] = ("geometric", "beta")
ENDS = (NOT_CERTIFIABLE, GIVEN_UP)

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


# ---- Tools: one simulation and one exact calculation, shared with the slow tests.


@dataclass(frozen=True)
class Sampled:
    """What became of B images: radii passed, outcome and votes taken, each (B,)."""

    passed: Ints
    outcome: NDArray[np.uint8]
    trials: Ints


def look_by_state(tests: FixedSequence, passed: Ints, successes: Ints, trials: int) -> tuple[Ints, NDArray[np.uint8]]:
    """``tests.look``, once for all images in the same state, as ``test_each_image_is_looked_at_by_itself`` allows."""
    states, at = np.unique(passed * (trials + 1) + successes, return_inverse=True)
    now, outcome = tests.look(states // (trials + 1), states % (trials + 1), np.full(len(states), trials))
    return now[at], outcome[at]


def sample(tests: FixedSequence, p: Floats, cap: int, seed: int, block: int = 100) -> Sampled:
    """Images with probabilities ``p``, looked at after every block until decided or at the cap."""
    draws = np.random.default_rng(seed)
    passed, trials = np.zeros(len(p), np.int64), np.zeros(len(p), np.int64)
    outcome, successes = np.full(len(p), UNDECIDED, np.uint8), np.zeros(len(p), np.int64)
    open_, taken = np.arange(len(p)), 0
    while open_.size and taken < cap:
        votes = min(block, cap - taken)
        taken += votes
        successes[open_] += draws.binomial(votes, p[open_])
        trials[open_] = taken
        passed[open_], outcome[open_] = look_by_state(tests, passed[open_], successes[open_], taken)
        open_ = open_[outcome[open_] == UNDECIDED]
    return Sampled(passed, outcome, trials)


def critical_counts(tests: FixedSequence, looks: Ints) -> tuple[Ints, Ints]:
    """For the first null of ``tests``, at each look: fewest successes that pass, most that give up; n + 1 and -1 where
    none do. Both by bisection, which ``test_more_successes_never_pass_fewer_radii`` allows."""

    def last_below(holds: Callable[[Ints], NDArray[np.bool_]]) -> Ints:
        low, high = np.full(len(looks), -1), looks + 1
        while (high - low > 1).any():
            middle = (low + high) // 2
            below = holds(np.clip(middle, 0, looks))
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return low

    fresh = np.zeros(len(looks), np.int64)
    passing = last_below(lambda successes: tests.look(fresh, successes, looks)[0] == 0) + 1
    futile = last_below(lambda successes: np.isin(tests.look(fresh, successes, looks)[1], ENDS))
    return passing, futile


@dataclass(frozen=True)
class Exact:
    """Probabilities of passing and of giving up, and the mean number of votes."""

    passed: float
    given_up: float
    trials: float


def crossing(looks: Ints, passing: Ints, futile: Ints, p: float) -> Exact:
    """By dynamic programming over the successes of the paths that are still open; looks at equal distances."""
    block = int(looks[0])
    votes = stats.binom.pmf(np.arange(block + 1), block, p)
    mass, first = np.ones(1), 0
    passed = given_up = trials = 0.0
    for above, below in zip(passing.tolist(), futile.tolist(), strict=True):
        trials += block * float(mass.sum())
        mass = np.convolve(mass, votes)
        low, high = min(max(below + 1 - first, 0), len(mass)), min(max(above - first, 0), len(mass))
        given_up, passed = given_up + float(mass[:low].sum()), passed + float(mass[high:].sum())
        mass, first = mass[low:high], first + low
        if mass.sum() < 1e-25:
            break
        low = int(np.argmax(mass > 1e-60))  # numbers too small for full precision are slow
        mass, first = mass[low:], first + low
        mass = mass[: len(mass) - int(np.argmax(mass[::-1] > 1e-60))]
    return Exact(passed, given_up, trials)


def single(
    null: float,
    bound: SequentialBound,
    level: float,
    cap: int,
    futility: float = 1e-3,
    stopping: Stopping = "test",
) -> FixedSequence:
    return FixedSequence([null], bound=bound, level=level, futility=futility, cap=cap, stopping=stopping)


def exactly(tests: FixedSequence, p: float, cap: int, block: int = 100) -> Exact:
    """The fate of an image with probability ``p`` under tests of a single null, at most ``cap`` votes."""
    return fates(tests, [p], cap, block)[0]


def fates(tests: FixedSequence, probabilities: Iterable[float], cap: int, block: int = 100) -> list[Exact]:
    looks = np.arange(block, cap + 1, block)
    bounds = critical_counts(tests, looks)
    return [crossing(looks, *bounds, p) for p in probabilities]


def null_at(z: float) -> float:
    return null_probability(z * SIGMA, SIGMA)


def rule_of(**given: Any) -> Rule:
    """A sequential rule, with ``given`` in place of single values."""
    usual = {"alpha": 0.05, "num_images": 20, "num_estimation": 2_000, "futility": 1e-3}
    return stored.rule_of(**{"sigma": SIGMA, "method": "sequential", **usual, **given})


def most(draws: int, alpha: float) -> int:
    """More false ones than this among ``draws`` have probability <= 1e-6 at level ``alpha``."""
    return upper_quantile(draws, alpha, TAIL)


def odds_of_catching(draws: int, alpha: float, rate: float) -> float:
    """Probability that errors of the true ``rate`` exceed ``most(draws, alpha)``."""
    return float(stats.binom.sf(most(draws, alpha), draws, rate))


# ---- Algebra.


def _all_evidence(null: float, level: float, cap: int) -> list[tuple[str, int, Evidence]]:
    found: list[tuple[str, int, Evidence]] = [(bound, 1, evidence(bound, null, level, cap)) for bound in BOUNDS]
    for side in (1, -1):
        found.append(("geometric mixture", side, GeometricMixture(null, level, cap, side)))
        found.append(("beta mixture", side, BetaMixture(null, level, cap, side)))
    return found


def _mean_factors(against: Evidence, cap: int, probabilities: Sequence[float]) -> list[Floats]:
    """For each probability: the mean factor of the next vote, from every count at every n < cap."""
    trials, successes = np.tril_indices(cap + 1)
    table = np.full((cap + 1, cap + 1), np.nan)
    table[trials, successes] = against.log_value(successes.astype(float), trials.astype(float))
    before = np.tril_indices(cap)
    hit, miss = (np.exp(table[1:, shift : cap + shift] - table[:-1, :cap])[before] for shift in (1, 0))
    return [p * hit + (1 - p) * miss for p in probabilities]


@pytest.mark.parametrize("level", [0.05, 1e-3, 1e-7])
@pytest.mark.parametrize("null", [0.5, 0.6914, 0.9772])
def test_no_vote_raises_any_evidence_on_average(null: float, level: float) -> None:
    """Every state of 120 votes: the mean factor is 1 at the null, and at most 1 further inside the hypothesis. A factor
    of two at the start, or a prior that integrates to more than one, shows in the first line."""
    cap, zero = 120, np.zeros(1)
    for name, side, against in _all_evidence(null, level, cap):
        start = float(np.exp(against.log_value(zero, zero)[0]))
        assert start <= 1 + 1e-9, (name, side)
        if name.endswith("mixture") or name == "beta":
            assert start == pytest.approx(1, abs=1e-9), (name, side)
        shares = (1.0, 0.999, 0.9, 0.5, 0.0)
        inside = [share * null if side > 0 else 1 - share * (1 - null) for share in shares]
        at_null, *deeper = _mean_factors(against, cap, inside)
        np.testing.assert_allclose(at_null, 1, rtol=1e-9, err_msg=f"{name} {side}")
        assert max(factor.max() for factor in deeper) <= 1 + 1e-9, (name, side)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("p", [0.75, 0.6, 0.2])
def test_all_paths_of_twelve_votes_keep_the_level_in_rational_arithmetic(bound: SequentialBound, p: float) -> None:
    """p <= null = 3/4: the mean of the value where a path first crosses, or at its end, is at most 1; the paths that
    cross at most the level, 0.3."""
    against, chance, stopped, crossed = evidence(bound, 0.75, 0.3, 12), Fraction(p), 0.0, Fraction(0)
    for path in itertools.product((0, 1), repeat=12):
        k, n = np.cumsum(path).astype(float), np.arange(1.0, 13)
        value = np.exp(against.log_value(k, n))
        over = np.flatnonzero(value >= 1 / 0.3)
        weight = chance ** sum(path) * (1 - chance) ** (12 - sum(path))
        stopped += float(weight) * value[over[0] if over.size else -1]
        crossed += weight if over.size else 0
    assert stopped <= 1 + 1e-9
    assert 0 < crossed <= Fraction(0.3)


def _slow_geometric(null: Any, level: float, cap: int, side: int, k: int, n: int) -> Any:
    """The likelihood ratio averaged over twelve q: distances in geometric progression, weights distance^(-3/4)."""
    room = 1 - null if side > 0 else null
    near = min(mpmath.sqrt(2 * null * (1 - null) * mpmath.log(1 / mpmath.mpf(level)) / cap), room / 2)
    distances = [near * (room * mpmath.mpf("0.999") / near) ** (mpmath.mpf(i) / 11) for i in range(12)]
    weights = [distance ** mpmath.mpf("-0.75") for distance in distances]
    points = [null + side * distance for distance in distances]
    ratios = [(q / null) ** k * ((1 - q) / (1 - null)) ** (n - k) for q in points]
    return sum(weight * ratio for weight, ratio in zip(weights, ratios, strict=True)) / sum(weights)


def _slow_beta(null: Any, side: int, k: int, n: int) -> Any:
    """The likelihood ratio averaged over the truncated prior, by numerical integration around its peak."""

    def prior(q: Any) -> Any:
        return 1 / mpmath.sqrt(q * (1 - q))

    def integrand(q: Any) -> Any:
        if not 0 < q < 1:  # an endpoint, by rounding
            return mpmath.mpf(0)
        return mpmath.exp(k * mpmath.log(q / null) + (n - k) * mpmath.log((1 - q) / (1 - null))) * prior(q)

    low, high = (null, mpmath.mpf(1)) if side > 0 else (mpmath.mpf(0), null)
    width, top = mpmath.sqrt(mpmath.mpf(1) / (n + 1)), mpmath.mpf(k + 0.5) / (n + 1)
    cuts = sorted({low, high} | {top + i * width for i in (-6, -3, 0, 3, 6) if low < top + i * width < high})
    mass = mpmath.betainc(0.5, 0.5, low, high)
    return mpmath.quad(integrand, cuts) / mass


def _tails(trials: int, null: Any) -> list[Any]:
    """P(Binomial(trials, null) >= k) for k = 0 .. trials + 1."""
    terms = [comb(trials, i) * null**i * (1 - null) ** (trials - i) for i in range(trials + 1)]
    return [mpmath.mpf(0), *itertools.accumulate(reversed(terms))][::-1]


def slow_value(name: str, side: int, null: float, level: float, cap: int, k: int, n: int) -> Any:
    """The evidence from its definition, in the working precision of mpmath."""
    exact_null = mpmath.mpf(null)
    if name.startswith("beta"):
        return _slow_beta(exact_null, side, k, n)
    mixture = _slow_geometric(exact_null, level, cap, side, k, n)
    if name == "geometric mixture":
        return mixture
    share = mpmath.mpf(level) / 3
    needed = next(i for i, tail in enumerate(_tails(cap, exact_null)) if tail <= share * (1 - mpmath.mpf("2e-6")))
    left = cap - n
    return mixture * 2 / 3 + _tails(left, exact_null)[min(max(needed - k, 0), left + 1)] / share / 3


@pytest.mark.parametrize(("null", "level"), [(0.5, 0.05), (0.8413, 1e-3), (0.9772, 1e-7)])
def test_values_are_those_of_the_textbook(null: float, level: float) -> None:
    """Relative 1e-9; 3e-6 where the binomial test at the cap speaks, whose share is 2e-6 smaller than a third."""
    cap = 300
    states = [(0, 0), (1, 1), (0, 1), (7, 10), (100, 100), (61, 100), (88, 100), (0, 60), (290, 300), (180, 300)]
    k, n = (np.array(column, float) for column in zip(*states, strict=True))
    with mpmath.workdps(25):
        for name, side, against in _all_evidence(null, level, cap):
            for (successes, trials), found in zip(states, against.log_value(k, n), strict=True):
                expected = mpmath.log(slow_value(name, side, null, level, cap, successes, trials))
                allowed = 3e-6 if name == "geometric" else 1e-9
                assert abs(found - expected) < allowed, (name, side, successes, trials)


# ---- Levels: exact.


def _grid(cap: int, alpha: float, bound: SequentialBound) -> list[float]:
    nulls = (null_at(half / 2) for half in range(9))
    return [null for null in nulls if reachable(bound, null, alpha, cap)]


@pytest.mark.parametrize("alpha", [0.05, 1e-3])
@pytest.mark.parametrize("bound", BOUNDS)
def test_exact_levels_are_kept_at_and_inside_every_null(bound: SequentialBound, alpha: float) -> None:
    """Looked at after every vote, every ten and every hundred. Size at cap 20,000 and a hundred, in alphas:
    geometric 0.61 to 0.91, beta 0.09 (null 1/2) to 0.69; beyond 3 sigma, near what the cap can reach, less."""
    for cap, block in ((300, 1), (2_000, 10), (20_000, 100)):
        for null in _grid(cap, alpha, bound):
            tests = single(null, bound, alpha, cap)
            sizes = [fate.passed for fate in fates(tests, (null, null - 0.01, 0.8 * null), cap, block)]
            assert sorted(sizes, reverse=True) == sizes
            assert sizes[0] <= alpha
            if cap == 20_000 and null <= null_at(3):
                assert sizes[0] > (0.6 if bound == "geometric" else 0.08) * alpha


@pytest.mark.parametrize("futility", [0.4, 0.05, 1e-3])
@pytest.mark.parametrize("bound", BOUNDS)
def test_giving_up_keeps_its_own_level_and_takes_nothing_from_the_other(
    bound: SequentialBound, futility: float
) -> None:
    """At p = null and above, giving up is as rare as ``futility``; whatever it is, false certificates get no more."""
    for null in _grid(2_000, 0.05, bound):
        inside = (null, null + 0.1 * (1 - null), 0.5 + 0.5 * null)
        at_null, *deeper = fates(single(null, bound, 0.05, 2_000, futility), inside, 2_000, 10)
        assert 0.01 * futility < at_null.given_up <= futility
        assert max(fate.given_up for fate in deeper) <= futility
        never = exactly(single(null, bound, 0.05, 2_000, 1e-12), null, 2_000, 10)
        assert at_null.passed <= never.passed <= 0.05


@pytest.mark.parametrize("futility", [0.05, 0.01, 1e-3])
@pytest.mark.parametrize("bound", BOUNDS)
def test_giving_up_what_has_become_improbable_loses_little_and_saves_most(
    bound: SequentialBound, futility: float
) -> None:
    """Exact figures. False certificates only get fewer. For the p where most certificates are lost, these have a
    probability of at most ten times futility, since it is looked at often. At the null, votes are two thirds and fewer
    of those that a test takes."""
    for cap, alpha, block in ((2_000, 0.05, 10), (20_000, 1e-3, 100)):
        for null in _grid(cap, alpha, bound):
            inside = [null, *(null + (1 - null) * np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.5]))]
            quick = fates(single(null, bound, alpha, cap, futility, "power"), inside, cap, block)
            never = fates(single(null, bound, alpha, cap, 1e-12), inside, cap, block)
            lost = [whole.passed - own.passed for own, whole in zip(quick, never, strict=True)]
            assert min(lost) >= -1e-12
            assert max(lost) <= 10.1 * futility, null
            assert (
                quick[0].trials <= 2 / 3 * exactly(single(null, bound, alpha, cap, futility), null, cap, block).trials
            )


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_larger_radius_never_needs_fewer_votes_than_a_smaller_one(bound: SequentialBound) -> None:
    """So whoever rejects each radius by itself and reports the largest rejects the very same ones: leaving the order
    out does not raise the error measurably with these bounds. That the order is kept is shown on prescribed evidence
    below."""
    for cap, alpha, step in ((300, 0.05, 1), (2_000, 0.05, 10), (2_000, 1e-3, 10)):
        looks = np.arange(step, cap + 1, step)
        bounds = [critical_counts(single(null, bound, alpha, cap), looks) for null in _grid(cap, alpha, bound)]
        assert len(bounds) > 3
        for (smaller, smaller_futile), (larger, larger_futile) in itertools.pairwise(bounds):
            assert (smaller <= larger).all()
            assert (smaller_futile <= larger_futile).all()


# ---- Errors that must be caught: 20,000 images at p = 1/2, looked at every ten votes up to 1,000, at alpha 0.05.

DRAWS, ALPHA, CAP, BLOCK = 20_000, 0.05, 1_000, 10
LOOKS = np.arange(BLOCK, CAP + 1, BLOCK)


def fewest_certified(null: float, num: int, alpha: float) -> int:
    """Fewest of ``num`` votes whose Clopper-Pearson bound at ``alpha`` is above ``null``."""
    k = np.arange(int(num * null), num + 1)
    return int(k[np.argmax(lower_bound(k, num, alpha) > null)])


def _false_at_one_half(tests: FixedSequence, seed: int = 3) -> int:
    return int((sample(tests, np.full(DRAWS, 0.5), CAP, seed, BLOCK).passed > 0).sum())


class Doubled:
    """Evidence with a factor of two too much."""

    def __init__(self, inner: Evidence) -> None:
        self._inner = inner

    def log_value(self, successes: Floats, trials: Floats, rival: Floats | float = 0.0) -> Floats:
        return self._inner.log_value(successes, trials, rival) + np.log(2)


def test_evidence_twice_too_large_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caught with probability > 0.999999, by the exact size; and by the algebra above at any level and null."""
    monkeypatch.setattr(sequential, "evidence", lambda *given: Doubled(evidence(*given)))
    tests = single(null_at(0), "geometric", ALPHA, CAP)
    assert odds_of_catching(DRAWS, ALPHA, exactly(tests, 0.5, CAP, BLOCK).passed) > 0.999999
    assert _false_at_one_half(tests) > most(DRAWS, ALPHA)


def test_a_class_selected_on_the_votes_that_test_it_is_caught() -> None:
    """Two classes (of any number) share all votes; the one that leads is tested on the votes that made it lead. Either
    may cross, exact size 1.38 alpha: caught with probability > 0.999999.

    Selecting on the first block alone and counting it again stays below alpha here (0.94 alpha), because the test uses
    0.69 alpha: a simulation cannot show that one.
    """
    tests = single(null_at(0), "geometric", ALPHA, CAP)
    passing, _ = critical_counts(tests, LOOKS)
    exact = crossing(LOOKS, passing, LOOKS - passing, 0.5)
    assert odds_of_catching(DRAWS, ALPHA, exact.passed + exact.given_up) > 0.999999
    votes = np.random.default_rng(4).binomial(BLOCK, 0.5, (DRAWS, len(LOOKS))).cumsum(1)
    leading = np.maximum(votes, LOOKS - votes)
    passed = np.zeros(DRAWS, np.int64)
    for column, look in enumerate(LOOKS.tolist()):
        passed, _ = look_by_state(tests, passed, leading[:, column], look)
    assert int((passed > 0).sum()) > most(DRAWS, ALPHA)


def test_peeking_with_clopper_pearson_is_caught() -> None:
    """The bound for a fixed number, read after every block: exact size 5.3 alpha, caught with probability > 1 - 1e-12;
    read once, at the cap, it passes."""
    votes = np.random.default_rng(5).binomial(BLOCK, 0.5, (DRAWS, len(LOOKS))).cumsum(1)
    fewest = np.array([fewest_certified(0.5, n, ALPHA) for n in LOOKS.tolist()])
    exact = crossing(LOOKS, fewest, np.full(len(LOOKS), -1), 0.5).passed
    assert odds_of_catching(DRAWS, ALPHA, exact) > 1 - 1e-12
    above = votes >= fewest
    assert int(above[:, -1].sum()) <= most(DRAWS, ALPHA) < int(above.any(1).sum())


# ---- The sequence of radii.


class Prescribed:
    """Evidence that is what the test says, whatever the votes."""

    def __init__(self, value: float) -> None:
        self._value = value

    def log_value(self, successes: Floats, trials: Floats, rival: Floats | float = 0.0) -> Floats:  # noqa: ARG002
        return np.full(len(successes), self._value)


@pytest.mark.parametrize(
    ("before", "rejects", "gives_up", "passed", "outcome"),
    [
        (0, "---", "---", 0, UNDECIDED),
        (0, "x--", "---", 1, UNDECIDED),
        (0, "xx-", "---", 2, UNDECIDED),
        (0, "xxx", "---", 3, CERTIFIED),
        (0, "-xx", "---", 0, UNDECIDED),
        (0, "x-x", "---", 1, UNDECIDED),
        (1, "---", "---", 1, UNDECIDED),
        (1, "--x", "---", 1, UNDECIDED),
        (2, "--x", "---", 3, CERTIFIED),
        (3, "---", "---", 3, CERTIFIED),
        (0, "---", "x--", 0, NOT_CERTIFIABLE),
        (0, "-xx", "xxx", 0, NOT_CERTIFIABLE),
        (0, "---", "-xx", 0, UNDECIDED),
        (0, "x--", "xx-", 1, NOT_CERTIFIABLE),
        (0, "x--", "x-x", 1, UNDECIDED),
        (1, "---", "x--", 1, UNDECIDED),
        (2, "---", "--x", 2, NOT_CERTIFIABLE),
        (3, "---", "xxx", 3, CERTIFIED),
    ],
)
def test_radii_are_passed_in_order_and_given_up_in_turn(
    monkeypatch: pytest.MonkeyPatch, before: int, rejects: str, gives_up: str, passed: int, outcome: int
) -> None:
    """Of three radii, ``x`` where the evidence against (for) the null suffices: no radius passes over a smaller one,
    several may pass at one look, what has passed stays, and only the next open one can be given up."""
    nulls = [0.5, 0.7, 0.9]
    told = {null: [30.0 if sign[i] == "x" else 0.0 for sign in (rejects, gives_up)] for i, null in enumerate(nulls)}
    monkeypatch.setattr(sequential, "reachable", lambda *_: True)
    monkeypatch.setattr(sequential, "evidence", lambda _, null, *__: Prescribed(told[null][0]))
    monkeypatch.setattr(sequential, "GeometricMixture", lambda null, *_, **__: Prescribed(told[null][1]))
    tests = FixedSequence(nulls, bound="geometric", level=0.001, futility=0.001, cap=1000)
    found = tests.look(np.array([before]), np.array([5]), np.array([10]))
    assert (found[0].tolist(), found[1].tolist()) == ([passed], [outcome])
    assert (found[0].dtype, found[1].dtype) == (np.int64, np.uint8)


def test_outcomes_are_named_by_their_codes() -> None:
    assert [OUTCOMES[code] for code in (CERTIFIED, NOT_CERTIFIABLE, UNDECIDED)] == [
        "certified",
        "not certifiable",
        "undecided",
    ]


def _states(count: int, seed: int) -> tuple[Ints, Ints, Ints]:
    """Images anywhere on the way: radii passed, successes and votes."""
    draws = np.random.default_rng(seed)
    trials = draws.integers(1, 21, count) * 100
    return draws.integers(0, 5, count), draws.binomial(trials, draws.uniform(0.4, 1, count)), trials


@pytest.mark.parametrize("bound", BOUNDS)
def test_each_image_is_looked_at_by_itself(bound: SequentialBound) -> None:
    """A batch says what its images say one by one, in any order; the arguments stay as they are."""
    tests = rule_of(bound=bound).tests()
    state = _states(400, seed=7)
    before = [column.copy() for column in state]
    passed, outcome = tests.look(*state)
    assert len(np.unique(outcome)) == 3
    assert len(np.unique(passed - state[0])) > 3
    for column, copy in zip(state, before, strict=True):
        np.testing.assert_array_equal(column, copy)
    for i in range(400):
        alone = tests.look(*(column[i : i + 1] for column in state))
        assert (alone[0][0], alone[1][0]) == (passed[i], outcome[i])
    turned = tests.look(*(column[::-1] for column in state))
    np.testing.assert_array_equal(turned[0][::-1], passed)
    np.testing.assert_array_equal(turned[1][::-1], outcome)


@pytest.mark.parametrize("bound", BOUNDS)
def test_a_look_is_that_of_each_radius_alone_taken_in_order(bound: SequentialBound) -> None:
    """The whole curve against tests of a single null each."""
    rule = rule_of(bound=bound)
    assert rule.radii is not None
    passed, successes, trials = _states(400, seed=8)
    found, outcome = rule.tests().look(passed, successes, trials)
    alone = [single(null_probability(radius, SIGMA), bound, 0.05, 2_000) for radius in rule.radii]
    fresh = np.zeros(400, np.int64)
    looks = [tests.look(fresh, successes, trials) for tests in alone]
    for i in range(400):
        number = int(passed[i])
        while number < len(alone) and looks[number][0][i]:
            number += 1
        assert found[i] == number
        expected = CERTIFIED if number == len(alone) else looks[number][1][i]
        assert outcome[i] == expected


@pytest.mark.parametrize("stopping", get_args(Stopping))
@pytest.mark.parametrize("bound", BOUNDS)
def test_more_successes_never_pass_fewer_radii(bound: SequentialBound, stopping: Stopping) -> None:
    tests = rule_of(bound=bound, alpha=0.001, stopping=stopping).tests()
    for trials in (1, 10, 50, 100, 700, 1_900, 2_000):
        k = np.arange(trials + 1)
        passed, outcome = tests.look(np.zeros(trials + 1, np.int64), k, np.full(trials + 1, trials))
        assert (np.diff(passed) >= 0).all()
        stopped = np.isin(outcome[passed == 0], ENDS)
        assert (np.diff(stopped.astype(int)) <= 0).all()  # and giving the first one up ends once and for all
        at_cap = trials == 2_000 and stopping == "power"  # where a radius that is left is undecided
        assert trials < 100 or (passed[-1] > 2 and stopped[0] != at_cap)


@pytest.mark.parametrize("alpha", [0.05, 1e-3, 1e-7])
@pytest.mark.parametrize("cap", [30, 150, 1_000])
@pytest.mark.parametrize("bound", BOUNDS)
def test_agreeing_votes_reach_the_last_radius_exactly_where_it_is_reachable(
    bound: SequentialBound, cap: int, alpha: float
) -> None:
    """No test at all can be passed where null^cap > alpha; the geometric one is wherever null^cap <= alpha / 3. The
    last reachable null, to a float, is passed by agreeing votes, at the cap and not later; the next one is refused."""
    assert not reachable(bound, 1.001 * alpha ** (1 / cap), alpha, cap)
    assert bound == "beta" or reachable(bound, 0.99999 * (alpha / 3) ** (1 / cap), alpha, cap)
    low, high = 0.5, 1.0
    if not reachable(bound, low, alpha, cap):
        low = 0.01
    while high - low > 1e-14:
        middle = (low + high) / 2
        low, high = (middle, high) if reachable(bound, middle, alpha, cap) else (low, middle)
    found = sample(
        FixedSequence([0.9 * low, low], bound=bound, level=alpha, futility=0.01, cap=cap), np.ones(1), cap, 0
    )
    assert (found.passed[0], found.outcome[0]) == (2, CERTIFIED)
    agree = np.array([float(cap)])
    assert evidence(bound, high, alpha, cap).log_value(agree, agree)[0] < np.log(1 / alpha) + 2e-6
    with pytest.raises(InputError, match=f"within reach of {cap} votes"):
        FixedSequence([low, high], bound=bound, level=alpha, futility=0.01, cap=cap)


@pytest.mark.parametrize(
    "nulls", [[0.9, 0.8], [0.8, 0.8], [0.5, 1.0], [0.5, 1.5], [0.0], [-0.1, 0.5], [0.5, 0.9999], [float("nan")]]
)
def test_nulls_that_do_not_ascend_or_are_out_of_reach_are_refused(nulls: list[float]) -> None:
    with pytest.raises(InputError, match=r"must ascend and be within reach of 100 votes, got \["):
        FixedSequence(nulls, bound="geometric", level=0.001, futility=0.001, cap=100)


# ---- Cost.


def published_probabilities(count: int) -> Floats:
    """p spread as in public logs at sigma 0.25 (certified radii of 10,000 images, abstentions, ceiling), by quantiles:
    3.6 % below 1/2, 36 % above what 100,000 votes can resolve."""
    share = [0.0, 0.036, 0.31, 0.41, 0.52, 0.64, 1.0]
    z = [-0.8, 0.0, 1.0, 2.0, 3.0, 3.81, 6.0]
    return stats.norm.cdf(np.interp((np.arange(count) + 0.5) / count, share, z))


def known_p_votes(p: Floats, null: float, level: float, cap: int) -> float:
    """Mean of min(cap, ln(1 / level) / KL(p || null)): what a test that knows each p takes."""
    divergence = p * np.log(p / null) + (1 - p) * np.log((1 - p) / (1 - null))
    return float(np.minimum(cap, np.log(1 / level) / np.maximum(divergence, 1e-300)).mean())


def mean_votes(p: Floats, z: float, bound: SequentialBound, cap: int) -> float:
    """Exact mean number of votes of images with probabilities ``p``, for one radius at level 0.001 on both sides."""
    return float(np.mean([fate.trials for fate in fates(single(null_at(z), bound, 1e-3, cap), p.tolist(), cap)]))


def test_one_radius_costs_little_more_than_with_known_probabilities() -> None:
    """100 images, cap 20,000, a look every hundred, in expectation: at most 1.3 times the votes of a test that knows
    every p, and fewer than with the beta mixture at half a sigma and one. From two sigma on both need about as many at
    this cap, the beta mixture up to 4 % fewer."""
    p, cap = published_probabilities(100), 20_000
    for z in (0.5, 1, 2):
        votes = mean_votes(p, z, "geometric", cap)
        assert votes <= 1.3 * known_p_votes(p, null_at(z), 1e-3, cap)
        assert z == 2 or votes < 0.95 * mean_votes(p, z, "beta", cap)


# ---- Rules.


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"method": "wald"}, "unknown method 'wald'; allowed: clopper-pearson, sequential"),
        ({"level": "set"}, "unknown level 'set'; allowed: image, family"),
        ({"bound": "wald"}, "unknown bound of method 'sequential' 'wald'; allowed: geometric, beta, two-classes"),
        ({"bound": "clopper-pearson"}, "unknown bound of method 'sequential' 'clopper-pearson'; allowed: geometric, "),
        (
            {"method": "clopper-pearson", "bound": "geometric"},
            "unknown bound of method 'clopper-pearson' 'geometric'; allowed: clopper-pearson",
        ),
        ({"num_selection": 0}, "num_selection must be an integer >= 1, got 0"),
        ({"num_estimation": 1e5}, "num_estimation must be an integer >= 1, got 100000.0"),
        ({"num_images": 0}, "num_images must be an integer >= 1, got 0"),
        ({"num_images": True}, "num_images must be an integer >= 1, got True"),
        ({"alpha": 0.0}, "alpha must lie in (0, 0.5), got 0.0"),
        ({"alpha": 0.5}, "alpha must lie in (0, 0.5), got 0.5"),
        ({"alpha": float("nan")}, "alpha must lie in (0, 0.5), got nan"),
        ({"alpha": "0.1"}, "alpha must lie in (0, 0.5), got '0.1'"),
        ({"futility": 0.0}, "futility must lie in (0, 0.5), got 0.0"),
        ({"futility": 0.7}, "futility must lie in (0, 0.5), got 0.7"),
        (
            {"num_estimation": 9, "alpha": 0.001},
            "num_estimation = 9 certifies nothing with the bound 'geometric', sigma = 0.25, at level 0.001 per image, "
            "even if all votes agree; give at least 12",
        ),
        (
            {"num_estimation": 9, "level": "family", "alpha": 0.02},
            "num_estimation = 9 certifies nothing with the bound 'geometric', sigma = 0.25, at level 0.001 per image, "
            "even if all votes agree; give at least 12",
        ),
        (
            {"num_estimation": 9, "alpha": 0.001, "method": "clopper-pearson"},
            "num_estimation = 9 certifies nothing with the bound 'clopper-pearson', sigma = 0.25, at level 0.001 per "
            "image, even if all votes agree; give at least 10",
        ),
        ({"radii": ()}, "radii is empty; give at least one radius, or None"),
        ({"radii": (0.1, -0.1)}, "radii must be finite numbers >= 0 in [0, 1] pixel units, got -0.1"),
        ({"radii": (float("nan"),)}, "radii must be finite numbers >= 0 in [0, 1] pixel units, got nan"),
        ({"radii": (float("inf"),)}, "radii must be finite numbers >= 0 in [0, 1] pixel units, got inf"),
        ({"radii": (True,)}, "radii must be finite numbers >= 0 in [0, 1] pixel units, got True"),
        ({"radii": ("0.5",)}, "radii must be finite numbers >= 0 in [0, 1] pixel units, got '0.5'"),
        ({"radii": (0.25, 3)}, "radius 3 cannot be certified with num_estimation = 2000 at level 0.05 per image"),
        ({"radii": (0.25, 1e300)}, "radius 1e+300 cannot be certified with num_estimation = 2000"),
    ],
)
def test_rules_that_cannot_be_used_are_refused(given: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        rule_of(**given)


@pytest.mark.parametrize("sigma", [0.12, 0.25, 1.0])
@pytest.mark.parametrize("num", [20, 1_000, 100_000])
@pytest.mark.parametrize(
    ("method", "bound"), [("clopper-pearson", None), ("sequential", "geometric"), ("sequential", "beta")]
)
def test_a_radius_beyond_reach_is_refused_with_the_largest_which_is_accepted(
    method: str, bound: str | None, num: int, sigma: float
) -> None:
    def grid(*radii: float) -> tuple[float, ...] | None:
        return rule_of(method=method, bound=bound, sigma=sigma, num_estimation=num, radii=radii, alpha=0.01).radii

    with pytest.raises(InputError, match="even if all votes agree: at most ") as refused:
        grid(0.0, 50.0)
    told = re.search(r"at most (\d+\.\d{6}) can;", str(refused.value))
    assert told is not None
    largest = float(told.group(1))
    assert grid(0.0, largest) == (0.0, largest)
    assert 0 < largest <= largest_radius(num, sigma, 0.01)
    with pytest.raises(
        InputError, match=f"at most {told.group(1)} can; give smaller radii, more samples or a larger sigma"
    ):
        grid(0.0, round(largest + 1e-6, 6))


def test_the_default_grid_is_the_multiples_of_half_sigma_within_reach() -> None:
    assert rule_of(num_estimation=100_000, alpha=0.001).radii == (0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
    assert rule_of(sigma=1.0, num_estimation=100_000, alpha=0.001).radii == (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)
    assert rule_of(method="clopper-pearson").radii is None
    thirds = rule_of(sigma=1 / 3).radii
    assert thirds is not None
    assert thirds[:5] == (0, 0.166667, 0.333334, 0.5, 0.666667)
    for bound, num in itertools.product(BOUNDS, (30, 100, 1_000, 30_000)):
        rule = rule_of(bound=bound, num_estimation=num)
        assert rule.radii is not None
        assert rule.largest_radius == rule.radii[-1]
        with pytest.raises(InputError, match="cannot be certified"):
            rule_of(bound=bound, num_estimation=num, radii=(*rule.radii, rule.radii[-1] + SIGMA / 2))


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ((0.25,), (0.25,)),
        ((0.1 + 0.2, 0.1), (0.1, 0.300001)),  # 0.30000000000000004 is above 0.3
        ((1 / 3,), (0.333334,)),
        ((2 / 3,), (0.666667,)),
        ((1e-9, 0), (0.0, 1e-6)),
        ((0.2500001, 0.250001, 0.25), (0.25, 0.250001)),
        ((0.5, 0.25, 0.5), (0.25, 0.5)),
    ],
)
def test_radii_are_sorted_and_taken_to_six_decimals_upwards(given: Sequence[float], taken: tuple[float, ...]) -> None:
    assert rule_of(radii=given).radii == taken
    for radius in np.random.default_rng(10).uniform(0, 0.5, 500).tolist():
        (up,) = rule_of(method="clopper-pearson", radii=(radius,)).radii or ()
        assert radius <= up < radius + 1.000001e-6
        assert up == float(f"{up:.6f}")


def _all_rules() -> Iterable[Rule]:
    for method, bound in (("clopper-pearson", None), ("sequential", "geometric"), ("sequential", "beta")):
        for level, radii in itertools.product(("image", "family"), (None, (0.1, 1 / 3))):
            yield rule_of(method=method, bound=bound, level=level, radii=radii, sigma=1 / 3, alpha=0.1 / 3)


def test_a_rule_comes_back_from_its_line() -> None:
    lines = [rule.to_json() for rule in _all_rules()]
    assert len(set(lines)) == 12
    for rule, line in zip(_all_rules(), lines, strict=True):
        assert "\n" not in line
        assert Rule.from_json(line) == rule
        assert json.loads(line)["alpha"] == 0.1 / 3


@pytest.mark.parametrize(
    "change",
    [
        lambda _: [],
        lambda _: None,
        lambda _: {},
        lambda values: {**values, "more": 1},
        lambda values: {key: values[key] for key in values if key != "futility"},
        lambda values: {**values, "alpha": 0.9},
        lambda values: {**values, "method": "wald"},
        lambda values: {**values, "radii": [9.0]},
        lambda values: {**values, "num_images": 0},
    ],
)
def test_what_is_no_rule_is_refused(change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(rule_of().to_json())
    with pytest.raises(ValueError):  # noqa: PT011
        Rule.from_json(json.dumps(change(values)))
    with pytest.raises(ValueError):  # noqa: PT011
        Rule.from_json(rule_of().to_json()[:-5])


def test_the_level_of_one_certificate_and_what_it_says() -> None:
    image, family = rule_of(alpha=0.001), rule_of(alpha=0.001, level="family", num_images=10_000)
    assert (image.image_alpha, family.image_alpha) == (0.001, 0.001 / 10_000)
    assert image.statement == "each certificate by itself is false with probability at most 0.001"
    assert family.statement == "all 10,000 certificates hold together with probability at least 0.999"
    assert rule_of(method="clopper-pearson", alpha=0.001).largest_radius == largest_radius(2_000, SIGMA, 0.001)
    one = rule_of(method="clopper-pearson", alpha=0.001, level="family", num_images=50)
    assert one.largest_radius == largest_radius(2_000, SIGMA, 0.001 / 50)


def test_a_family_rule_tests_each_image_at_its_share() -> None:
    """The family's tests are those of an image rule at alpha / num_images, and not those at alpha."""
    radii, looks = (0.125,), np.arange(100, 2_001, 100)
    family = critical_counts(rule_of(level="family", radii=radii).tests(), looks)
    share = critical_counts(rule_of(alpha=0.05 / 20, radii=radii).tests(), looks)
    np.testing.assert_array_equal(family[0], share[0])
    assert (family[0] > critical_counts(rule_of(radii=radii).tests(), looks)[0]).all()


@pytest.mark.parametrize("noise", ["gaussian", "discrete"])
@pytest.mark.parametrize(("method", "least"), [("clopper-pearson", (10, 40, 301)), ("sequential", (12, 47, 348))])
def test_a_rule_says_the_least_votes_that_certify(method: str, least: tuple[int, int, int], noise: str) -> None:
    """By hand: alpha^(1/N) must exceed 1/2, Phi(1) and Phi(2); the sequential rule's last test has a third of alpha."""
    rule = rule_of(method=method, noise=noise, alpha=0.001)
    said = reach(rule)
    assert said.endswith(f"votes is {least[0]} for any radius, {least[1]} for sigma, {least[2]} for 2 sigma")
    assert [fewest_for(rule, factor * rule.sigma) for factor in (1, 2, 40)] == [least[1], least[2], None]


@pytest.mark.parametrize(
    ("noise", "norm"), [("gaussian", "l2"), ("discrete", "l2"), ("uniform", "l1"), ("laplace", "l1")]
)
def test_a_rule_says_in_which_norm_it_certifies(noise: str, norm: str) -> None:
    assert f"all agree certify an {norm} radius of at most " in reach(rule_of(noise=noise))


@pytest.mark.parametrize("sigma", [0.12, 0.25, 1 / 3, 0.5, 1.0])
def test_no_null_probability_is_below_the_exact_one(sigma: float) -> None:
    """Against 40 digits, for the radius as a float and as the text of six decimals; above it by less than 1e-11."""
    radii = np.random.default_rng(11).integers(0, int(6e6 * sigma), 300) * 1e-6
    radii = np.concatenate([radii, sigma * np.arange(13) / 2])
    with mpmath.workdps(40):
        for radius in radii.tolist():
            found = null_probability(radius, sigma)
            for value in (mpmath.mpf(radius), mpmath.mpf(f"{radius:.15g}")):
                exact = mpmath.ncdf(value / mpmath.mpf(sigma))
                assert exact <= mpmath.mpf(found) < exact + mpmath.mpf("1e-11")
