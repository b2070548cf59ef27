"""Optional packages and matplotlib, imported where they are used."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rush.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def optional(package: str, purpose: str) -> Any:
    """Return the module ``package``, or raise a MissingExtraError that states the ``purpose`` it is needed for."""
    try:
        return import_module(package)
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingExtraError(f"{purpose} needs {package} ({error}); pip install {package}") from error


def data_frame(columns: Mapping[str, Any]) -> Any:
    """Return a pandas DataFrame of these columns. Raises: MissingExtraError if pandas is not installed."""
    return optional("pandas", "to_pandas").DataFrame(dict(columns))


def axes_or_new(axes: Axes | None) -> Axes:
    """Return ``axes``, or those of a new figure of matplotlib's pyplot."""
    if axes is not None:
        return axes
    from matplotlib import pyplot

    return pyplot.subplots()[1]
