"""Confidence intervals for shares of images and for paired differences between two such shares."""

from dataclasses import dataclass

import numpy as np
from scipy import special

from rush.errors import InputError


@dataclass(frozen=True)
class Interval:
    """A point estimate with its two-sided confidence interval, all fractions (differences may be negative)."""

    estimate: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def share_interval(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """Share ``successes / total`` with the exact two-sided Clopper-Pearson interval (Clopper and Pearson 1934).

    Covers the true share with probability >= ``confidence`` when the ``total`` images are drawn independently.
    Raises: InputError unless 0 <= successes <= total and total >= 1.
    """
    if total < 1 or not 0 <= successes <= total:
        raise InputError(f"need 0 <= successes <= total and total >= 1, got {successes} of {total}")
    tail = (1 - confidence) / 2
    low = 0.0 if successes == 0 else float(special.betaincinv(successes, total - successes + 1, tail))
    high = 1.0 if successes == total else float(special.betaincinv(successes + 1, total - successes, 1 - tail))
    return Interval(successes / total, low, high)


def paired_difference(first: np.ndarray, second: np.ndarray, confidence: float = 0.95) -> Interval:
    """Share of ``first`` minus share of ``second``, both boolean (N,) on the same images, with a paired interval.

    The interval is Agresti and Min's (2005): a Wald interval after adding 1/2 to each of the four cells, which keeps
    close to its level also where few images differ. The estimate is the plain difference.
    Raises: InputError when the arrays are empty or of unequal length.
    """
    first, second = np.asarray(first, bool), np.asarray(second, bool)
    if first.shape != second.shape or first.ndim != 1 or first.size == 0:
        raise InputError(
            f"need two boolean arrays of one equal, positive length, got shapes {first.shape} and {second.shape}"
        )
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    b, c, n = only_first + 0.5, only_second + 0.5, first.size + 2
    centre = (b - c) / n
    half = float(special.ndtri((1 + confidence) / 2)) * np.sqrt((b + c) - (b - c) ** 2 / n) / n
    return Interval(
        (only_first - only_second) / first.size, float(max(-1.0, centre - half)), float(min(1.0, centre + half))
    )
