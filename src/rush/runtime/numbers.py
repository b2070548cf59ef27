"""Numbers that users give: converted once to plain Python numbers, and searches for the least one that suffices."""

import math
from collections.abc import Callable
from numbers import Integral, Real

from rush.errors import InputError

MOST = 2**40  # where a search for the least number ends; more samples than any run draws


def as_whole(value: object) -> int | None:
    """``value`` as an int: an integer of Python or NumPy, or a 0-d array or tensor of one; None for anything else.

    Booleans and floats are no integers, whole ones such as 2.0 included.
    """
    number = _scalar(value)
    return int(number) if isinstance(number, Integral) and not isinstance(number, bool) else None


def as_real(value: object) -> float | None:
    """``value`` as a finite float: a number of Python or NumPy, a Fraction, or a 0-d array or tensor of one.

    None for anything else, among it booleans, text, complex numbers, NaN and the infinities.
    """
    number = _scalar(value)
    if not isinstance(number, Real) or isinstance(number, bool):
        return None
    try:
        real = float(number)
    except OverflowError:
        return None
    return real if math.isfinite(real) else None


def positive_integer(name: str, value: object) -> int:
    """``value`` as a plain integer >= 1. Raises: InputError for anything else."""
    whole = as_whole(value)
    if whole is None or whole < 1:
        raise InputError(f"{name} must be an integer >= 1, got {value!r}")
    return whole


def probability(name: str, value: object, most: float = 1.0) -> float:
    """``value`` as a plain float in (0, ``most``). Raises: InputError for anything else."""
    number = as_real(value)
    if number is None or not 0 < number < most:
        raise InputError(f"{name} must lie in (0, {most:g}), got {value!r}")
    return number


def sigma_of(value: object) -> float:
    """``value`` as the standard deviation of noise, a plain finite float > 0. Raises: InputError for anything else."""
    sigma = as_real(value)
    if sigma is None or sigma <= 0:
        raise InputError(f"sigma must be a finite number > 0 in [0, 1] pixel units, got {value!r}")
    return sigma


def least_whole(suffices: Callable[[int], bool], start: int = 1) -> int | None:
    """The least integer >= ``start`` for which ``suffices``, which must stay true from there on; None beyond
    ``MOST``."""
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
    """What a NumPy scalar, a 0-d array or a 0-d tensor holds; anything else as it is."""
    item = getattr(value, "item", None)
    return item() if callable(item) and getattr(value, "ndim", None) == 0 else value
