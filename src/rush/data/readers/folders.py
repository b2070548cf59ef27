"""A folder of image files: one sub-folder per class, optionally within one folder per split."""

import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from rush.data.labels import check_labels
from rush.data.readers.decoding import Encoded
from rush.data.readers.encoded import Block
from rush.data.readers.entries import describe_kind, list_entries, list_folders, warn_of_omitted
from rush.errors import DataError

SUFFIXES = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".bmp", ".gif"}
    | {".ppm", ".pgm", ".pbm", ".pnm", ".tif", ".tiff"}
)
"""Suffixes of the image files that are read."""
_UNREAD = frozenset(
    {".dib", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k", ".svg", ".ico", ".psd", ".tga", ".pcx", ".eps"}
    | {".exr", ".hdr", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".dcm", ".pfm"}
)
"""Suffixes of image files that are refused, since omitting them would lose images."""
_SPELLINGS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
    "unlabeled": ("unlabeled", "unlabelled"),
}
_SPLITS = {spelling: split for split, spellings in _SPELLINGS.items() for spelling in spellings}
_LIKE_SPLIT = re.compile(
    rf"((images?|data|dataset)[ ._-]?)?({'|'.join(_SPLITS)}|eval|evaluation|dev)"
    r"([ ._-]?(set|data|dataset|images?|imgs?|split|folder|part|\d+))*",
    re.IGNORECASE,
)


@dataclass(frozen=True, eq=False)
class FolderImages:
    """Image files by their paths relative to ``folder``, which are the ids; an ``EncodedImages``."""

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

    def blocks(self, limit: int) -> list[Block]:  # noqa: ARG002 - no file is held in memory
        return [Block(0, len(self), 0)]

    def read(self, rows: np.ndarray) -> Iterator[Encoded]:
        for row in rows.tolist():
            file = self.folder / self.names[row]
            yield str(file), file


def first_image(folder: Path, levels: int = 3) -> Path | None:
    """Return an image file at most ``levels`` below ``folder``, as in split/class/file, or None if there is none."""
    entries = list_entries(folder)
    for entry in entries:
        if Path(entry.name).suffix.lower() in SUFFIXES and entry.is_file():
            return Path(entry.path)
    if levels == 1:
        return None
    below = (first_image(Path(entry.path), levels - 1) for entry in entries if entry.is_dir())
    return next((image for image in below if image is not None), None)


def open_folder(folder: Path, split: str) -> FolderImages:
    """Find the images below the folder of ``split`` if ``folder`` is divided into splits, else all images below it.

    ``folder`` is divided if a sub-folder is named like a split in any case (train, training, val, valid, validation,
    test, testing, unlabeled, unlabelled) and holds folders itself, or if all sub-folders are so named. Classes are the
    names of the class folders of all splits, sorted as numbers if all are integers, else as text. A folder that holds
    images and no folders has no labels, and neither has "unlabeled". Links are followed. Hidden entries and those of
    the system are ignored. Ids are paths relative to ``folder``, with "/". The order is by class, then id. No image is
    opened. Other files are omitted with a DataWarning that counts them.

    Raises:
        DataError: the split is missing or a duplicate; a class or the whole split is empty; two classes differ only in
            case; an image lies beside the class folders, is not a file, has a format that is not read, or is reached
            twice by a link; a folder links to one above it, or looks like a split without being named like one.
    """
    splits = _split_folders(folder)
    top = _folder_of(split, splits, folder) if splits else folder
    unlabelled = bool(splits) and _SPLITS[top.name.lower()] == "unlabeled"
    class_folders = [] if unlabelled else list_folders(top)
    walk = _Walk(folder)
    if splits:
        walk.omit_beside(folder, {path.name for path in splits.values()})
    if not class_folders:
        names = walk.images_below(top)
        walk.finish()
        return FolderImages(folder, tuple(names), split, (), None)
    walk.omit_beside(top, {path.name for path in class_folders})
    classes = _classes([top] if not splits else [path for key, path in splits.items() if key != "unlabeled"])
    present = {path.name: path for path in class_folders}
    names, labels = [], []
    for label, name in enumerate(classes):
        members = walk.images_below(present[name]) if name in present else []
        names += members
        labels += [label] * len(members)
    walk.finish()
    checked = check_labels(np.array(labels), len(names), len(classes), str(top))
    return FolderImages(folder, tuple(names), split, classes, checked)


def _split_folders(folder: Path) -> dict[str, Path]:
    """Return the folders of the splits that ``folder`` is divided into, by split, or none if it is not divided."""
    folders = list_folders(folder)
    named = [path for path in folders if path.name.lower() in _SPLITS]
    divided = [path for path in named if _SPLITS[path.name.lower()] == "unlabeled" or list_folders(path)]
    if not divided and len(named) < len(folders):
        _check_unlike_splits(folders)
        return {}
    splits: dict[str, Path] = {}
    for path in named:
        other = splits.setdefault(_SPLITS[path.name.lower()], path)
        if other != path:
            raise DataError(f"{folder} holds {other.name} and {path.name}, which are one split; keep one of them")
    return {split: splits[split] for split in _SPELLINGS if split in splits}


def _check_unlike_splits(folders: Iterable[Path]) -> None:
    """Raise DataError for a folder that is named almost like a split and holds folders but no images."""
    for path in folders:
        if _LIKE_SPLIT.fullmatch(path.name) and list_folders(path) and not any(map(_is_image, list_entries(path))):
            raise DataError(
                f"{path} looks like a split, not like a class; name it train, val, test or unlabeled, or move its "
                "images up"
            )


def _folder_of(split: str, splits: dict[str, Path], folder: Path) -> Path:
    name = _SPLITS.get(split.lower(), split)
    if name not in splits:
        raise DataError(
            f"{folder} has no split {split!r}, only {', '.join(path.name for path in splits.values())}; "
            "give one of them or add the folder"
        )
    return splits[name]


def _classes(tops: Iterable[Path]) -> tuple[str, ...]:
    """Return the names of all class folders in order, or raise DataError if two differ only in case or encoding."""
    paths = {path.name: path for top in tops for path in list_folders(top)}
    normalized: dict[str, Path] = {}
    for name, path in paths.items():
        other = normalized.setdefault(unicodedata.normalize("NFC", name).casefold().strip(), path)
        if other != path:
            raise DataError(
                f"the class folders {other} and {path} differ in upper and lower case or in encoding alone; "
                "give one class one name"
            )
    if all(re.fullmatch(r"[+-]?[0-9]+", name) for name in paths):
        return tuple(sorted(paths, key=lambda name: (int(name), name)))
    return tuple(sorted(paths))


def _is_image(entry: os.DirEntry[str]) -> bool:
    return not entry.is_dir() and Path(entry.name).suffix.lower() in SUFFIXES


@dataclass
class _Walk:
    """The walk through a data set's folders.

    omitted: entries that are not read. names: all images found, as paths relative to ``base``. linked: names of the
    images that are reached by a link, by their real paths.
    """

    base: Path
    omitted: list[Path] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    linked: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.real_base = os.path.realpath(self.base)

    def images_below(self, folder: Path) -> list[str]:
        """Return every image file at any depth as a path relative to the base, sorted; raise DataError without any."""
        names: list[str] = []
        pending = [(folder, os.path.realpath(folder), frozenset[str]())]
        while pending:
            path, real, above = pending.pop()
            if real in above:
                raise DataError(f"{path} is a link to a folder above it; remove the link")
            for entry in list_entries(path):
                real_entry = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                if entry.is_dir():
                    pending.append((Path(entry.path), real_entry, above | {real}))
                elif self._takes(entry):
                    names.append(self._noted(Path(entry.path), real_entry))
        if not names:
            raise DataError(
                f"{folder} is empty: it holds no image file ({', '.join(sorted(SUFFIXES))}); "
                "add images or remove the folder"
            )
        self.names += names
        return sorted(names)

    def omit_beside(self, folder: Path, folders: set[str]) -> None:
        """Omit the entries of ``folder`` beside these folders, or raise DataError for an image among them."""
        for entry in list_entries(folder):
            if entry.name in folders:
                continue
            if not entry.is_dir() and self._takes(entry):
                raise DataError(
                    f"{entry.path} lies beside the folders {', '.join(sorted(folders)[:5])}, so that its class is not "
                    "known; move it into a class folder or remove it"
                )
            if entry.is_dir():
                self.omitted.append(Path(entry.path))

    def finish(self) -> None:
        """Warn about omitted entries, or raise DataError for an image that is reached twice."""
        if self.linked:
            linked = set(self.linked.values())
            for name in self.names:
                if name not in linked:
                    self._check_once(self.base / name, os.path.join(self.real_base, name))
        warn_of_omitted(self.base, self.omitted, "images, class folders or splits")

    def _takes(self, entry: os.DirEntry[str]) -> bool:
        """Return whether ``entry`` is an image file. If not, add it to ``omitted`` or raise DataError."""
        suffix = Path(entry.name).suffix.lower()
        if suffix in _UNREAD:
            raise DataError(f"{entry.path} is an image of a format that is not read; convert it to PNG or remove it")
        if suffix not in SUFFIXES:
            self.omitted.append(Path(entry.path))
            return False
        if not entry.is_file():
            raise DataError(f"{entry.path} is {describe_kind(Path(entry.path))}, not an image file; remove it")
        return True

    def _noted(self, path: Path, real: str) -> str:
        """Return the path relative to the base, and remember it if a link leads to it."""
        name = path.relative_to(self.base).as_posix()
        if real != os.path.join(self.real_base, name):
            self._check_once(path, real)
            self.linked[real] = name
        return name

    def _check_once(self, path: Path, real: str) -> None:
        if real in self.linked:
            raise DataError(
                f"{path} and {self.base / self.linked[real]} are the same file by a link; keep one, so that no image "
                "counts twice"
            )
