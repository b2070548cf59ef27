"""NumPy .npz files of 8-bit images, with or without labels, class names, ids and splits."""

import math
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import torch

from rush.data.images import ImageSet
from rush.data.labels import MAX_CLASSES, check_class_names, check_labels, decode_texts, number_classes
from rush.data.readers.entries import describe_kind
from rush.errors import DataError

_FREE_BYTES, _MOST_EXPANSION = 1 << 28, 200  # an array of more bytes must not be packed more densely than this
Arrays = dict[str, np.ndarray]
Content = TypeVar("Content")


def load_npz(path: Path, split: str) -> ImageSet:
    """The arrays ``x_<split>`` and ``y_<split>`` of ``path``, else ``images`` and ``labels``, which serve any split.

    Images: uint8 (N, H, W), (N, H, W, C) or (N, C, H, W) with C in 1, 3. Labels: integers (N,) or (N, 1). ``classes``
    and, for an unnamed split, ``ids`` are used where present, bytes being UTF-8; else the classes are "0".."K-1" with
    K - 1 the largest label in the file, and the ids "<split>-<row>".
    Raises: DataError naming the file when it is damaged, lacks the split, or holds another type, shape or label. Never
    unpickles.
    """
    pixels, labels = f"x_{split}", f"y_{split}"
    names = array_names(path)
    if pixels not in names:
        pixels, labels = "images", "labels"
    if pixels not in names:
        raise DataError(
            f"{path} has the arrays {names}, none for split {split!r}; "
            f"name them 'images' (and 'labels', 'classes', 'ids') or 'x_{split}' (and 'y_{split}')"
        )
    # The labels of all splits are read, since they share their classes; the pixels of the others are not.
    arrays = read_arrays(path, lambda key: key in (pixels, "labels", "classes", "ids") or key.startswith("y_"))
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
    sizes = _reading(path, lambda file: {entry.filename: entry.file_size for entry in file.infolist()})
    return sizes.get(f"x_{split}.npy", sizes.get("images.npy", 0))


def array_names(path: Path) -> list[str]:
    """Return the sorted names of the arrays in the .npz file at ``path``. Raises: DataError when it is none."""
    return _reading(path, lambda file: sorted(name.removesuffix(".npy") for name in file.namelist()))


def read_arrays(path: Path, wanted: Callable[[str], bool]) -> Arrays:
    """Return the arrays of the .npz file at ``path`` whose names are ``wanted``, by name.

    What a header claims is held against the bytes that the file has for it before anything is allocated.
    Raises: DataError naming the file and the array that is damaged, holds Python objects or fields, or is packed more
    densely than images are.
    """

    def read(file: zipfile.ZipFile) -> Arrays:
        entries = {entry.filename.removesuffix(".npy"): entry for entry in file.infolist()}
        return {key: _read_array(file, entry, f"{path}: {key}") for key, entry in entries.items() if wanted(key)}

    return _reading(path, read)


def _reading(path: Path, read: Callable[[zipfile.ZipFile], Content]) -> Content:
    """Return what ``read`` makes of the opened file; whatever a damaged one raises becomes a DataError naming it."""
    if not path.is_file():
        raise DataError(f"{path} is {describe_kind(path)}, not an .npz file; give the path of one")
    if not zipfile.is_zipfile(path):
        raise DataError(
            f"{path} is truncated or no .npz file and cannot be read as arrays; write it again with numpy.savez"
        )
    try:
        with zipfile.ZipFile(path) as file:
            return read(file)
    except DataError:
        raise
    except Exception as error:  # zipfile, zlib and numpy raise many kinds on damaged files
        raise DataError(
            f"{path} cannot be read: {error or type(error).__name__}; write plain arrays again with numpy.savez"
        ) from error


def _read_array(file: zipfile.ZipFile, entry: zipfile.ZipInfo, where: str) -> np.ndarray:
    with file.open(entry) as stream:
        _check_header(stream, entry, where)
    with file.open(entry) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _check_header(stream: IO[bytes], entry: zipfile.ZipInfo, where: str) -> None:
    """Raise DataError unless the array is plain and as large as the bytes that are stored for it."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise DataError(f"{where} has version {version} of the .npy format, allowed are {', '.join(map(str, readers))}")
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
            f"{where} would grow from {entry.compress_size} to {claimed} bytes, more than {_MOST_EXPANSION}-fold; "
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
            [part for key, part in arrays.items() if key == "labels" or key.startswith("y_")], f"{path}"
        )
    classes = arrays["classes"]
    if classes.ndim != 1 or len(classes) > MAX_CLASSES:
        raise DataError(
            f"{path}: classes has shape {classes.shape}, expected (K,), K <= {MAX_CLASSES}; store one name per class"
        )
    return check_class_names(decode_texts(classes, "classes", f"{path}"), f"{path}")


def _flat(labels: np.ndarray) -> np.ndarray:
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _named(ids: np.ndarray, total: int, path: Path) -> np.ndarray:
    if ids.shape != (total,):
        raise DataError(f"{path}: ids has shape {ids.shape}, expected ({total},); store one id per image")
    texts = decode_texts(ids, "ids", f"{path}")
    if len(set(texts)) < total:
        repeated = next(text for text, count in Counter(texts).items() if count > 1)
        raise DataError(f"{path}: duplicate id {repeated[:100]!r}; give every image an id of its own, or drop the ids")
    return np.array(texts, dtype=str)
