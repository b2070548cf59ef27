"""NumPy .npz files of 8-bit images, with or without labels, class names, ids and splits."""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from rush.data.images import ImageSet, check_labels
from rush.errors import DataError

Arrays = dict[str, np.ndarray]


def load_npz(path: Path, split: str) -> ImageSet:
    """The arrays ``x_<split>`` and ``y_<split>`` of ``path``, else ``images`` and ``labels``, which serve any split.

    Images: uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with C in 1, 3. ``classes`` and, for an unnamed split, ``ids``
    are used where present; else the classes are "0".."K-1" with K - 1 the largest label in the file, and the ids
    "<split>-<row>".
    Raises: DataError naming the file when it is damaged, lacks the split, or holds another type, shape or label. Never
    unpickles.
    """
    pixels, labels = f"x_{split}", f"y_{split}"
    arrays, names = _read(path, pixels)
    if pixels not in arrays:
        pixels, labels = "images", "labels"
    if pixels not in arrays:
        raise DataError(
            f"{path} has the arrays {names}, none for split {split!r}; "
            f"name them 'images' (and 'labels', 'classes', 'ids') or 'x_{split}' (and 'y_{split}')"
        )
    images = _channels_first(arrays[pixels], f"{path}: {pixels}")
    classes = _classes(arrays, path)
    checked = (
        check_labels(_flat(arrays[labels]), len(images), len(classes), f"{path}: {labels}")
        if labels in arrays
        else None
    )
    ids = np.array([f"{split}-{row:05d}" for row in range(len(images))])
    if pixels == "images" and "ids" in arrays:
        ids = _named(arrays["ids"], len(images), path)
    return ImageSet(torch.from_numpy(images), checked, classes, ids, path.stem, split)


def npz_bytes(path: Path, split: str) -> int:
    """Bytes that the images of ``split`` take in memory, from the file's table of contents. Raises: DataError."""
    try:
        with zipfile.ZipFile(path) as file:
            sizes = {entry.filename: entry.file_size for entry in file.infolist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}; write plain arrays again with numpy.savez") from error
    return sizes.get(f"x_{split}.npy", sizes.get("images.npy", 0))


def _read(path: Path, pixels: str) -> tuple[Arrays, list[str]]:
    """The arrays that may be needed (the pixels of other splits are not), and the names of all."""
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path} is truncated or no .npz file; write it again with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as file:
            wanted = [
                key
                for key in file.files
                if key in (pixels, "images", "labels", "classes", "ids") or key.startswith("y_")
            ]
            return {key: file[key] for key in wanted}, sorted(file.files)
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; write plain arrays again with numpy.savez") from error


def _channels_first(images: np.ndarray, where: str) -> np.ndarray:
    if images.dtype != np.uint8:
        raise DataError(f"{where} is {images.dtype}, allowed is uint8 with values 0..255; convert it first")
    if images.size == 0:
        raise DataError(f"{where} is empty, of shape {images.shape}; store at least one image")
    if images.ndim == 3:
        return images[:, None]
    first, last = (images.ndim == 4 and images.shape[axis] in (1, 3) for axis in (1, -1))
    if first == last:
        raise DataError(
            f"{where} has shape {images.shape}, allowed are (N, H, W), (N, H, W, C) and (N, C, H, W) with C in 1, 3 "
            "and neither H nor W in the place of C; rearrange it"
        )
    return images if first else np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def _classes(arrays: Arrays, path: Path) -> tuple[str, ...]:
    if "classes" in arrays:
        if arrays["classes"].ndim != 1:
            raise DataError(
                f"{path}: classes has shape {arrays['classes'].shape}, expected (K,); store one name per class"
            )
        return tuple(arrays["classes"].astype(str).tolist())
    labels = [
        values
        for key, values in arrays.items()
        if (key == "labels" or key.startswith("y_")) and values.dtype.kind in "iu"
    ]
    return tuple(str(label) for label in range(max((int(values.max(initial=-1)) for values in labels), default=-1) + 1))


def _flat(labels: np.ndarray) -> np.ndarray:
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _named(ids: np.ndarray, total: int, path: Path) -> np.ndarray:
    if ids.shape != (total,):
        raise DataError(f"{path}: ids has shape {ids.shape}, expected ({total},); store one id per image")
    return ids.astype(str)
