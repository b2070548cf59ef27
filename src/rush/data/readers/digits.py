"""The digits embedded in scikit-learn (Alpaydin and Kaynak 1998, UCI test part): 1,797 real 8x8 greyscale images."""

import hashlib

import numpy as np
import torch

from rush.data.images import ImageSet, stratified_counts

NUM_TEST = 400
_LARGEST = 16  # scikit-learn's pixels are whole numbers 0..16


def load_digits(split: str) -> ImageSet:
    """Return the "train" (1,397) or "test" (400) images, uint8 (N, 1, 8, 8), labels 0..9.

    Ids are scikit-learn's positions. The split is stratified and never changes: the test images of a class are those
    with the smallest salted SHA-256 of the id, so that it depends on no library's random numbers.
    """
    from sklearn import datasets

    source = datasets.load_digits()
    pixels = np.round(source.images * 255 / _LARGEST).astype(np.uint8)[:, None]
    labels = source.target.astype(np.int64)
    ids = np.array([f"digits-{row:04d}" for row in range(len(labels))])
    classes = tuple(map(str, source.target_names))
    images = ImageSet(torch.from_numpy(pixels), torch.from_numpy(labels), classes, ids, "digits", split)
    test = _test_rows(ids, labels)
    return images[test if split == "test" else np.setdiff1d(np.arange(len(labels)), test)]


def _test_rows(ids: np.ndarray, labels: np.ndarray) -> np.ndarray:
    order = np.argsort([hashlib.sha256(f"rush digits split 0: {name}".encode()).hexdigest() for name in ids])
    quotas = stratified_counts(np.bincount(labels), NUM_TEST)
    return np.sort(np.concatenate([order[labels[order] == label][:quota] for label, quota in enumerate(quotas)]))
