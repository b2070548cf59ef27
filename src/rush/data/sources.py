"""Where images come from: the data sets known by name, folders and files, all as an ImageSet."""

import difflib
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from rush.data.images import ImageSet, concatenate
from rush.data.labels import check_several_classes
from rush.data.readers.archives import Archive, download_archive, locate
from rush.data.readers.cifar import CifarVersion, cifar10_versions, cifar100_versions, read_cifar
from rush.data.readers.decoding import decode
from rush.data.readers.digits import NUM_TEST, load_digits
from rush.data.readers.entries import describe_kind
from rush.data.readers.folders import folder_records
from rush.data.readers.npz import load_npz, npz_bytes
from rush.data.readers.parquet import parquet_folder, parquet_records
from rush.data.readers.records import Records, decoded, join
from rush.data.readers.resizing import check_size, resize_images
from rush.data.readers.roots import Root, joined_names, root_folders, without_repeats
from rush.data.readers.stl10 import ROWS, STL10, read_stl10
from rush.errors import DataError

SPLITS: dict[str, dict[str, int]] = {
    "digits": {"train": 1_397, "test": NUM_TEST},
    "cifar10": {"train": 50_000, "test": 10_000},
    "cifar100": {"train": 50_000, "test": 10_000},
    "stl10": ROWS,
}
"""The data sets known by name, their splits and how many images each has."""
ROOT_VARIABLE = "RUSH_DATA"
SHAPES = {"digits": (1, 8, 8), "cifar10": (3, 32, 32), "cifar100": (3, 32, 32), "stl10": (3, 96, 96)}
NUM_CLASSES = {"cifar10": 10, "cifar100": 100, "stl10": 10}
Read = Callable[[Path, str, int | None], ImageSet]


def load_images(
    name_or_path: str | os.PathLike[str],
    split: str = "test",
    root: Root = None,
    download: bool = True,
    *,
    size: int | None = None,
) -> ImageSet:
    """The ``split`` of a data set known by name, or of the images at a path.

    Names: "digits" (embedded in scikit-learn), "cifar10", "cifar100" (fine labels), "stl10" (also split "unlabeled").
    The last three are read from the official archives, their extracted folders or Hugging Face style parquet shards in
    ``root`` or ``root``/name; where there is nothing and ``download`` is true, the official archive is downloaded to
    ``root``. ``root``, an existing folder, defaults to the environment variable RUSH_DATA, else to the user's cache
    folder. Paths (relative ones are looked up in ``root`` if given): a folder of class folders, a folder of parquet
    shards, an .npz file.

    ``root`` may also be a list of folders. Shards are joined as if all lay in one folder, and each of the folders must
    hold some. Of official archives the first found is read, and a download goes to the first folder. Class folders and
    .npz files must lie in one of the folders alone.

    ``split``: one, or several joined by "+" ("train+unlabeled"): one after the other, without labels if any has none,
    ids as "<split>/<id>" where they would not differ. ``size``: None for images as they are stored, which must share
    one size; else each image's central square, resampled to size x size pixels.

    Raises: DataError, naming the file and the remedy, when the name or split is unknown, or the data are missing,
    truncated, altered, of a wrong shape, mislabelled, empty or of one class only. InputError for a wrong ``size`` or
    ``root``.
    """
    check_size(size)
    images = _load(name_or_path, split.split("+"), root, download, size)
    check_several_classes(images.labels, images.classes, split, f"{os.fspath(name_or_path)} ({split})")
    return images


def open_records(name_or_path: str | os.PathLike[str], split: str, root: Root = None) -> Records | None:
    """The encoded images of a split (or several, joined by "+"), to be read as needed; None where there are no single
    images to read: in official archives, .npz files and the digits.

    Raises: DataError as ``load_images``.
    """
    name, parts = os.fspath(name_or_path), split.split("+")
    if _is_known(name_or_path):
        _check_splits(name, parts)
        return None if name == "digits" else _official_records(name, parts, _roots(root))
    paths = _paths(name, root)
    if paths[0].is_dir():
        return join([_folder_records(paths, part) for part in parts])
    _npz(name, paths)
    return None


def decoded_bytes(
    name_or_path: str | os.PathLike[str],
    split: str,
    root: Root = None,
    *,
    size: int | None = None,
) -> int:
    """About how much memory ``load_images`` would take for the images of ``split``, in bytes.

    Shards and folders: their number times the size of the first image. Nothing else is decoded or downloaded.
    Raises: DataError as ``load_images``.
    """
    records = open_records(name_or_path, split, root)
    if records is not None:
        return len(records) * decode(next(records.read(np.arange(1))), size).size
    name, parts = os.fspath(name_or_path), split.split("+")
    if _is_known(name_or_path):
        channels, stored, _ = SHAPES[name]
        return sum(SPLITS[name][part] for part in parts) * channels * (size or stored) ** 2
    path = _npz(name, _paths(name, root))
    return sum(npz_bytes(path, part) for part in parts)


def _load(
    name_or_path: str | os.PathLike[str],
    parts: Sequence[str],
    root: Root,
    download: bool,
    size: int | None,
) -> ImageSet:
    name = os.fspath(name_or_path)
    if _is_known(name_or_path):
        _check_splits(name, parts)
        if name == "digits":
            return concatenate([_resized(load_digits(part), size) for part in parts])
        return _load_official(name, parts, _roots(root), download, size)
    paths = _paths(name, root)
    if paths[0].is_dir():
        return decoded(join([_folder_records(paths, part) for part in parts]), size)
    return concatenate([_resized(load_npz(_npz(name, paths), part), size) for part in parts])


def _is_known(name_or_path: str | os.PathLike[str]) -> bool:
    return isinstance(name_or_path, str) and name_or_path in SPLITS


def _paths(name: str, root: Root) -> list[Path]:
    """Return what ``name`` stands for in the folders of ``root``: one path, or several folders of shards.

    Raises: DataError where several of them hold something that cannot be joined, or only some hold shards.
    """
    paths = without_repeats(_path(name, folder) for folder in root_folders(root) or [""])
    bare = [path for path in paths if not path.is_dir() or parquet_folder(path) is None]
    if not bare:
        return paths
    if len(bare) < len(paths):
        raise _without_shards(name, bare[0], next(path for path in paths if path not in bare))
    existing = [path for path in paths if path.exists()]
    if len(existing) > 1:
        raise DataError(
            f"{joined_names(existing)} exist, but only folders of parquet shards are joined; name the one to read"
        )
    return existing or paths


def _without_shards(name: str, bare: Path, other: Path) -> DataError:
    return DataError(
        f"{bare} holds no parquet shards of {name}, but {other} does; put shards there, or leave it out of the folders"
    )


def _path(name: str, root: str | os.PathLike[str]) -> Path:
    """Return the path that ``name`` stands for in ``root``. Raise DataError where the system takes no such path."""
    try:
        path = Path(root).expanduser() / Path(name).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(path)
    except (OSError, ValueError, RuntimeError) as error:  # a RuntimeError for a user who is not known
        raise DataError(f"{name[:100]!r} cannot be looked up as a path: {error}; give another path") from error
    return path


def _roots(root: Root) -> list[Path]:
    folders = [Path(folder).expanduser().absolute() for folder in root_folders(root)]
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder} is no folder; pass one that exists (an empty one takes a download), or none")
    if folders:
        return without_repeats(folders)
    if os.environ.get(ROOT_VARIABLE):
        return [Path(os.environ[ROOT_VARIABLE]).expanduser().absolute()]
    import pooch

    return [Path(pooch.os_cache("rush"))]


def _check_splits(name: str, parts: Sequence[str]) -> None:
    for part in parts:
        if part not in SPLITS[name]:
            raise DataError(f"{name} has no split {part!r}; allowed are {', '.join(SPLITS[name])}")


def _load_official(
    name: str, parts: Sequence[str], roots: Sequence[Path], may_download: bool, size: int | None
) -> ImageSet:
    readers = _official_readers(name)
    located = _locate(readers, roots, name)
    if located is None:
        records = _official_records(name, parts, roots)
        if records is not None:
            return decoded(records, size)
        if not may_download:
            known = ", ".join(f"{archive.file}, {archive.folder}" for archive in readers)
            raise DataError(
                f"{joined_names(roots)} {'holds' if len(roots) == 1 else 'hold'} no {name}: looked there and in "
                f"{joined_names([root / name for root in roots])} for {known} and parquet shards; "
                f"put one there, pass another root, set {ROOT_VARIABLE}, or pass download=True"
            )
        preferred = next(iter(readers))
        located = preferred, download_archive(preferred, roots[0])
    archive, path = located
    return concatenate([readers[archive](path, part, size) for part in parts])


def _locate(archives: Iterable[Archive], roots: Sequence[Path], name: str) -> tuple[Archive, Path] | None:
    """What ``locate`` finds in the first of ``roots`` that holds any."""
    found = (locate(list(archives), root, name) for root in roots)
    return next((located for located in found if located is not None), None)


def _official_readers(name: str) -> dict[Archive, Read]:
    """What reads each official archive of ``name``; the first is the one to download."""
    if name == "stl10":
        return {STL10: read_stl10}
    versions = cifar10_versions() if name == "cifar10" else cifar100_versions()
    return {version.archive: partial(_read_cifar, name, version) for version in versions}


def _read_cifar(name: str, version: CifarVersion, path: Path, split: str, size: int | None) -> ImageSet:
    return _resized(read_cifar(name, version, path, split), size)


def _official_records(name: str, parts: Sequence[str], roots: Sequence[Path]) -> Records | None:
    """The shards of ``name`` in ``roots``; None without any, or where an archive lies beside those of other folders.

    Raises: DataError when they are of another data set, or when a folder holds none of it.
    """
    shards = {root: parquet_folder(root) or parquet_folder(root / name) for root in roots}
    found = without_repeats(folder for folder in shards.values() if folder is not None)
    bare = [root for root, folder in shards.items() if folder is None]
    if not found or (bare and _locate(_official_readers(name), bare, name) is not None):
        return None
    if bare:
        raise _without_shards(name, bare[0], found[0])
    records = join([parquet_records(found, part, name) for part in parts])
    shape = decode(next(records.read(np.arange(1)))).shape
    if shape != SHAPES[name] or len(records.classes) not in (0, NUM_CLASSES[name]):
        raise DataError(
            f"{joined_names(found)}: images of shape {shape} in {len(records.classes)} classes, but {name} has "
            f"{SHAPES[name]} in {NUM_CLASSES[name]}; pass the right root, or the folder itself instead of {name!r}"
        )
    return records


def _folder_records(folders: Sequence[Path], split: str) -> Records:
    shards = without_repeats(shards for shards in map(parquet_folder, folders) if shards is not None)
    if not shards:
        return folder_records(folders[0], split)
    return parquet_records(shards, split, folders[0].resolve().name)


def _resized(images: ImageSet, size: int | None) -> ImageSet:
    return replace(images, images=resize_images(images.images, size))


def _npz(name: str, paths: Sequence[Path]) -> Path:
    """The first of ``paths`` if it is an .npz file. Raises: DataError otherwise."""
    if paths[0].is_file() and paths[0].suffix == ".npz":
        return paths[0]
    raise _unknown(name, paths)


def _unknown(name: str, paths: Sequence[Path]) -> DataError:
    allowed = f"allowed are {', '.join(SPLITS)}, a folder of class folders, a folder of parquet shards, or an .npz file"
    path = paths[0]
    if path.exists() and not path.is_file():
        return DataError(f"{path} is {describe_kind(path)}; {allowed}")
    if path.is_file():
        return DataError(f"{path} is a {path.suffix or 'nameless'} file; {allowed}")
    close = difflib.get_close_matches(name.lower(), SPLITS, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else ""
    places = " or ".join(str(path.absolute()) for path in paths)
    return DataError(f"{name!r} is no known data set and {places} does not exist; {allowed}{guess}")
