"""Which of N images an index means."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch

from rush.errors import InputError

Index: TypeAlias = slice | Sequence[int] | Sequence[bool] | np.ndarray | torch.Tensor


def positions(index: Index, total: int) -> slice | np.ndarray:
    """``index`` as a slice with a positive step or as int64 positions in 0..N-1, N = ``total``; at least one.

    Raises: InputError for anything but a slice, integers in -N..N-1 or a boolean mask (N,), or if nothing is selected.
    """
    if isinstance(index, slice):
        chosen = range(total)[index]
        if not chosen:
            raise InputError(f"{index} selects none of {total} images")
        return index if chosen.step > 0 else np.array(chosen)
    array = index.detach().cpu().numpy() if isinstance(index, torch.Tensor) else np.asarray(index)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iub":
        raise InputError(
            f"index must be a slice, a non-empty 1-d list of integers or a boolean mask of {total}, "
            f"got {type(index).__name__} of shape {array.shape}, {array.dtype}; for one image use images[i : i + 1]"
        )
    if array.dtype.kind == "b":
        return _masked(array, total)
    if array.min() < -total or array.max() >= total:
        raise InputError(
            f"index must lie in {-total}..{total - 1} for {total} images, got {array.min()}..{array.max()}"
        )
    return array.astype(np.int64) % total


def _masked(mask: np.ndarray, total: int) -> np.ndarray:
    if len(mask) != total or not mask.any():
        raise InputError(
            f"a mask must have {total} entries and select at least one, got {len(mask)} with {int(mask.sum())} true"
        )
    return np.flatnonzero(mask)
