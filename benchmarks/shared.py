"""What several benchmarks use: a run's smoothed classifier, labels, and arrays kept in a cache."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import rush
from rush.runtime.files import write_atomically


def smoothed_model(run: Path, compiled: bool = True) -> rush.SmoothedClassifier:
    model = rush.load(run, compiled=compiled)
    if not isinstance(model, rush.SmoothedClassifier):
        raise SystemExit(f"{run} holds a classifier that is not smoothed; give the run of a smoothed one")
    return model


def labels_of(images: rush.ImageSet) -> Tensor:
    """Labels (N,) of a set that has them, as the test split of CIFAR-10 does."""
    assert images.labels is not None
    return images.labels


def save_arrays(path: Path, **arrays: NDArray[np.generic] | float) -> None:
    def write(target: Path) -> None:
        with open(target, "wb") as file:  # numpy would add a suffix to a name
            np.savez(file, allow_pickle=False, **{name: np.asarray(array) for name, array in arrays.items()})

    write_atomically(path, write)
