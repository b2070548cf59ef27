"""The theorem: from vote counts to a certified class and radius.

Let f be the base classifier, p_c = P(f(x + N(0, sigma^2 I)) = c) and g(x) = argmax p_c. If p_A >= p_lower > 1/2 for a
class A, then g(x + delta) = A for every delta with ||delta||_2 < sigma * Phi^-1(p_lower) (Cohen et al. 2019, theorem 1
with the runner-up bounded by 1 - p_lower).

Certification draws two independent sets of votes. The first only selects A. On the second, A's count is
Binomial(num_estimation, p_A) given A, so the Clopper-Pearson bound holds with probability >= 1 - alpha whatever A the
first set selected. Hence, for each image, P(a radius is certified that is too large, or for a class other than g(x))
<= alpha. Where p_lower <= 1/2 nothing is certified: ABSTAIN, radius 0.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from rush.choices import ABSTAIN
from rush.statistics import SAFETY, lower_bound

RADIUS_DIGITS = 6


@dataclass(frozen=True)
class Certified:
    """Certificates of N images.

    Attributes:
        prediction: int64 (N,), ABSTAIN where nothing is certified.
        radius: float64 (N,) in pixel units, 0.0 where nothing is certified.
        p_lower: float64 (N,), lower bound on the probability of the selected class.
    """

    prediction: NDArray[np.int64]
    radius: NDArray[np.float64]
    p_lower: NDArray[np.float64]


def certify_counts(
    selection: NDArray[np.int64], estimation: NDArray[np.int64], sigma: float, alpha: float
) -> Certified:
    """Certify a fixed number of votes per image by the theorem in this module's docstring.

    Args:
        selection: int (N, K), votes that select the class of each image, the lowest one at a tie.
        estimation: int (N, K), votes that bound its probability, independent of ``selection``.
        sigma: standard deviation of the noise, in pixel units.
        alpha: probability that the certificate of an image is false.
    """
    selected = selection.argmax(1)
    successes = np.take_along_axis(estimation, selected[:, None], 1)[:, 0]
    p_lower = lower_bound(successes, estimation.sum(1), alpha)
    radius = certified_radius(p_lower, sigma)
    return Certified(np.where(radius > 0, selected, ABSTAIN).astype(np.int64), radius, p_lower)


def certified_radius(p_lower: ArrayLike, sigma: float) -> NDArray[np.float64]:
    """Return sigma * Phi^-1(p_lower) where p_lower > 1/2, else 0, in pixel units, rounded toward zero to six decimals.

    Before rounding, the radius is multiplied by 1 - 1e-10. That is far more than the error of the normal quantile, so
    the radius, and its text in a table, never exceeds the true value.
    """
    p = np.asarray(p_lower, np.float64)
    exact = sigma * special.ndtri(np.clip(p, 0.5, 1.0)) * (1 - SAFETY)
    scale = 10.0**RADIUS_DIGITS
    return np.where(p > 0.5, np.floor(exact * scale) / scale, 0.0)


def largest_radius(num_estimation: int, sigma: float, alpha: float) -> float:
    """Return the radius that ``num_estimation`` votes certify when all of them agree, the largest one possible."""
    return float(certified_radius(lower_bound(num_estimation, num_estimation, alpha), sigma))
