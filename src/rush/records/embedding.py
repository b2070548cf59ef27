"""The map of an encoder's representations, as the record of pre-training holds it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from rush.records.record import Record


@dataclass(frozen=True, eq=False)
class Embedding:
    """Places of n test images on a map in two dimensions, the principal components of the clean ones.

    Attributes:
        labels: int64 (n,).
        clean: (n, 2).
        noisy: (n, 2), with one draw of the training noise, None if there is no noise.
        explained: share of the clean variance along each axis.
    """

    labels: np.ndarray
    clean: np.ndarray
    noisy: np.ndarray | None
    explained: tuple[float, float]


def read_embedding(record: Record) -> Embedding | None:
    """Return the map in the ``record`` of pre-training, or None if it has none, as in runs of older versions.

    Raises:
        RunError: it is damaged.
    """
    entry = record.fields.get("embedding")
    if entry is None:
        return None
    try:
        labels = np.array(entry["labels"], dtype=np.int64)
        clean = _places(entry["clean"], len(labels))
        noisy = None if entry["noisy"] is None else _places(entry["noisy"], len(labels))
        first, second = map(float, entry["explained"])
        if labels.ndim != 1 or not len(labels) or labels.min() < 0:
            raise ValueError("its labels must be classes >= 0")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise record.damaged(f"'embedding' must hold labels, clean, noisy and explained ({error})") from error
    return Embedding(labels, clean, noisy, (first, second))


def _places(entries: Any, number: int) -> np.ndarray:
    places = np.array(entries, dtype=np.float64)
    if places.shape != (number, 2) or not np.isfinite(places).all():
        raise ValueError(f"places must be {number} pairs of finite numbers")
    return places
