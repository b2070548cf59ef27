"""A folder of image files: one sub-folder a class, with or without folders for the splits above them."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from rush.data.decoding import Encoded
from rush.data.images import check_labels
from rush.data.records import Block
from rush.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"})
SPLIT_FOLDERS = ("train", "val", "validation", "test", "unlabeled")


@dataclass(frozen=True, eq=False)
class FolderRecords:
    """Image files by their paths relative to ``folder``, which are the ids; see ``rush.data.records.Records``."""

    folder: Path
    names: tuple[str, ...]
    split: str
    classes: tuple[str, ...]
    labels: torch.Tensor | None

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    def __len__(self) -> int:
        return len(self.names)

    def ids(self) -> np.ndarray:
        return np.array(self.names)

    def files(self) -> list[Path]:
        return [self.folder / name for name in self.names]

    def blocks(self, limit: int) -> list[Block]:  # noqa: ARG002 - files are opened one by one, none is held
        return [Block(0, len(self), 0)]

    def read(self, rows: np.ndarray) -> Iterator[Encoded]:
        for row in rows.tolist():
            file = self.folder / self.names[row]
            yield str(file), file


def folder_records(folder: Path, split: str) -> FolderRecords:
    """The images below ``folder``/``split`` if ``folder`` is divided into splits, else all below it (for any split).

    Classes are the sorted names of the class folders over all splits; a folder that holds images and no folders is
    unlabelled. ids: the path relative to ``folder``, with "/"; order: by class, then id. No image is opened.
    Raises: DataError when the split is missing, or a class or everything is empty.
    """
    splits = _split_folders(folder)
    if splits and folder / split not in splits:
        raise DataError(
            f"{folder} has no split {split!r}, only {', '.join(path.name for path in splits)}; "
            "ask for one of them or add the folder"
        )
    top = folder / split if splits else folder
    class_folders = _subfolders(top)
    classes = (
        tuple(sorted({path.name for parent in splits or [top] for path in _subfolders(parent)}))
        if class_folders
        else ()
    )
    names: list[str] = []
    labels: list[int] = []
    for class_folder in class_folders or [top]:
        members = _image_files(class_folder, folder)
        names += members
        labels += [classes.index(class_folder.name) if class_folders else -1] * len(members)
    checked = check_labels(np.array(labels), len(names), len(classes), str(top)) if class_folders else None
    return FolderRecords(folder, tuple(names), split, classes, checked)


def _split_folders(folder: Path) -> list[Path]:
    """The sub-folders that are splits: named like one and, unlike a class of that name, holding folders."""
    named = [folder / name for name in SPLIT_FOLDERS if (folder / name).is_dir()]
    return [path for path in named if path.name == "unlabeled" or _subfolders(path)]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_files(folder: Path, base: Path) -> list[str]:
    """Every image file at any depth below ``folder``, as a path relative to ``base``, sorted. Raises: DataError without
    any."""
    found = [
        Path(parent, name).relative_to(base).as_posix()
        for parent, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
    ]
    if not found:
        raise DataError(
            f"{folder} is empty: it holds no image file ({', '.join(sorted(SUFFIXES))}); "
            "add images or remove the folder"
        )
    return sorted(found)
