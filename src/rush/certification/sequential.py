"""Sequential certification: sample an image only until its radii are decided, at a proven level.

Let A be the class selected on separate votes, p = P(f(x + noise) = A), and S_n the number of votes for A among n
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

With two classes. Let p_B be the largest probability of a class other than A. The exact radius is R = sigma / 2
(Phi^-1(p_A) - Phi^-1(p_B)) (``certification.bounds``), so that the hypothesis R <= r is p_B >= b(p_A) with b(a) =
Phi(Phi^-1(a) - z), z = 2 r / sigma. For z >= 0 its slope b'(a) = exp(z Phi^-1(a) - z^2 / 2) increases in a: b is convex
and lies above its tangents. Take the tangent of slope s at a, and score a vote 1 for A, 0 for B and x = 1 / (1 + s)
otherwise. The mean score, x + x (s p_A - p_B), is then at most m = x + x (s a - b(a)) under the hypothesis. For q > m a
vote of score y multiplies the evidence by (1 - y) (1 - q) / (1 - m) + y q / m, which is nonnegative, increases in y and
has a mean of at most 1. The product over the votes is a supermartingale as above. ``two-classes`` mixes the geometric
mixtures of six tangents, in place of the one for p_A. The first tangent has s = 1, a = p_r, m = p_r, x = 1/2 and half
of the weight. Whatever the votes, its evidence is at least that for p_A alone, since votes for the rest multiply it by
more. The whole is at least half of what ``geometric`` gives: the bound is never weaker than that one at alpha / 2, up
to rounding. The binomial test at the cap remains, since R <= r implies p_A <= p_r (by p_B <= 1 - p_A). Each m is raised
by ``TOTAL_VARIATION``, which is more than the error of rounding and allows for discrete noise.

B is unknown, but it does not depend on the votes. Evidence decreases if a vote for the rest is counted for B. Computed
with the largest count of any class other than A so far, it therefore never exceeds that computed with the count of B,
to which Ville's inequality applies. No factor for the number of classes is needed.

Many radii on one path. The radii r_1 < r_2 < ... are tested in this order, each at the full level alpha, r_j only once
all smaller ones are certified. The hypotheses are nested (H_r implies H_r' for r' > r): let r_i be the smallest radius
whose hypothesis is true. A false certificate needs H_(r_i) rejected, which has probability <= alpha (fixed-sequence
testing). Hence, for each image separately, P(a radius is certified that is too large, or for a class other than g(x))
<= alpha, for the whole curve.

Futility. Sampling also stops when the next radius is given up. An error there withholds a certificate and never gives a
false one, because the proof above holds for any rule of stopping. At the cap the next radius is "undecided".

``power``: it is "given up" when certifying it by the cap has become improbable. With p from Beta(1/2, 1/2), S_N given
S_n is beta-binomial. The radius is given up unless the evidence passes the threshold where S_N is the (1 - futility)
quantile of the normal law of the same mean and variance, plus 1/2 for continuity and at most S_n + N - n, and where the
rival keeps its share of the other votes.

``test``: it is "not certifiable" when the same construction, mirrored, rejects p >= p_r at the level ``futility``.
With two classes, R >= r implies p_c <= b(p_A) for every class c other than A. This region is covered by cells: p_A >=
p_r, and for p_A between neighbouring points of contact of the tangents (the last one and 0) the part below the chord of
b, as b is convex. In each cell the mean score of the chord's slope, with 0 for c, is at least that at the ends of the
chord, against which it has a mirrored mixture. The radius is given up when all cells are rejected. The image is in one
of them, so that the level is not divided among them. In this cell the evidence is a supermartingale for every c, and so
is their mean, with weights that are fixed before these votes. The class with the most votes contributes its own
evidence times its weight, and only this part is computed.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from rush.choices import TOTAL_VARIATION, SequentialBound, Stopping
from rush.errors import InputError

Floats = NDArray[np.float64]

OUTCOMES = ("certified", "not certifiable", "undecided", "given up")
CERTIFIED, NOT_CERTIFIABLE, UNDECIDED, GIVEN_UP = range(len(OUTCOMES))
ENDS: dict[Stopping, int] = {"test": NOT_CERTIFIABLE, "power": GIVEN_UP}
"""Outcome of a radius that is given up."""

_POINTS = 12
_DECAY = 0.75
_TERMINAL = 1 / 3
_TANGENTS = 6
_SPACING = 0.3  # spacing of the tangents' points of contact, in normal quantiles of p_A
# Rounding changes a logarithm by less than 1e-9 in sums of a million terms of size one; thresholds are raised by more.
_SAFETY = 1e-6


class Evidence(Protocol):
    """A nonnegative supermartingale under its hypothesis that starts at <= 1."""

    def log_value(self, successes: Floats, trials: Floats, rival: Floats | float = 0.0) -> Floats:
        """Return its logarithm after ``successes`` of ``trials``, all (B,).

        ``rival`` counts those votes for another class that score 0. Evidence about one class ignores it.
        """
        ...


class GeometricMixture:
    """Mixture over points at geometric distances from ``null``: above it (``side`` = 1, against p <= null) or below.

    Args:
        null: p, the mean score. Several nulls make one mixture, with weights ``share``.
        level: level for which the mixture is used.
        cap: largest number of votes.
        side: 1 or -1.
        rest: score x of votes that are neither successes nor for the rival, one for each null.
        share: weight of each null.
    """

    def __init__(
        self, null: ArrayLike, level: float, cap: int, side: int, rest: ArrayLike = 0.0, share: ArrayLike = 1.0
    ) -> None:
        p, x, w = (np.asarray(value, np.float64).reshape(-1, 1) for value in (null, rest, share))
        room = 1 - p if side > 0 else p
        nearest = np.sqrt(2 * p * (1 - p) * np.log(1 / level) / cap)
        distance = np.geomspace(np.minimum(nearest, 0.5 * room)[:, 0], 0.999 * room[:, 0], _POINTS, axis=1)
        weight = distance**-_DECAY
        self._log_weight = np.log(w * weight / weight.sum(1, keepdims=True)).ravel()
        success, failure = np.log1p(side * distance / p), np.log1p(-side * distance / (1 - p))
        self._success, self._failure = success.ravel(), failure.ravel()
        self._rest = np.log1p(x * np.expm1(success - failure)).ravel()  # beyond that of a failure

    def log_value(self, successes: Floats, trials: Floats, rival: Floats | float = 0.0) -> Floats:
        return _log_sum(self.log_terms(successes, trials, rival))

    def log_terms(self, successes: Floats, trials: Floats, rival: Floats | float = 0.0) -> Floats:
        """Return the logarithms of its weighted points, twelve for each null in turn, (B, points)."""
        failures = trials - successes
        terms: Floats = successes[:, None] * self._success  # in place: large arrays are slow to allocate
        terms += self._log_weight
        terms += failures[:, None] * self._failure
        if self._rest.any():
            terms += (failures - rival)[:, None] * self._rest
        return terms


class BetaMixture:
    """Mixture by Beta(1/2, 1/2), truncated to the side of ``null`` that contradicts the hypothesis."""

    def __init__(self, null: float, level: float, cap: int, side: int) -> None:  # noqa: ARG002 - as the other mixture
        self._null = null
        self._tail = special.betaincc if side > 0 else special.betainc
        self._log_prior = special.betaln(0.5, 0.5) + np.log(self._tail(0.5, 0.5, null))

    def log_value(self, successes: Floats, trials: Floats, rival: Floats | float = 0.0) -> Floats:  # noqa: ARG002
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

    def log_value(self, successes: Floats, trials: Floats, rival: Floats | float = 0.0) -> Floats:
        left, missing = self._cap - trials, self._needed - successes
        open_ = (missing > 0) & (missing <= left)
        chance = special.betainc(np.where(open_, missing, 1), np.where(open_, left - missing + 1, 1), self._null)
        chance = np.where(missing <= 0, 1.0, np.where(open_, chance, 0.0))
        with np.errstate(divide="ignore"):
            return np.logaddexp(
                np.log1p(-_TERMINAL) + self._inner.log_value(successes, trials, rival), self._log_scale + np.log(chance)
            )


class Cells:
    """Evidence against R >= r, p_r = ``null``: the least of the evidence against one of its cells."""

    def __init__(self, null: float, level: float, cap: int) -> None:
        a, b, _ = _boundary(null)
        a, b = np.append(a, 0.0), np.append(b, 0.0)
        rest = 1 / (1 + np.append(np.inf, np.diff(b) / np.diff(a)))  # the first cell is p_A >= a[0], whatever p_c
        ends = np.append(0, np.arange(_TANGENTS))
        means = _mean_score(a[ends], b[ends], rest) - 3 * TOTAL_VARIATION  # one for the votes, two for the null
        self._mixtures = GeometricMixture(means, level, cap, -1, rest)

    def log_value(self, successes: Floats, trials: Floats, rival: Floats | float = 0.0) -> Floats:
        return self.log_values(successes, trials, rival).min(1)

    def log_values(self, successes: Floats, trials: Floats, rival: Floats | float = 0.0) -> Floats:
        """Return the logarithms of the evidence against each cell, (B, cells)."""
        terms = self._mixtures.log_terms(successes, trials, rival)
        return _log_sum(terms.reshape(len(terms), -1, _POINTS))


def evidence(bound: SequentialBound, null: float, level: float, cap: int) -> Evidence:
    """Return evidence against p <= ``null``, which rejects at 1 / ``level``."""
    if bound == "beta":
        return BetaMixture(null, level, cap, side=1)
    inner = GeometricMixture(null, level, cap, side=1) if bound == "geometric" else tangents(null, level, cap)
    return WithTerminal(inner, null, level, cap)


def _mirrored(bound: SequentialBound, null: float, level: float, cap: int) -> Evidence:
    """Return evidence that ``null`` is not exceeded, which gives it up at 1 / ``level``."""
    if bound == "two-classes":
        return Cells(null, level, cap)
    mixture = GeometricMixture if bound == "geometric" else BetaMixture
    return mixture(null, level, cap, side=-1)


def tangents(null: float, level: float, cap: int) -> GeometricMixture:
    """Return the mixture of six tangents against R <= r, p_r = ``null``."""
    a, b, slope = _boundary(null)
    rest = 1 / (1 + slope)
    share = 0.5 ** np.arange(1, _TANGENTS + 1)
    share[-1] *= 2
    return GeometricMixture(_mean_score(a, b, rest) + TOTAL_VARIATION, level, cap, 1, rest, share)


class FixedSequence:
    """The tests of ascending null probabilities on one path of votes.

    Args:
        nulls: p_r of the radii, each in [1/2, 1).
        bound: name of the mixture.
        level: level of an image's certificate.
        futility: probability below which a radius is given up, or level of giving it up.
        cap: largest number of votes, fixed beforehand.
        stopping: how a radius is given up, see above.

    Raises:
        InputError: the nulls do not ascend, or ``cap`` agreeing votes do not reject one of them.
    """

    def __init__(
        self,
        nulls: Sequence[float],
        *,
        bound: SequentialBound,
        level: float,
        futility: float,
        cap: int,
        stopping: Stopping = "test",
    ) -> None:
        ascending = list(nulls) == sorted(set(nulls)) and len(nulls) > 0
        if not ascending or not all(reachable(bound, null, level, cap) for null in nulls):
            raise InputError(f"null probabilities must ascend and be within reach of {cap} votes, got {list(nulls)}")
        self._tests = [evidence(bound, null, level, cap) for null in nulls]
        self._threshold = np.log(1 / level) + _SAFETY
        self._futile = np.log(1 / futility) + _SAFETY
        self._cap, self._quantile = cap, float(special.ndtri(1 - futility))
        self._mirrored = [_mirrored(bound, null, futility, cap) for null in nulls] if stopping == "test" else []
        self._end = ENDS[stopping]

    def look(
        self,
        passed: NDArray[np.int64],
        successes: ArrayLike,
        trials: ArrayLike,
        rivals: tuple[ArrayLike, ArrayLike] = (0, 1),
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Apply the tests to B images after another block.

        Args:
            passed: int (B,), number of nulls passed so far.
            successes: (B,), votes for the selected class so far.
            trials: (B,), votes so far.
            rivals: for two classes, (B,) each: the largest number of votes for another class so far, and the weight of
                that class, fixed before these votes. The weights of all other classes sum to 1.

        Returns:
            The number of nulls passed now, and the outcome uint8 (B,), an index into ``OUTCOMES``: CERTIFIED if all
            nulls are passed, GIVEN_UP or NOT_CERTIFIABLE if the next one is given up, UNDECIDED while it is open.
        """
        passed = passed.copy()
        given = (successes, trials, *rivals)
        k, n, most, weight = (np.broadcast_to(np.asarray(v, np.float64), passed.shape) for v in given)
        given_up = np.zeros(len(passed), bool)
        for number, against in enumerate(self._tests):
            at = np.flatnonzero((passed == number) & ~given_up)
            if not at.size:
                continue
            rejected = against.log_value(k[at], n[at], most[at]) >= self._threshold
            passed[at[rejected]] += 1
            at = at[~rejected]
            if not at.size:
                continue
            if self._mirrored:
                futile = self._mirrored[number].log_value(k[at], n[at], most[at]) + np.log(weight[at]) >= self._futile
            else:
                futile = self._improbable(against, k[at], n[at], most[at])
            given_up[at[futile]] = True
        outcome = np.where(passed == len(self._tests), CERTIFIED, np.where(given_up, self._end, UNDECIDED))
        return passed, outcome.astype(np.uint8)

    def _improbable(self, against: Evidence, k: Floats, n: Floats, most: Floats) -> NDArray[np.bool_]:
        """Return for which images (B,) the evidence will hardly pass the threshold by the cap."""
        left, p = self._cap - n, (k + 0.5) / (n + 1)
        variance = left * p * (1 - p) * (self._cap + 1) / (n + 2)
        best = k + np.minimum(left * p + 0.5 + self._quantile * np.sqrt(variance), left)
        rival = most * (self._cap - best) / np.maximum(n - k, 1)
        return (left > 0) & (against.log_value(best, np.full_like(n, self._cap), rival) < self._threshold)


def reachable(bound: SequentialBound, null: float, level: float, cap: int) -> bool:
    """Return whether ``cap`` votes that all agree reject p <= ``null``."""
    if not 0 < null < 1:
        return False
    all_agree = np.array([float(cap)])
    return bool(evidence(bound, null, level, cap).log_value(all_agree, all_agree)[0] >= np.log(1 / level) + _SAFETY)


def _log_sum(terms: Floats) -> Floats:
    """Return log(sum(exp(terms))) over the last dimension, and overwrite ``terms``.

    It computes the same as special.logsumexp, in a tenth of the time on few points.
    """
    largest = terms.max(-1)
    terms -= largest[..., None]
    return largest + np.log(np.exp(terms, out=terms).sum(-1))


def _boundary(null: float) -> tuple[Floats, Floats, Floats]:
    """Return six points (a, b(a)) at R = r, p_r = ``null``, the first one at a = p_r, and the slope of b there."""
    z = 2 * max(0.0, float(special.ndtri(null)))
    steps = _SPACING * np.arange(_TANGENTS)
    return special.ndtr(z / 2 - steps), special.ndtr(-z / 2 - steps), np.exp(-z * steps)


def _mean_score(a: Floats, b: Floats, rest: Floats) -> Floats:
    """Return the mean score where the selected class has probability ``a`` and the rival ``b``."""
    return a + rest * (1 - a - b)


def _smallest_rejecting(null: float, level: float, cap: int) -> int:
    """Return the smallest k with P(Binomial(cap, null) >= k) <= level, by a margin of 1e-9, or cap + 1."""
    low, high = 0, cap + 1  # P(>= 0) = 1 > level; cap + 1 successes are impossible
    while high - low > 1:
        middle = (low + high) // 2
        rejects = special.betainc(middle, cap - middle + 1, null) * (1 + 1e-9) <= level
        low, high = (low, middle) if rejects else (middle, high)
    return high
