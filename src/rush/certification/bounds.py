"""The theorem: from vote counts to a certified class and radius.

Let f be the base classifier, p_c = P(f(x + N(0, sigma^2 I)) = c) and g(x) = argmax p_c. If p_A >= p_lower > 1/2 for a
class A, then g(x + delta) = A for every delta with ||delta||_2 < sigma * Phi^-1(p_lower) (Cohen et al. 2019, theorem 1
with the runner-up bounded by 1 - p_lower).

Certification draws two independent sets of votes. The first only selects A. On the second, A's count is
Binomial(num_estimation, p_A) given A, so the Clopper-Pearson bound holds with probability >= 1 - alpha whatever A the
first set selected. Hence, for each image, P(a radius is certified that is too large, or for a class other than g(x))
<= alpha. Where p_lower <= 1/2 nothing is certified: ABSTAIN, radius 0.

With two classes. If p_A >= p_lower > p_upper >= p_c for every other class c, then g(x + delta) = A for every delta with
||delta||_2 < sigma / 2 (Phi^-1(p_lower) - Phi^-1(p_upper)) (the same theorem in full). The second set also bounds the
others: let m be the largest count of a class other than A, and U(m) the Clopper-Pearson upper bound at alpha / 2 for m
of num_estimation. Let B be the most probable class other than A, which does not depend on the second set. Its count is
at most m, and U increases with the count, so that P(U(m) < p_B) <= P(U(count of B) < p_B) <= alpha / 2: no factor for
the number of classes. With p_lower at alpha / 2 too, both bounds hold with probability >= 1 - alpha, and p_upper =
min(U(m), 1 - p_lower).

Other noises, of standard deviation sigma in every pixel, certify in l1 (Yang et al. 2020). Uniform noise on [-lambda,
lambda], lambda = sigma sqrt 3, certifies every ||delta||_1 < 2 lambda (p_lower - 1/2). Laplace noise of scale lambda =
sigma / sqrt 2 certifies every ||delta||_1 < -lambda log(2 (1 - p_lower)). Both are tight for a classifier of one pixel.

Splitting noise has finitely many draws, all of which vote. A step of 1/255 of one pixel changes at most one vote
(``smoothing.splitting``), so that certificates follow from the votes without any bound on probabilities.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from rush.choices import ABSTAIN, LEVELS, TOTAL_VARIATION, NoiseName
from rush.statistics import SAFETY, lower_bound

RADIUS_DIGITS = 6
_UNIFORM_WIDTH = 2 * math.sqrt(3)  # width of the interval of uniform noise, for sigma = 1
_QUANTILES = 1e-12  # more than the error of the difference of two normal quantiles


class Law(NamedTuple):
    """The relation of radii and class probabilities under one noise.

    Attributes:
        radius: (p, sigma) -> the radius that a class probability p >= 1/2 certifies.
        probability: (radius, sigma) -> the p that certifies ``radius``, its inverse.
    """

    radius: Callable[[NDArray[np.float64], float], NDArray[np.float64]]
    probability: Callable[[float, float], float]


LAWS: dict[NoiseName, Law] = {
    "gaussian": Law(lambda p, sigma: sigma * special.ndtri(p), lambda radius, sigma: special.ndtr(radius / sigma)),
    "uniform": Law(
        lambda p, sigma: _UNIFORM_WIDTH * sigma * (p - 0.5),
        lambda radius, sigma: 0.5 + radius / (_UNIFORM_WIDTH * sigma),
    ),
    "laplace": Law(
        lambda p, sigma: -sigma / math.sqrt(2) * np.log(2 * (1 - p)),
        lambda radius, sigma: 1 - math.exp(-radius * math.sqrt(2) / sigma) / 2,
    ),
}
LAWS["discrete"] = LAWS["gaussian"]


@dataclass(frozen=True)
class Certified:
    """Certificates of N images.

    Attributes:
        prediction: int64 (N,), ABSTAIN where nothing is certified.
        radius: float64 (N,) in pixel units, 0.0 where nothing is certified.
        p_lower: float64 (N,), lower bound on the probability of the selected class.
        p_upper: float64 (N,), upper bound on the probability of every other class.
    """

    prediction: NDArray[np.int64]
    radius: NDArray[np.float64]
    p_lower: NDArray[np.float64]
    p_upper: NDArray[np.float64]


def certify_counts(
    selection: NDArray[np.int64],
    estimation: NDArray[np.int64],
    sigma: float,
    alpha: float,
    noise: NoiseName = "gaussian",
) -> Certified:
    """Certify a fixed number of votes per image by the theorem in this module's docstring.

    Args:
        selection: int (N, K), votes that select the class of each image, the lowest one in case of a tie.
        estimation: int (N, K), votes that bound its probability, independent of ``selection``.
        sigma: standard deviation of the noise, in pixel units.
        alpha: probability that the certificate of an image is false.
        noise: name of the noise.
    """
    selected = selection.argmax(1)
    successes = np.take_along_axis(estimation, selected[:, None], 1)[:, 0]
    p_lower = lower_bound(successes, estimation.sum(1), alpha)
    radius = certified_radius(p_lower, sigma, noise)
    return Certified(np.where(radius > 0, selected, ABSTAIN).astype(np.int64), radius, p_lower, 1 - p_lower)


def certify_two_classes(
    selection: NDArray[np.int64], estimation: NDArray[np.int64], sigma: float, alpha: float
) -> Certified:
    """Certify as ``certify_counts``, by the bound with two classes in this module's docstring.

    It is never worse than 1 - p_lower for the other classes, but p_lower is bounded at alpha / 2. It pays off where the
    votes against the selected class are spread over many others.
    """
    selected, rows = selection.argmax(1), np.arange(len(selection))
    trials = estimation.sum(1)
    others = estimation.copy()
    others[rows, selected] = 0
    p_lower = np.maximum(lower_bound(estimation[rows, selected], trials, alpha / 2) - TOTAL_VARIATION, 0.0)
    most = 1 - lower_bound(trials - others.max(1), trials, alpha / 2) + TOTAL_VARIATION
    p_upper = np.minimum(most, 1 - p_lower)
    gap = special.ndtri(p_lower) - special.ndtri(p_upper)
    exact = sigma / 2 * (gap * (1 - SAFETY) - _QUANTILES)
    radius = np.where(p_lower > p_upper, np.maximum(_rounded_down(exact), 0.0), 0.0)
    return Certified(np.where(radius > 0, selected, ABSTAIN).astype(np.int64), radius, p_lower, p_upper)


def certify_all_draws(votes: NDArray[np.int64]) -> Certified:
    """Certify the votes of all draws of splitting noise: exact, in l1 and for 8-bit images.

    The radius is the minimum over the other classes c of floor((n_A - n_c - [c < A]) / 2) / 255, rounded toward zero to
    six decimals (Levine and Feizi 2021, with ties going to the lower class).

    Args:
        votes: int (N, K), votes of all L draws. Class A with the most votes, the lowest of several, is certified.

    Returns:
        Certificates without abstentions. The bounds on probabilities are the shares of A and of the next class.
    """
    selected, rows = votes.argmax(1), np.arange(len(votes))
    own, others = votes[rows, selected], votes.copy()
    others[rows, selected] = -1
    ahead = own[:, None] - others - (np.arange(votes.shape[1]) < selected[:, None])
    ahead[rows, selected] = np.iinfo(np.int64).max
    radius = (ahead.min(1) // 2) * 10**RADIUS_DIGITS // LEVELS / 10**RADIUS_DIGITS
    total = votes.sum(1)
    return Certified(selected.astype(np.int64), radius, own / total, others.max(1) / total)


def certified_radius(p_lower: ArrayLike, sigma: float, noise: NoiseName = "gaussian") -> NDArray[np.float64]:
    """Return the radius that p_lower > 1/2 certifies, else 0, in pixel units, rounded toward zero to six decimals.

    Under Gaussian noise it is sigma * Phi^-1(p_lower). Before rounding, the radius is multiplied by 1 - 1e-10. That is
    far more than the error of the quantile, so the radius, and its text in a table, never exceeds the true value.
    """
    p = np.asarray(p_lower, np.float64)
    with np.errstate(divide="ignore"):
        exact = LAWS[noise].radius(np.clip(p, 0.5, 1.0), sigma) * (1 - SAFETY)
    return np.where(p > 0.5, _rounded_down(exact), 0.0)


def largest_radius(num_estimation: int, sigma: float, alpha: float, noise: NoiseName = "gaussian") -> float:
    """Return the radius that ``num_estimation`` votes certify when all of them agree, the largest one possible."""
    return float(certified_radius(lower_bound(num_estimation, num_estimation, alpha), sigma, noise))


@cache
def least_probability(radius: float, sigma: float, num_classes: int) -> float:
    """Return the smallest probability of a class, of ``num_classes`` >= 2, whose ``radius`` with two classes holds.

    The other classes have probability 1 - p in total and at most Phi(Phi^-1(p) - 2 radius / sigma) each. The result is
    the p at which they reach it together. Rounding cannot raise it.
    """
    gap, low, high = 2 * radius / sigma, -40.0, 2 * radius / sigma
    for _ in range(60):
        middle = (low + high) / 2
        too_small = (num_classes - 1) * special.ndtr(middle - gap) < special.ndtr(-middle)
        low, high = (middle, high) if too_small else (low, middle)
    return float(special.ndtr(low) * (1 - SAFETY))


def uniform_linf_radius(p_lower: float, sigma: float, values: int) -> float:
    """Return the l-inf radius that p_lower > 1/2 certifies under uniform noise on images of ``values`` pixel values.

    It is 2 lambda (1 - (3/2 - p_lower)^(1 / values)) with lambda = sigma sqrt 3 (Yang et al. 2020), and 0 for p_lower
    <= 1/2.
    """
    if p_lower <= 0.5:
        return 0.0
    return -_UNIFORM_WIDTH * sigma * math.expm1(math.log(1.5 - p_lower) / values) * (1 - SAFETY)


def _rounded_down(radius: NDArray[np.float64]) -> NDArray[np.float64]:
    scale = 10.0**RADIUS_DIGITS
    return np.asarray(np.floor(radius * scale) / scale)
