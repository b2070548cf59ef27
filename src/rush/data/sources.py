"""Where images come from: the data sets known by name, folders and files, all as an ImageSet."""

import difflib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rush.data.archives import Archive, download_archive, locate
from rush.data.arrays import load_npz
from rush.data.cifar import cifar10_versions, cifar100_versions, read_cifar
from rush.data.digits import load_digits
from rush.data.folders import load_folder
from rush.data.images import ImageSet
from rush.data.parquet import load_parquet, parquet_folder
from rush.data.stl10 import STL10, read_stl10
from rush.errors import DataError

SPLITS = {
    "digits": ("train", "test"),
    "cifar10": ("train", "test"),
    "cifar100": ("train", "test"),
    "stl10": ("train", "test", "unlabeled"),
}
ROOT_VARIABLE = "RUSH_DATA"
_SHAPES = {"cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "stl10": (3, 96, 96)}
_NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "stl10": 10}
Read = Callable[[Path, str], ImageSet]


def load_images(
    name_or_path: str | os.PathLike[str],
    split: str = "test",
    root: str | os.PathLike[str] | None = None,
    download: bool = True,
) -> ImageSet:
    """The ``split`` of a data set known by name, or of the images at a path.

    Names: "digits" (embedded in scikit-learn), "cifar10", "cifar100" (fine labels), "stl10" (also split "unlabeled").
    The last three are read from the official archives, their extracted folders or Hugging Face style parquet shards in
    ``root`` or ``root``/name; where there is nothing and ``download`` is true, the official archive is downloaded to
    ``root``. ``root``, an existing folder, defaults to the environment variable RUSH_DATA, else to the user's cache
    folder. Paths (relative ones are looked up in ``root`` if given): a folder of class folders, a folder of parquet
    shards, an .npz file.

    Raises: DataError, naming the file and the remedy, when the name or split is unknown, or the data are missing,
    truncated, altered, of a wrong shape, mislabelled or empty.
    """
    name = os.fspath(name_or_path)
    if isinstance(name_or_path, str) and name in SPLITS:
        if split not in SPLITS[name]:
            raise DataError(f"{name} has no split {split!r}; allowed are {', '.join(SPLITS[name])}")
        return load_digits(split) if name == "digits" else _load_official(name, split, _root(root), download)
    path = Path(root or "").expanduser() / Path(name).expanduser()
    if path.is_dir():
        return _load_path(path, split)
    if path.is_file() and path.suffix == ".npz":
        return load_npz(path, split)
    raise _unknown(name, path)


def _root(root: str | os.PathLike[str] | None) -> Path:
    if root is not None:
        folder = Path(root).expanduser().absolute()
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; pass one that exists (an empty one takes a download), or none")
        return folder
    if os.environ.get(ROOT_VARIABLE):
        return Path(os.environ[ROOT_VARIABLE]).expanduser().absolute()
    import pooch

    return Path(pooch.os_cache("rush"))


def _load_official(name: str, split: str, root: Path, may_download: bool) -> ImageSet:
    readers = _official_readers(name)
    located = locate(list(readers), root, name)
    if located is None:
        shards = parquet_folder(root) or parquet_folder(root / name)
        if shards is not None:
            return _checked(load_parquet(shards, split, name), name, shards)
        if not may_download:
            known = ", ".join(f"{archive.file}, {archive.folder}" for archive in readers)
            raise DataError(
                f"{root} holds no {name}: looked there and in {root / name} for {known} and parquet shards; "
                f"put one there, pass another root, set {ROOT_VARIABLE}, or pass download=True"
            )
        preferred = next(iter(readers))
        located = preferred, download_archive(preferred, root)
    archive, path = located
    return readers[archive](path, split)


def _official_readers(name: str) -> dict[Archive, Read]:
    """What reads each official archive of ``name``; the first is the one to download."""
    if name == "stl10":
        return {STL10: read_stl10}
    versions = cifar10_versions() if name == "cifar10" else cifar100_versions()
    return {version.archive: partial(read_cifar, name, version) for version in versions}


def _checked(images: ImageSet, name: str, folder: Path) -> ImageSet:
    shape = tuple(images.images.shape[1:])
    if shape != _SHAPES[name] or images.num_classes not in (0, _NUM_CLASSES[name]):
        raise DataError(
            f"{folder} holds images of shape {shape} in {images.num_classes} classes, but {name} has {_SHAPES[name]} "
            f"in {_NUM_CLASSES[name]}; pass the right root, or the folder itself instead of {name!r}"
        )
    return images


def _load_path(folder: Path, split: str) -> ImageSet:
    shards = parquet_folder(folder)
    return load_folder(folder, split) if shards is None else load_parquet(shards, split, folder.resolve().name)


def _unknown(name: str, path: Path) -> DataError:
    allowed = f"allowed are {', '.join(SPLITS)}, a folder of class folders, a folder of parquet shards, or an .npz file"
    if path.is_file():
        return DataError(f"{path} is a {path.suffix or 'nameless'} file; {allowed}")
    close = difflib.get_close_matches(name.lower(), SPLITS, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else ""
    return DataError(f"{name!r} is no known data set and {path.absolute()} does not exist; {allowed}{guess}")
