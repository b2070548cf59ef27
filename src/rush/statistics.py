"""Exact binomial bounds, tests and confidence intervals, with bounds and p-values rounded to the safe side."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from rush.errors import InputError
from rush.runtime.numbers import least_whole

# The relative error of scipy.special's incomplete beta functions is about 1e-13 for counts up to 1e8. Every bound and
# p-value is moved to the safe side by far more than that.
SAFETY = 1e-10
CHANCE = 1e-6  # probability of more errors than ``most_by_chance``


def lower_bound(successes: ArrayLike, trials: ArrayLike, alpha: float) -> NDArray[np.float64]:
    """Return the one-sided Clopper-Pearson lower bound on a probability (Clopper and Pearson 1934).

    P(bound > p) <= alpha for successes ~ Binomial(trials, p). The bound is the p at which P(X >= successes) = alpha,
    i.e. the alpha quantile of Beta(successes, trials - successes + 1). It is multiplied by (1 - 1e-10) so that rounding
    cannot raise it, and is 0 where there was no success.

    Args:
        successes: numbers of successes, broadcast against ``trials``.
        trials: numbers of trials.
        alpha: failure probability.

    Raises:
        InputError: unless 0 <= successes <= trials, trials >= 1 and 0 < alpha < 1.
    """
    k, n = _counts(successes, trials)
    if not 0 < alpha < 1:
        raise InputError(f"alpha must lie in (0, 1), got {alpha}")
    bound = special.betaincinv(np.maximum(k, 1), n - k + 1, alpha) * (1 - SAFETY)
    return np.where(k > 0, bound, 0.0)


def sign_test(wins: ArrayLike, losses: ArrayLike) -> NDArray[np.float64]:
    """Return the one-sided p-value of "wins are at most as likely as losses", rounded up, or 1 without votes.

    It is P(Binomial(wins + losses, 1/2) >= wins). It holds for votes among several classes too: given the number of
    votes for either of two classes, the split between them is binomial.
    """
    k = np.asarray(wins, np.float64)
    _, n = _counts(k, k + np.asarray(losses, np.float64), empty_ok=True)
    value = special.betainc(np.maximum(k, 1), n - k + 1, 0.5) * (1 + SAFETY)
    return np.where(k > 0, np.minimum(value, 1.0), 1.0)


def fewest_votes(level: float) -> int:
    """Return the least n for which n votes that all agree have a ``sign_test`` p-value of at most ``level``.

    A two-sided test at alpha is this one at alpha / 2.
    """
    fewest = least_whole(lambda n: float(sign_test(n, 0)) <= level)
    assert fewest is not None  # 2^-n is below every positive float from n = 1075 on
    return fewest


def upper_quantile(trials: int, probability: float, tail: float) -> int:
    """Return the smallest k with P(Binomial(trials, probability) > k) <= tail."""
    k = np.arange(trials + 1)
    exceed = special.betainc(k + 1.0, np.maximum(trials - k, 0.5), probability)
    exceed[-1] = 0.0
    return int(np.argmax(exceed <= tail))


def most_by_chance(trials: int, probability: float) -> int:
    """Return the largest number of errors among ``trials``, each of this ``probability`` at most, that chance explains.

    More of them have probability at most 1e-6. Without trials it is 0.
    """
    return upper_quantile(trials, min(1.0, probability), CHANCE) if trials else 0


@dataclass(frozen=True)
class Interval:
    """A point estimate with its two-sided confidence interval, all fractions (differences may be negative)."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.estimate:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def share_interval(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """Return the share ``successes / total`` with its exact two-sided Clopper-Pearson interval (1934).

    The interval covers the true share with probability >= ``confidence`` if the ``total`` images are drawn
    independently.

    Raises:
        InputError: unless 0 <= successes <= total and total >= 1.
    """
    if total < 1 or not 0 <= successes <= total:
        raise InputError(f"need 0 <= successes <= total and total >= 1, got {successes} of {total}")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(special.betaincinv(successes, total - successes + 1, tail))
    high = 1.0 if successes == total else float(special.betaincinv(successes + 1, total - successes, 1 - tail))
    return Interval(successes / total, low, high)


def paired_difference(first: np.ndarray, second: np.ndarray, confidence: float = 0.95) -> Interval:
    """Return the share of ``first`` minus that of ``second`` with a paired interval.

    The interval is that of Agresti and Min (2005): a Wald interval after adding 1/2 to each of the four cells, which
    stays close to its level even where few images differ. The estimate is the plain difference.

    Args:
        first: boolean (N,).
        second: boolean (N,), on the same images.
        confidence: nominal coverage.

    Raises:
        InputError: The arrays are empty or of unequal length.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape or first.ndim != 1 or first.size == 0:
        raise InputError(
            f"need two boolean arrays of the same positive length, got shapes {first.shape} and {second.shape}"
        )
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    b, c, n = only_first + 0.5, only_second + 0.5, first.size + 2
    centre = (b - c) / n
    half = float(special.ndtri((1 + confidence) / 2)) * np.sqrt((b + c) - (b - c) ** 2 / n) / n
    return Interval(
        (only_first - only_second) / first.size, float(max(-1.0, centre - half)), float(min(1.0, centre + half))
    )


def _counts(
    successes: ArrayLike, trials: ArrayLike, empty_ok: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    k, n = np.broadcast_arrays(np.asarray(successes, np.float64), np.asarray(trials, np.float64))
    if not ((k >= 0) & (k <= n) & (n >= (0 if empty_ok else 1))).all():
        raise InputError(
            f"need 0 <= successes <= trials and trials >= 1, got successes {k.tolist()} of trials {n.tolist()}"
        )
    return k, n
