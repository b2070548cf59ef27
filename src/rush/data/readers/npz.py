"""NumPy .npz files: 8-bit images with optional labels, class names, ids and splits, and arrays in general."""

import math
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch

from rush.data.images import ImageSet, numbered_ids
from rush.data.labels import MAX_CLASSES, check_class_names, check_labels, decode_texts, number_classes
from rush.data.readers.damage import name_damage
from rush.data.readers.entries import describe_kind
from rush.errors import DataError

_FREE_BYTES, _MOST_EXPANSION = 1 << 28, 200  # a larger array may be compressed by this factor at most
Arrays = dict[str, np.ndarray]


def load_npz(path: Path, split: str) -> ImageSet:
    """Load the arrays ``x_<split>`` and ``y_<split>``, or else ``images`` and ``labels``, which serve any split.

    Images are uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with C in 1, 3. Labels are integers (N,) or (N, 1). The
    array ``classes`` and, for ``images``, the array ``ids`` are used where present, bytes being decoded as UTF-8.
    Otherwise the classes are "0".."K-1", where K - 1 is the largest label in the file, and the ids "<split>-<row>".

    Raises:
        DataError: the file is damaged, lacks the split, needs unpickling, or holds a wrong type, shape or label. The
            message names the file.
    """
    names = array_names(path)
    pixels, labels = (f"x_{split}", f"y_{split}") if f"x_{split}" in names else ("images", "labels")
    if pixels not in names:
        raise DataError(
            f"{path} has the arrays {names}, none for split {split!r}; "
            f"name them 'images' (and 'labels', 'classes', 'ids') or 'x_{split}' (and 'y_{split}')"
        )
    # The labels of all splits are read, since they share their classes; the pixels of the others are not.
    arrays = read_arrays(path, lambda key: key in (pixels, "labels", "classes", "ids") or key.startswith("y_"))
    images = _channels_first(arrays[pixels], f"{path}: {pixels}")
    classes = _classes(arrays, path)
    checked = None
    if labels in arrays:
        checked = check_labels(_flat(arrays[labels]), len(images), len(classes), f"{path}: {labels}")
    has_ids = pixels == "images" and "ids" in arrays
    ids = _checked_ids(arrays["ids"], len(images), path) if has_ids else numbered_ids(split, len(images))
    return ImageSet(torch.from_numpy(images), checked, classes, ids, path.stem, split)


def npz_bytes(path: Path, split: str) -> int:
    """Return the bytes that the images of ``split`` take in memory, from the file's table of contents.

    Raises:
        DataError: ``path`` is not a readable .npz file.
    """
    with _opened(path) as file:
        sizes = {entry.filename: entry.file_size for entry in file.infolist()}
    return sizes.get(f"x_{split}.npy", sizes.get("images.npy", 0))


def array_names(path: Path) -> list[str]:
    """Return the sorted names of the arrays in the .npz file at ``path``, or raise as ``npz_bytes``."""
    with _opened(path) as file:
        return sorted(name.removesuffix(".npy") for name in file.namelist())


def read_arrays(path: Path, selected: Callable[[str], bool]) -> Arrays:
    """Read the arrays of the .npz file at ``path`` whose names are ``selected`` and return them by name.

    The size that a header claims is compared with the bytes stored for it before anything is allocated.

    Raises:
        DataError: the file or an array is damaged, holds Python objects or fields, or is compressed more than images
            can be. The message names the file or array.
    """
    with _opened(path) as file:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in file.infolist()}
        return {key: _read_array(file, entry, f"{path}: {key}") for key, entry in entries.items() if selected(key)}


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open the file. Whatever a damaged one raises becomes a DataError that names it."""
    if not path.is_file():
        raise DataError(f"{path} is {describe_kind(path)}, not an .npz file; give the path of one")
    if not zipfile.is_zipfile(path):
        raise DataError(
            f"{path} is truncated or not an .npz file and cannot be read as arrays; write it again with numpy.savez"
        )
    remedy = "write plain arrays again with numpy.savez"
    with name_damage(f"{path} cannot be read", remedy), zipfile.ZipFile(path) as file:
        yield file


def _read_array(file: zipfile.ZipFile, entry: zipfile.ZipInfo, where: str) -> np.ndarray:
    with file.open(entry) as stream:
        _check_header(stream, entry, where)
    with file.open(entry) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _check_header(stream: IO[bytes], entry: zipfile.ZipInfo, where: str) -> None:
    """Raise DataError unless the array is plain and as large as the bytes stored for it."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise DataError(
            f"{where} has version {version} of the .npy format, allowed are {', '.join(map(str, readers))}; write it "
            "again with numpy.savez"
        )
    shape, _, dtype = readers[version](stream)
    if dtype.hasobject or dtype.fields is not None or dtype.kind not in "biufUS":
        raise DataError(
            f"{where} cannot be read: it holds {dtype}, allowed are plain numbers and text; store it as one of these"
        )
    claimed, stored = math.prod(shape) * dtype.itemsize, entry.file_size - stream.tell()
    if claimed != stored or min(shape, default=0) < 0:
        raise DataError(
            f"{where} cannot be read: it claims {dtype} {shape}, {claimed} bytes, and has {stored}; write it again "
            "with numpy.savez"
        )
    if claimed > max(_FREE_BYTES, _MOST_EXPANSION * entry.compress_size):
        raise DataError(
            f"{where} would expand from {entry.compress_size} to {claimed} bytes, by more than {_MOST_EXPANSION}; "
            "write it again with numpy.savez, which does not compress"
        )


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
    if "classes" not in arrays:
        return number_classes(
            [part for key, part in arrays.items() if key == "labels" or key.startswith("y_")], str(path)
        )
    classes = arrays["classes"]
    if classes.ndim != 1 or len(classes) > MAX_CLASSES:
        raise DataError(
            f"{path}: classes has shape {classes.shape}, expected (K,), K <= {MAX_CLASSES}; store one name per class"
        )
    return check_class_names(decode_texts(classes, "classes", str(path)), str(path))


def _flat(labels: np.ndarray) -> np.ndarray:
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _checked_ids(ids: np.ndarray, total: int, path: Path) -> np.ndarray:
    if ids.shape != (total,):
        raise DataError(f"{path}: ids has shape {ids.shape}, expected ({total},); store one id per image")
    texts = decode_texts(ids, "ids", str(path))
    text, count = Counter(texts).most_common(1)[0]
    if count > 1:
        raise DataError(f"{path}: duplicate id {text[:100]!r}; give every image a different id, or drop the ids")
    return np.array(texts, dtype=str)
