"""A folder of image files: one sub-folder a class, with or without folders for the splits above them."""

import os
from pathlib import Path

import numpy as np

from rush.data.decoding import decode_images
from rush.data.images import ImageSet, check_labels
from rush.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"})
SPLIT_FOLDERS = ("train", "val", "validation", "test", "unlabeled")


def load_folder(folder: Path, split: str) -> ImageSet:
    """The images below ``folder``/``split`` if ``folder`` is divided into splits, else all below it (for any split).

    Classes are the sorted names of the class folders over all splits; a folder that holds images and no folders is
    unlabelled. ids: the path relative to ``folder``, with "/"; order: by class, then id.
    Raises: DataError when the split is missing, a class or everything is empty, or an image is damaged or of another
    size.
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
    files: list[Path] = []
    labels: list[int] = []
    for class_folder in class_folders or [top]:
        members = _image_files(class_folder)
        files += members
        labels += [classes.index(class_folder.name) if class_folders else -1] * len(members)
    images = decode_images(((str(file), file) for file in files), len(files))
    ids = np.array([file.relative_to(folder).as_posix() for file in files])
    checked = check_labels(np.array(labels), len(files), len(classes), str(top)) if class_folders else None
    return ImageSet(images, checked, classes, ids, folder.resolve().name, split)


def _split_folders(folder: Path) -> list[Path]:
    """The sub-folders that are splits: named like one and, unlike a class of that name, holding folders."""
    named = [folder / name for name in SPLIT_FOLDERS if (folder / name).is_dir()]
    return [path for path in named if path.name == "unlabeled" or _subfolders(path)]


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_files(folder: Path) -> list[Path]:
    """Every image file at any depth below ``folder``, sorted by its path. Raises: DataError without any."""
    found = [
        Path(parent) / name
        for parent, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
    ]
    if not found:
        raise DataError(
            f"{folder} is empty: it holds no image file ({', '.join(sorted(SUFFIXES))}); "
            "add images or remove the folder"
        )
    return sorted(found, key=lambda path: path.relative_to(folder).as_posix())
