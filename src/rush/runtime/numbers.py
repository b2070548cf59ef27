"""Conversion of users' numbers to plain Python numbers, and a search for the least integer that suffices."""

import math
from collections.abc import Callable, Iterable
from numbers import Integral, Real

from rush.errors import InputError

MOST = 2**40  # upper end of a search; more samples than any run draws


def as_whole(value: object) -> int | None:
    """Return ``value`` as an int: a Python or NumPy integer, or a 0-d array or tensor of one. Otherwise return None.

    Booleans and floats do not count as integers, nor do whole floats such as 2.0.
    """
    number = _scalar(value)
    return int(number) if isinstance(number, Integral) and not isinstance(number, bool) else None


def as_real(value: object) -> float | None:
    """Return ``value`` as a finite float: a Python or NumPy number, a Fraction, or a 0-d array or tensor of one.

    Anything else gives None: booleans, text, complex numbers, NaN and infinities.
    """
    number = _scalar(value)
    if not isinstance(number, Real) or isinstance(number, bool):
        return None
    try:
        real = float(number)
    except OverflowError:
        return None
    return real if math.isfinite(real) else None


def is_one_of(value: object, allowed: Iterable[str]) -> bool:
    """Return whether ``value`` is text and one of ``allowed``. Arrays, which compare elementwise, are not."""
    return isinstance(value, str) and value in tuple(allowed)


def positive_integer(name: str, value: object) -> int:
    """Return ``value`` as an int >= 1, or raise InputError for anything else."""
    whole = as_whole(value)
    if whole is None or whole < 1:
        raise InputError(f"{name} must be an integer >= 1, got {value!r}")
    return whole


def probability(name: str, value: object, most: float = 1.0) -> float:
    """Return ``value`` as a float in (0, ``most``), or raise InputError for anything else."""
    number = as_real(value)
    if number is None or not 0 < number < most:
        raise InputError(f"{name} must lie in (0, {most:g}), got {value!r}")
    return number


def sigma_of(value: object) -> float:
    """Return ``value`` as a standard deviation of noise, a finite float > 0, or raise InputError for anything else."""
    sigma = as_real(value)
    if sigma is None or sigma <= 0:
        raise InputError(f"sigma must be a finite number > 0 in [0, 1] pixel units, got {value!r}")
    return sigma


def least_whole(suffices: Callable[[int], bool], start: int = 1) -> int | None:
    """Return the least integer n >= ``start`` for which ``suffices(n)``, or None where it exceeds ``MOST``.

    Args:
        suffices: must be monotone: once true, it stays true.
        start: where the search begins.

    Cost:
        O(log n) calls of ``suffices``.
    """
    step, high = 1, start
    while not suffices(high):
        if high > MOST:
            return None
        high, step = high + step, 2 * step
    low = max(start, high - step // 2)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle + 1, high)
    return high


def _scalar(value: object) -> object:
    """Return the number in a NumPy scalar, 0-d array or 0-d tensor, and anything else unchanged."""
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", None) == 0 else value
