"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009) with fine labels, from the official files in Python or binary version."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from rush.data.images import ImageSet, numbered_ids
from rush.data.labels import check_class_names, check_labels
from rush.data.readers.archives import Archive, Parse, read_members, read_words
from rush.data.readers.pickles import read_plain_pickle
from rush.data.readers.resizing import resize_images
from rush.errors import DataError

SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class CifarVersion:
    """Layout of one official archive.

    files: member names by split, in official order. rows: number of images in each member, by split. names_file: the
    member with the class names. labels_key, names_key: keys of the pickled dictionaries, empty in the binary version.
    label_bytes: bytes before the 3,072 pixels in a record of the binary version. The last of them is the label.
    """

    archive: Archive
    files: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, int]
    names_file: str
    num_classes: int
    label_bytes: int = 1
    labels_key: str = ""
    names_key: str = ""


def _archive(stem: str, folder: str, md5: str) -> Archive:
    return Archive(f"{stem}.tar.gz", folder, f"https://www.cs.toronto.edu/~kriz/{stem}.tar.gz", md5)


def cifar10_versions() -> tuple[CifarVersion, ...]:
    """Return the Python and the binary version of CIFAR-10: five training files and a test file of 10,000 each."""
    batches = tuple(f"data_batch_{number}" for number in range(1, 6))
    files = {"train": batches, "test": ("test_batch",)}
    binary_files = {split: tuple(f"{name}.bin" for name in names) for split, names in files.items()}
    rows = {"train": 10_000, "test": 10_000}
    python = _archive("cifar-10-python", "cifar-10-batches-py", "c58f30108f718f92721af3b95e74349a")
    binary = _archive("cifar-10-binary", "cifar-10-batches-bin", "c32a1d4ab5d03f1284b67883e8d87530")
    return (
        CifarVersion(python, files, rows, "batches.meta", 10, labels_key="labels", names_key="label_names"),
        CifarVersion(binary, binary_files, rows, "batches.meta.txt", 10),
    )


def cifar100_versions() -> tuple[CifarVersion, ...]:
    """Return the Python and the binary version of CIFAR-100: a training file of 50,000 and a test file of 10,000."""
    files = {"train": ("train",), "test": ("test",)}
    binary_files = {"train": ("train.bin",), "test": ("test.bin",)}
    rows = {"train": 50_000, "test": 10_000}
    python = _archive("cifar-100-python", "cifar-100-python", "eb9058c3a382ffc7106e4002c42a8d85")
    binary = _archive("cifar-100-binary", "cifar-100-binary", "03b5dce01913d631647c71ecec9e9cb8")
    return (
        CifarVersion(python, files, rows, "meta", 100, labels_key="fine_labels", names_key="fine_label_names"),
        CifarVersion(binary, binary_files, rows, "fine_label_names.txt", 100, label_bytes=2),
    )


def read_cifar(name: str, version: CifarVersion, path: Path, split: str, size: int | None = None) -> ImageSet:
    """Read ``split`` from ``path``, an archive or extracted folder of ``version``. Ids are the official positions.

    The images are resampled to ``size`` x ``size`` pixels unless it is None.

    Raises:
        DataError: a file is missing, damaged, of a wrong size or mislabelled. The message names the file.
    """
    files = version.files[split]
    read_images = _read_pickled if version.labels_key else _read_binary
    parsers: dict[str, Parse[Any]] = {file: partial(read_images, version, version.rows[split]) for file in files}
    contents = read_members(version.archive, path, parsers | {version.names_file: partial(_read_names, version)})
    images = torch.from_numpy(np.concatenate([contents[file][0] for file in files]).reshape(-1, *SHAPE))
    labels = torch.cat([contents[file][1] for file in files])
    classes = contents[version.names_file]
    return ImageSet(resize_images(images, size), labels, classes, numbered_ids(split, len(images)), name, split)


def _read_pickled(version: CifarVersion, rows: int, file: IO[bytes], where: str) -> tuple[np.ndarray, torch.Tensor]:
    content = read_plain_pickle(file, where)
    pixels, labels = content.get("data"), content.get(version.labels_key)
    if not isinstance(pixels, np.ndarray) or not _is_list_of(labels, int):
        raise DataError(
            f"{where} has the keys {sorted(content)[:20]}, needs an array 'data' and integers '{version.labels_key}'; "
            f"{version.archive.remedy}"
        )
    if pixels.shape != (rows, _PIXELS):
        raise DataError(
            f"{where} holds pixels of shape {pixels.shape}, expected {(rows, _PIXELS)}; {version.archive.remedy}"
        )
    return pixels, check_labels(np.asarray(labels), rows, version.num_classes, where)


def _read_binary(version: CifarVersion, rows: int, file: IO[bytes], where: str) -> tuple[np.ndarray, torch.Tensor]:
    record = version.label_bytes + _PIXELS
    content = file.read(rows * record + 1)
    if len(content) != rows * record:
        size = f"more than {rows * record}" if len(content) > rows * record else len(content)
        raise DataError(
            f"{where} has {size} bytes, expected {rows * record} ({rows} records of {record}); {version.archive.remedy}"
        )
    table = np.frombuffer(content, np.uint8).reshape(rows, record)
    labels = check_labels(table[:, version.label_bytes - 1], rows, version.num_classes, where)
    return table[:, version.label_bytes :], labels


def _read_names(version: CifarVersion, file: IO[bytes], where: str) -> tuple[str, ...]:
    names: Any = read_plain_pickle(file, where).get(version.names_key) if version.names_key else read_words(file)
    if _is_list_of(names, bytes):
        names = [name.decode("latin1") for name in names]
    if not _is_list_of(names, str) or len(names) != version.num_classes:
        raise DataError(
            f"{where} names the classes {reprlib.repr(names)}, expected {version.num_classes} of them; "
            f"{version.archive.remedy}"
        )
    return check_class_names(names, where)


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)
