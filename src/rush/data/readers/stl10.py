"""STL-10 (Coates, Ng and Lee 2011), from the official binary archive or its extracted folder."""

from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from rush.data.images import ImageSet, numbered_ids
from rush.data.labels import check_class_names
from rush.data.readers.archives import Archive, Parse, read_members, read_words
from rush.data.readers.resizing import resize_images
from rush.errors import DataError

STL10 = Archive(
    "stl10_binary.tar.gz",
    "stl10_binary",
    "http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
    "91f7769df0f17e558f3565bffb0c7dfb",
)
ROWS = {"train": 5_000, "test": 8_000, "unlabeled": 100_000}
SIDE = 96
_NUM_CLASSES = 10
_CHUNK = 500  # images read at a time: 14 MB


def read_stl10(path: Path, split: str, size: int | None = None) -> ImageSet:
    """Read ``split`` from ``path``. Labels are 0..9 (None for "unlabeled"), and ids are the official positions.

    Args:
        path: the archive or the extracted folder.
        split: "train", "test" or "unlabeled".
        size: side of the images in pixels, resampled from 96 x 96. None keeps them as stored.

    Raises:
        DataError: a file is missing, damaged, of a wrong size or mislabelled. The message names the file.

    Cost: memory for the split (2.8 GB for "unlabeled" at 96 x 96) and one chunk.
    """
    rows = ROWS[split]
    parsers: dict[str, Parse[Any]] = {
        f"{split}_X.bin": partial(_read_pixels, rows, size),
        "class_names.txt": _read_names,
    }
    if split != "unlabeled":
        parsers[f"{split}_y.bin"] = partial(_read_labels, rows)
    contents = read_members(STL10, path, parsers)
    images, labels, classes = contents[f"{split}_X.bin"], contents.get(f"{split}_y.bin"), contents["class_names.txt"]
    return ImageSet(images, labels, classes, numbered_ids(split, rows), "stl10", split)


def _read_pixels(rows: int, side: int | None, file: IO[bytes], where: str) -> torch.Tensor:
    size = 3 * SIDE * SIDE
    images = torch.empty(rows, 3, side or SIDE, side or SIDE, dtype=torch.uint8)
    for start in range(0, rows, _CHUNK):
        count = min(_CHUNK, rows - start)
        content = file.read(count * size)
        if len(content) != count * size:
            raise _wrong_size(where, start * size + len(content), rows * size)
        columns = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(count, 3, SIDE, SIDE)
        images[start : start + count] = resize_images(columns.transpose(2, 3), side)  # stored column by column
    if file.read(1):
        raise _wrong_size(where, "more", rows * size)
    return images


def _read_labels(rows: int, file: IO[bytes], where: str) -> torch.Tensor:
    content = np.frombuffer(file.read(rows + 1), np.uint8)
    if len(content) != rows:
        raise _wrong_size(where, len(content) if len(content) < rows else "more", rows)
    if content.min() < 1 or content.max() > _NUM_CLASSES:
        raise DataError(
            f"{where} holds labels {content.min()}..{content.max()}, allowed are 1..{_NUM_CLASSES}; {STL10.remedy}"
        )
    return torch.from_numpy(content.astype(np.int64) - 1)


def _read_names(file: IO[bytes], where: str) -> tuple[str, ...]:
    names = check_class_names(read_words(file), where)
    if len(names) != _NUM_CLASSES:
        raise DataError(f"{where} names {len(names)} classes, expected {_NUM_CLASSES}; {STL10.remedy}")
    return names


def _wrong_size(where: str, num_bytes: int | str, expected: int) -> DataError:
    return DataError(f"{where} has {num_bytes} bytes, expected {expected}; {STL10.remedy}")
