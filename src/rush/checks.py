"""The door for numbers, free of torch: whoever reads records needs the same checks as whoever makes them."""

import sys

from rush.errors import InputError


def check_positive_integer(name: str, value: object) -> None:
    """Raises InputError unless ``value`` is an integer >= 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"{name} must be an integer >= 1, got {value!r}")


def check_sigma(sigma: object) -> None:
    """Raises InputError unless ``sigma`` is a finite number > 0."""
    number = not isinstance(sigma, bool) and isinstance(sigma, int | float)
    if not number or not 0 < sigma < sys.float_info.max:  # type: ignore[operator]
        raise InputError(f"sigma must be a finite number > 0 in [0, 1] pixel units, got {sigma!r}")
