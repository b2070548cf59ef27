"""Selection of rows: what an index selects of N images, and how ascending rows fall into consecutive parts."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
import torch

from rush.errors import InputError

Index: TypeAlias = slice | Sequence[int] | Sequence[bool] | np.ndarray | torch.Tensor


def positions(index: Index, total: int) -> slice | np.ndarray:
    """Return what ``index`` selects of ``total`` images, at least one.

    Args:
        index: a slice, integers in -total..total - 1, or a boolean mask (total,).
        total: number of images.

    Returns:
        A slice with a positive step, or int64 positions in 0..total - 1.

    Raises:
        InputError: ``index`` is anything else, or selects nothing.
    """
    if isinstance(index, slice):
        selected = range(total)[index]
        if not selected:
            raise InputError(f"{index} selects none of {total} images; give a slice that selects at least one")
        return index if selected.step > 0 else np.array(selected)
    array = index.detach().cpu().numpy() if isinstance(index, torch.Tensor) else np.asarray(index)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iub":
        raise InputError(
            f"index must be a slice, a non-empty 1-d list of integers or a boolean mask of {total}, "
            f"got {type(index).__name__} of shape {array.shape}, {array.dtype}; for one image use images[i : i + 1]"
        )
    if array.dtype.kind == "b":
        if len(array) != total or not array.any():
            raise InputError(
                f"a mask must have {total} entries and select at least one, got {len(array)} with {int(array.sum())} "
                "true"
            )
        return np.flatnonzero(array)
    if array.min() < -total or array.max() >= total:
        raise InputError(
            f"index must lie in {-total}..{total - 1} for {total} images, got {array.min()}..{array.max()}"
        )
    return array.astype(np.int64) % total


def rows_within(rows: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return those of the ascending ``rows`` (n,) that lie in start..stop - 1."""
    return rows[slice(*np.searchsorted(rows, [start, stop]))]


def split_rows(rows: np.ndarray, lengths: Iterable[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the number of each consecutive part that has some of ``rows``, and these rows counted from its start.

    Args:
        rows: ascending, (n,), counted over all parts.
        lengths: number of rows of each part.
    """
    start = 0
    for number, length in enumerate(lengths):
        rows_of_part = rows_within(rows, start, start + length) - start
        if rows_of_part.size:
            yield number, rows_of_part
        start += length
