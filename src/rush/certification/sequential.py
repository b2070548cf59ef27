"""Sequential certification: sample an image only until its radii are decided, at a proven level.

Let A be the class selected on votes of their own, p = P(f(x + noise) = A), and S_n the number of votes for A among n
further ones. Radius r is certified by rejecting H_r: p <= p_r with p_r = Phi(r / sigma) (``certification.bounds``).

Test martingale. For q > p_r let L_n(q) = (q / p_r)^S_n ((1 - q) / (1 - p_r))^(n - S_n). One more vote multiplies it by
a factor of mean p q / p_r + (1 - p)(1 - q) / (1 - p_r), which increases in p and is 1 at p = p_r. Under H_r every
L_n(q) is therefore a nonnegative supermartingale that starts at 1, and so is any mixture M_n of them whose weights are
fixed before the votes and sum to at most 1. Ville's inequality: P(M_n >= 1 / alpha for some n) <= alpha under H_r,
whenever and for whatever reason one looks or stops (Ville 1939; Ramdas et al. 2023, Statistical Science 38).

Two mixtures. ``beta``: q from Beta(1/2, 1/2) truncated to (p_r, 1]. ``geometric``: twelve q at geometric distances from
p_r, the nearest at what the cap N can just resolve, weights falling with distance^(-3/4); and, with weight 1/3, the
conditional probability P(S_N >= k | S_n) at p_r divided by its bound, k the smallest number with P(S_N >= k) <= alpha/3
at p_r. The latter is Doob's martingale of the binomial test at the cap (for p < p_r a supermartingale, since the
conditional probability increases in S_n). It decides at the cap what the first part leaves open. Everything depends on
p_r, alpha and N alone.

Many radii on one path. The radii r_1 < r_2 < ... are tested in this order, each at the full level alpha, r_j only once
all smaller ones are certified. The hypotheses are nested (H_r implies H_r' for r' > r): let r_i be the smallest radius
whose hypothesis is true. A false certificate needs H_(r_i) rejected, which has probability <= alpha (fixed-sequence
testing). Hence, for each image by itself, P(a radius is certified that is too large, or for a class other than g(x))
<= alpha, for the whole curve.

Futility. Sampling also stops when the same construction, mirrored, rejects p >= p_r for the next radius at the level
``futility``: "not certifiable". An error there withholds a certificate and never gives a false one, because the proof
above holds for any rule of stopping. At the cap the next radius is "undecided".
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from rush.choices import SequentialBound
from rush.errors import InputError

OUTCOMES = ("certified", "not certifiable", "undecided")
CERTIFIED, NOT_CERTIFIABLE, UNDECIDED = range(len(OUTCOMES))

_POINTS = 12
_DECAY = 0.75
_TERMINAL = 1 / 3
# Rounding changes a logarithm by less than 1e-9 in sums of a million terms of size one; thresholds are raised by more.
_SAFETY = 1e-6


class Evidence(Protocol):
    """A nonnegative supermartingale under its hypothesis that starts at <= 1."""

    def log_value(self, successes: NDArray[np.float64], trials: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return its logarithm after ``successes`` of ``trials``, all (B,)."""
        ...


class GeometricMixture:
    """Mixture over points at geometric distances from ``null``: above it (``side`` = 1, against p <= null) or below."""

    def __init__(self, null: float, level: float, cap: int, side: int) -> None:
        room = 1 - null if side > 0 else null
        nearest = np.sqrt(2 * null * (1 - null) * np.log(1 / level) / cap)
        distance = np.geomspace(min(nearest, 0.5 * room), 0.999 * room, _POINTS)
        weight = distance**-_DECAY
        self._log_weight = np.log(weight / weight.sum())
        self._success = np.log1p(side * distance / null)
        self._failure = np.log1p(-side * distance / (1 - null))

    def log_value(self, successes: NDArray[np.float64], trials: NDArray[np.float64]) -> NDArray[np.float64]:
        failures = trials - successes
        terms = self._log_weight + successes[:, None] * self._success + failures[:, None] * self._failure
        largest = terms.max(1)  # special.logsumexp, at a tenth of its time on a few points
        return largest + np.log(np.exp(terms - largest[:, None]).sum(1))


class BetaMixture:
    """Mixture by Beta(1/2, 1/2), truncated to the side of ``null`` that contradicts the hypothesis."""

    def __init__(self, null: float, level: float, cap: int, side: int) -> None:  # noqa: ARG002 - as the other mixture
        self._null = null
        self._tail = special.betaincc if side > 0 else special.betainc
        self._log_prior = special.betaln(0.5, 0.5) + np.log(self._tail(0.5, 0.5, null))

    def log_value(self, successes: NDArray[np.float64], trials: NDArray[np.float64]) -> NDArray[np.float64]:
        a, b = successes + 0.5, trials - successes + 0.5
        with np.errstate(divide="ignore"):
            posterior = special.betaln(a, b) + np.log(self._tail(a, b, self._null))
        return (
            posterior - self._log_prior - successes * np.log(self._null) - (trials - successes) * np.log1p(-self._null)
        )


class WithTerminal:
    """Mixture of ``inner`` (weight 2/3) and the binomial test at the cap as a martingale (weight 1/3)."""

    def __init__(self, inner: Evidence, null: float, level: float, cap: int) -> None:
        share = _TERMINAL * level * (1 - 2 * _SAFETY)  # so that passing it passes the raised threshold
        self._inner, self._null, self._cap = inner, null, cap
        self._log_scale = np.log(_TERMINAL / share)
        self._needed = _smallest_rejecting(null, share, cap)

    def log_value(self, successes: NDArray[np.float64], trials: NDArray[np.float64]) -> NDArray[np.float64]:
        left, missing = self._cap - trials, self._needed - successes
        open_ = (missing > 0) & (missing <= left)
        chance = special.betainc(np.where(open_, missing, 1), np.where(open_, left - missing + 1, 1), self._null)
        chance = np.where(missing <= 0, 1.0, np.where(open_, chance, 0.0))
        with np.errstate(divide="ignore"):
            return np.logaddexp(
                np.log1p(-_TERMINAL) + self._inner.log_value(successes, trials), self._log_scale + np.log(chance)
            )


def evidence(bound: SequentialBound, null: float, level: float, cap: int) -> Evidence:
    """Return evidence against p <= ``null``, which rejects at 1 / ``level``."""
    if bound == "beta":
        return BetaMixture(null, level, cap, side=1)
    return WithTerminal(GeometricMixture(null, level, cap, side=1), null, level, cap)


class FixedSequence:
    """The tests of ascending null probabilities on one path of votes.

    Args:
        nulls: p_r of the radii, each in [1/2, 1).
        bound: name of the mixture.
        level: of an image's certificate.
        futility: level of giving up a radius.
        cap: largest number of votes, fixed beforehand.

    Raises:
        InputError: the nulls do not ascend, or ``cap`` agreeing votes do not reject one of them.
    """

    def __init__(
        self, nulls: Sequence[float], *, bound: SequentialBound, level: float, futility: float, cap: int
    ) -> None:
        ascending = list(nulls) == sorted(set(nulls)) and len(nulls) > 0
        if not ascending or not all(reachable(bound, null, level, cap) for null in nulls):
            raise InputError(f"null probabilities must ascend and be within reach of {cap} votes, got {list(nulls)}")
        mirrored = GeometricMixture if bound == "geometric" else BetaMixture
        self._tests = [(evidence(bound, null, level, cap), mirrored(null, futility, cap, side=-1)) for null in nulls]
        self._threshold = np.log(1 / level) + _SAFETY
        self._futile = np.log(1 / futility) + _SAFETY

    def look(
        self, passed: NDArray[np.int64], successes: ArrayLike, trials: ArrayLike
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Apply the tests to B images after another block.

        Args:
            passed: int (B,), number of nulls passed so far.
            successes: (B,), votes for the selected class so far.
            trials: (B,), votes so far.

        Returns:
            The number of nulls passed now, and the outcome uint8 (B,), an index into ``OUTCOMES``: CERTIFIED if all
            nulls are passed, NOT_CERTIFIABLE if the next one is given up, UNDECIDED while it is open.
        """
        passed = passed.copy()
        k, n = np.asarray(successes, np.float64), np.asarray(trials, np.float64)
        given_up = np.zeros(len(passed), bool)
        for number, (against, in_favour) in enumerate(self._tests):
            at = np.flatnonzero((passed == number) & ~given_up)
            if not at.size:
                continue
            rejected = against.log_value(k[at], n[at]) >= self._threshold
            passed[at[rejected]] += 1
            futile = in_favour.log_value(k[at], n[at]) >= self._futile
            given_up[at[~rejected & futile]] = True
        outcome = np.where(passed == len(self._tests), CERTIFIED, np.where(given_up, NOT_CERTIFIABLE, UNDECIDED))
        return passed, outcome.astype(np.uint8)


def reachable(bound: SequentialBound, null: float, level: float, cap: int) -> bool:
    """Return whether ``cap`` votes that all agree reject p <= ``null``."""
    if not 0 < null < 1:
        return False
    all_agree = np.array([float(cap)])
    return bool(evidence(bound, null, level, cap).log_value(all_agree, all_agree)[0] >= np.log(1 / level) + _SAFETY)


def _smallest_rejecting(null: float, level: float, cap: int) -> int:
    """Return the smallest k with P(Binomial(cap, null) >= k) <= level, by a margin of 1e-9, or cap + 1."""
    low, high = 0, cap + 1  # P(>= 0) = 1 > level; cap + 1 successes are impossible
    while high - low > 1:
        middle = (low + high) // 2
        rejects = special.betainc(middle, cap - middle + 1, null) * (1 + 1e-9) <= level
        low, high = (low, middle) if rejects else (middle, high)
    return high
